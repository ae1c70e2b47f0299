"""From pictures to pictures: the golden pipeline cases, clips, batches, encoded contexts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.golden import GOLDEN, case_names, golden_cases, relative_error
from support.small_artifact import write_small_artifact

import lavin_rt
from lavin_rt.artifact import manifest
from lavin_rt.checkpoint.load import load_vae
from lavin_rt.checkpoint.tensors import SafetensorsFile
from lavin_rt.cli.main import main
from lavin_rt.devices import resolve_device, resolve_dtype
from lavin_rt.errors import InputError
from lavin_rt.find.model import BUNDLED
from lavin_rt.pipeline import Pipeline
from lavin_rt.task import draw_noise


def picture(seed: int, height: int = 32, width: int = 48, frames: int | None = None) -> np.ndarray:
    shape = (height, width, 3) if frames is None else (frames, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def vae():
    return load_vae(GOLDEN / "stvae.pt", dtype=torch.float32)


@pytest.fixture(scope="module")
def pipe(golden_dit, vae) -> Pipeline:
    return Pipeline(golden_dit("dit_c"), vae)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    return [(picture(2 * i), picture(2 * i + 1)) for i in range(2)]


@pytest.mark.parametrize("impl", ["plain", "torch"])
@pytest.mark.parametrize(("name", "case"), case_names(["pipeline"], "pipeline"))
def test_golden_pipeline(golden_dit, vae, name, case, impl):
    case = golden_cases(name)[case]
    context = case["context"].permute(0, 1, 3, 4, 2)
    pipe = Pipeline(golden_dit("dit_c"), vae, impl=impl)
    task = pipe.task([(given, wanted) for given, wanted in context], size=tuple(case["size"].tolist()))
    [result] = task.run([case["query"].permute(1, 2, 0)], guidance=float(case["cfg_scale"]), noise=case["noise"])
    assert relative_error(result.latents, case["latents"]) <= 1e-4
    assert (result.frames[0].int() - case["image"].int()).abs().max() <= 1


def test_public_surface(pipe, pairs, tmp_path):
    """The README's example, on a small model."""
    for name, array in (("photo", picture(10)), ("other", picture(11))):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    task = pipe.task(pairs, size=(32, 48))
    image = task(tmp_path / "photo.png", steps=4, guidance=1.5, seed=0)
    assert isinstance(image, Image.Image) and image.size == (48, 32)
    images = task.batch([tmp_path / "photo.png", tmp_path / "other.png"], steps=4)
    assert np.abs(np.int16(images[0]) - np.int16(image)).max() <= 1
    assert lavin_rt.Pipeline is Pipeline and callable(lavin_rt.schedule)
    assert set(lavin_rt.__all__) <= set(dir(lavin_rt))
    for name in lavin_rt.__all__:
        assert getattr(lavin_rt, name)


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_a_seed_means_the_same_in_a_batch_and_alone(pipe, pairs, posterior):
    task = pipe.task(pairs, size=(32, 48), posterior=posterior)
    queries = [picture(seed) for seed in (10, 11, 12)]
    together = task.run(queries, steps=4, seed=7, batch_size=2)
    assert [result.seed for result in together] == [7, 8, 9]
    for index, query in enumerate(queries):
        [alone] = task.run([query], steps=4, seed=7 + index)
        assert relative_error(together[index].latents, alone.latents) <= 1e-5
    assert torch.equal(draw_noise([3, 4], 2, (32, 48))[1:], draw_noise([4], 2, (32, 48)))


def test_clip(pipe):
    """Five frames in, five out: the query's two latent frames go into the null condition, the target has two."""
    clips = [(picture(0, frames=5), picture(1, frames=5))]
    task = pipe.task(clips, size=(16, 32))
    assert task.context.latents.shape == (1, 16, 4, 2, 4)
    frames = task(picture(2, frames=5), steps=4)
    assert len(frames) == 5 and frames[0].size == (32, 16)
    by_hand = lavin_rt.sample(
        pipe.dit,
        torch.cat([task.context.latents, *pipe.encode([_pixels(picture(2, frames=5), (16, 32))])], dim=2),
        draw_noise([0], 2, (16, 32)),
        steps=4,
        query_frames=2,
        impl="plain",
    )
    [result] = task.run([picture(2, frames=5)], steps=4)
    assert relative_error(result.latents, by_hand) <= 1e-5
    with pytest.raises(InputError, match="1 frame"):
        task(picture(2), steps=4)


def _pixels(frames: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    resized = lavin_rt.pictures.images.resize(torch.from_numpy(frames).permute(0, 3, 1, 2), size)
    return lavin_rt.pictures.images.to_pixels(resized).transpose(0, 1)[None]


def test_encoded_context_round_trip(pipe, pairs, tmp_path):
    task = pipe.task(pairs, size=(32, 48))
    task.context.save(tmp_path / "task.safetensors")
    again = pipe.task(tmp_path / "task.safetensors", size=(32, 48))
    assert torch.equal(again.context.latents, task.context.latents)
    options = {"steps": 4, "seed": 3}
    assert torch.equal(again.run([picture(9)], **options)[0].frames, task.run([picture(9)], **options)[0].frames)
    with pytest.raises(InputError, match="posterior"):
        pipe.task(tmp_path / "task.safetensors", size=(32, 48), posterior="sample")
    with pytest.raises(InputError, match="32x48"):
        pipe.task(tmp_path / "task.safetensors", size=(48, 32))


def test_context_of_another_vae_is_refused(pipe, pairs, tmp_path):
    pipe.task(pairs, size=(32, 48)).context.save(tmp_path / "task.safetensors")
    other = load_vae(GOLDEN / "stvae.pt", dtype=torch.float32)
    with torch.no_grad():
        other.encoder.conv_in.conv.bias[0] += 1
    with pytest.raises(InputError, match="another VAE"):
        Pipeline(pipe.dit, other).task(tmp_path / "task.safetensors", size=(32, 48))


def test_posterior_sample_is_seeded(pipe, pairs):
    latents = [pipe.task(pairs, size=(32, 48), posterior="sample", seed=seed).context.latents for seed in (0, 0, 1)]
    mean = pipe.task(pairs, size=(32, 48)).context.latents
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2]) and not torch.equal(latents[0], mean)


def test_keep_size(pipe, pairs):
    task = pipe.task(pairs, size=(32, 48))
    [result] = task.run([picture(5, 40, 30)], steps=4, keep_size=True)
    assert result.frames.shape == (1, 3, 40, 30)


def test_bfloat16_runs_near_float32(golden_dit, pairs):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = Pipeline(golden_dit("dit_c", dtype), load_vae(GOLDEN / "stvae.pt", dtype=dtype))
        [result] = pipe.task(pairs, size=(32, 48)).run([picture(5)], steps=4)
        results.append(result.latents)
    assert 1e-5 < relative_error(results[1], results[0]) < 0.02


def test_a_failed_run_leaves_the_task_usable(pipe, pairs):
    task = pipe.task(pairs, size=(32, 48))
    before = task.run([picture(5)], steps=4)[0].frames

    def interrupt(step, evaluations, latents):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        task.run([picture(5)], steps=4, callback=interrupt)
    with pytest.raises(lavin_rt.NonFiniteError, match="step 1 of 3"):
        task.run([picture(5)], steps=4, noise=torch.full((1, 16, 1, 4, 6), float("nan")))
    assert torch.equal(task.run([picture(5)], steps=4)[0].frames, before)
    assert task.warmup(steps=4) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": []}, "no pairs"),
        ({"size": 40}, "multiple"),
        ({"posterior": "mode"}, "posterior is 'mode'"),
        ({"context": "no such task"}, "no such task"),
    ],
)
def test_bad_task(pipe, pairs, options, message):
    with pytest.raises(InputError, match=message):
        pipe.task(**{"context": pairs, "size": (32, 48), **options})


def test_bad_queries(pipe, pairs):
    task = pipe.task(pairs, size=(32, 48))
    for queries, options, message in (
        ([], {}, "no queries"),
        ([picture(0)], {"noise": torch.zeros(1, 16, 1, 4, 4)}, r"noise is \[1, 16, 1, 4, 4\]"),
        ([picture(0)], {"batch_size": 0}, "batch_size is 0"),
        ([picture(0)], {"seed": 2**64}, "seed is 18446744073709551616"),
        ([picture(0)], {"seed": 0.5}, "seed is 0.5"),
        ([picture(0)], {"steps": 7}, "even number"),
        ([picture(0, frames=3)], {}, "3 frames"),
    ):
        with pytest.raises(InputError, match=message) as error:
            task.run(queries, **options)
        assert "\n" not in str(error.value)


def test_devices_and_dtypes():
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="dtype is 'int8'"):
        resolve_dtype("int8", torch.device("cpu"))
    for name in ("cuda:99", "tpu", "meta", "cpu:x"):
        with pytest.raises(InputError, match="device"):
            resolve_device(name)


@pytest.mark.gpu
def test_golden_pipeline_on_the_gpu(golden_dit, vae):
    case = golden_cases("pipeline")["pipeline0"]
    dit, vae = golden_dit("dit_c").to("cuda"), vae.to("cuda")
    try:
        pairs = [(given, wanted) for given, wanted in case["context"].permute(0, 1, 3, 4, 2)]
        task = Pipeline(dit, vae).task(pairs, size=tuple(case["size"].tolist()))
        [result] = task.run([case["query"].permute(1, 2, 0)], guidance=float(case["cfg_scale"]), noise=case["noise"])
    finally:
        dit.to("cpu"), vae.to("cpu")
    assert relative_error(result.latents, case["latents"]) <= 1e-4
    assert (result.frames[0].int() - case["image"].int()).abs().max() <= 1


def test_pipelines_that_share_a_vae_keep_their_own_implementation(golden_dit, vae):
    """Also in two threads at once, each to the bits that it gives alone."""
    pipes = [Pipeline(golden_dit("dit_c"), vae, impl=impl) for impl in ("torch", "plain")]
    assert [pipe.vae.impl for pipe in pipes] == ["torch", "plain"]
    assert all(a is b for a, b in zip(pipes[0].vae.parameters(), pipes[1].vae.parameters(), strict=True))
    clips = [_pixels(picture(seed)[None], (32, 48)) for seed in range(3)]
    alone = [pipe.encode(clips) for pipe in pipes]
    assert not torch.equal(torch.cat(alone[0]), torch.cat(alone[1])), "both compute alike: nothing would be seen"
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            together = list(pool.map(lambda pipe: pipe.encode(clips), pipes))
            for found, wanted in zip(together, alone, strict=True):
                assert torch.equal(torch.cat(found), torch.cat(wanted))


def test_a_long_clip_in_pieces(golden_dit, vae):
    """17 frames are five latent frames; pieces of three bound memory and are approximate, a whole one is exact."""
    clips = [(picture(0, frames=17), picture(1, frames=17))]
    whole, pieces, one_piece = (
        Pipeline(golden_dit("dit_c"), vae, chunk=chunk).task(clips, size=(16, 32)).context.latents
        for chunk in (None, 3, 5)
    )
    assert torch.equal(one_piece, whole) and not torch.equal(pieces, whole) and pieces.shape == whole.shape


def counted(monkeypatch, owner, name: str) -> list:
    """The first arguments of every call of a function from now on."""
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda first, *rest: calls.append(first) or function(first, *rest))
    return calls


def test_a_header_is_read_once(monkeypatch, tmp_path):
    opened, output = counted(monkeypatch, SafetensorsFile, "open"), str(tmp_path / "depth.png")
    query = str(next((BUNDLED / "template").glob("depth*/*_input*")))
    run = ["run", "--task", "depth", "--query", query, "-o", output, "--steps", "4", "--device", "cpu"]
    for read in (lambda: Pipeline.from_pretrained(device="cpu"), lambda: main(run), lambda: main(["info", "mini"])):
        opened.clear()
        read()
        assert [Path(path).name for path in opened].count("lavin_dit.safetensors") == 1


def test_a_manifest_is_read_once(tmp_path, monkeypatch):
    folder, read = write_small_artifact(tmp_path / "artifact"), counted(monkeypatch, manifest, "_read_json")
    lavin_rt.Pipeline.from_pretrained(folder)
    assert len(read) == 1
