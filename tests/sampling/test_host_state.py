"""What a host process has set is not trusted: the same answer, and the host's state as it was."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import lavin_rt
import lavin_rt.cli.main
import lavin_rt.find.model
import lavin_rt.pictures.images
from lavin_rt.host_state import full_float32, own_state
from lavin_rt.task import draw_noise
from lavin_rt.vae.tiling import blend_weights

SPEEDS = {"exact": {"steps": 4}, "fastest": {}}


def query() -> np.ndarray:
    ramp = np.arange(64, dtype=np.uint8) * 4
    return np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 128)], -1).astype(
        np.uint8
    )


def answers(pipe: lavin_rt.Pipeline) -> list[torch.Tensor]:
    """Latents by every way in which a run makes tensors of its own."""
    task = pipe.task("depth", pairs=1)
    found = [task.run([query()], speed=speed, seed=3, **options)[0].latents for speed, options in SPEEDS.items()]
    sampled = pipe.task("depth", pairs=1, posterior="sample", seed=5)
    found.append(sampled.run([query()], steps=4, guidance=1.0, seed=3)[0].latents)
    pipe.tile = 4  # of latents, 8 in all
    found.append(pipe.decode(found[0]))
    pipe.tile = None
    return found


@pytest.fixture(scope="module")
def plain() -> SimpleNamespace:
    pipe = lavin_rt.Pipeline.from_pretrained()
    return SimpleNamespace(pipe=pipe, answers=answers(pipe))


def state() -> tuple:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        torch.get_rng_state().tolist(),
        list(warnings.filters),
        warnings.showwarning,
    )


@contextlib.contextmanager
def setting(change, get, value):
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


HOSTS = {
    "float64": lambda: setting(torch.set_default_dtype, torch.get_default_dtype, torch.float64),
    "float16": lambda: setting(torch.set_default_dtype, torch.get_default_dtype, torch.float16),
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.get_default_dtype, torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "default device": lambda: setting(torch.set_default_device, lambda: None, "meta"),  # none is not the CPU by name
    "deterministic": lambda: setting(
        torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True
    ),
    "products": lambda: setting(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision, "medium"),
    "threads": lambda: setting(torch.set_num_threads, torch.get_num_threads, 1),
    "numpy's errors": lambda: np.errstate(all="raise"),
}


@pytest.mark.parametrize("host", HOSTS)
def test_an_answer_is_the_plain_one_and_the_host_s_state_as_before(plain, host):
    with HOSTS[host]():
        before = state()
        inside = answers(plain.pipe)
        fresh = answers(lavin_rt.Pipeline.from_pretrained())
        assert state() == before
    for found in (inside, fresh, answers(plain.pipe)):
        for tensor, expected in zip(found, plain.answers, strict=True):
            assert tensor.dtype == expected.dtype and tensor.device.type == "cpu" and not tensor.is_inference()
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_tensors_have_dtypes_of_their_own(dtype):
    noise, weights = draw_noise([7], 1, (64, 64)), blend_weights([slice(0, 6), slice(3, 9)], 0)
    with setting(torch.set_default_dtype, torch.get_default_dtype, dtype):
        assert torch.equal(draw_noise([7], 1, (64, 64)), noise) and noise.dtype == torch.float32
        for one, expected in zip(blend_weights([slice(0, 6), slice(3, 9)], 0), weights, strict=True):
            torch.testing.assert_close(one, expected, rtol=0, atol=0)


def test_what_is_made_in_inference_mode_works_outside(tmp_path):
    with torch.inference_mode():
        pipe = lavin_rt.Pipeline.from_pretrained()
        task = pipe.task("depth", pairs=1)
        first = task.run([query()], steps=4)[0]
    assert not first.latents.is_inference() and not any(p.is_inference() for p in pipe.dit.parameters())
    for guidance in (1.5, 1.0):  # another shape
        task.run([query()], steps=4, guidance=guidance)
    torch.testing.assert_close(task.run([query()], steps=4)[0].latents, first.latents, rtol=0, atol=0)
    pipe.task("negative", pairs=1).run([query()], steps=4, speed="exact")
    task.context.save(tmp_path / "context.safetensors")
    pipe.dit.requires_grad_()  # an inference tensor refuses


def test_full_float32_puts_back_what_the_host_set_by_either_name():
    cuda, one = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    for name in ("highest", "high", "medium"):
        with setting(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision, name):
            before = cuda.fp32_precision, one.fp32_precision
            with full_float32, full_float32:
                assert torch.get_float32_matmul_precision() == "highest"
                assert not {cuda.fp32_precision, one.fp32_precision} & {"tf32", "bf16"}
            assert (cuda.fp32_precision, one.fp32_precision) == before
            assert torch.get_float32_matmul_precision() == name
    before = cuda.fp32_precision
    cuda.fp32_precision = "tf32"  # by the newer name, which the older one then refuses to tell
    try:
        with full_float32:
            assert cuda.fp32_precision == "ieee"
        assert cuda.fp32_precision == "tf32"
    finally:
        cuda.fp32_precision = before


def test_own_state_leaves_an_error_s_state_too():
    before = state()
    with pytest.raises(KeyError), torch.inference_mode(), torch.autocast("cpu"), own_state():
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        raise KeyError
    assert state() == before


def test_reading_pictures_leaves_the_warning_filters_alone(tmp_path):
    """Saving and restoring them in one thread undoes what another thread set meanwhile."""
    Image.fromarray(query()).save(tmp_path / "q.png")
    changed, stop = threading.Event(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            lavin_rt.pictures.images.load_picture(tmp_path / "q.png")
            changed.set()

    before = list(warnings.filters)
    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    changed.wait(30)
    warnings.filterwarnings("ignore", message="set by the host")
    mine = warnings.filters[0]
    stop.set()
    for thread in threads:
        thread.join()
    try:
        assert warnings.filters[0] is mine and list(warnings.filters[1:]) == before
    finally:
        warnings.filters.remove(mine)
        warnings._filters_mutated()


def test_warnings_as_errors_are_no_traceback_of_another_kind(tmp_path):
    Image.fromarray(query()).save(tmp_path / "q.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lavin_rt.pictures.images.load_picture(tmp_path / "q.png")
        lavin_rt.Pipeline.from_pretrained()


def test_another_working_folder_after_loading(tmp_path, monkeypatch):
    """A checkpoint given by a relative path is found again for its modulation and its templates."""
    import shutil

    shutil.copytree(lavin_rt.find.model.BUNDLED / "weights", tmp_path / "mine" / "weights")
    shutil.copytree(
        lavin_rt.find.model.BUNDLED / "template" / "negative", tmp_path / "mine" / "template" / "my_own_negative"
    )
    monkeypatch.chdir(tmp_path)
    pipe = lavin_rt.Pipeline.from_pretrained("mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pipe.task("my_own", pairs=1).run([query()], steps=4)


def test_streams_of_the_host_stay_its_own(capsys):
    before = sys.stdout, sys.stderr
    assert lavin_rt.cli.main.main(["run", "--task", "depth", "--query", "none.png", "-o", "o.png"]) == 2
    assert (sys.stdout, sys.stderr) == before
    assert "no such picture" in capsys.readouterr().err
