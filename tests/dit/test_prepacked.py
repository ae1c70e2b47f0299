"""Linears in oneDNN's layout: the same answers, and nobody who asks for the model sees it."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.golden import relative_error

import lavin_rt
from lavin_rt import Pipeline
from lavin_rt.checkpoint.load import load_dit
from lavin_rt.dit import prepacked
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.model import JDiT, randomize_
from lavin_rt.dit.prepacked import can_prepack, pays, prepack_, unpack_
from lavin_rt.find.model import BUNDLED
from lavin_rt.kept_keys import transformer_fingerprint
from lavin_rt.sampling.denoisers import PackedNetwork
from lavin_rt.sampling.sampler import sample

pytestmark = pytest.mark.skipif(
    not can_prepack(torch.device("cpu"), torch.float32), reason="this PyTorch has not oneDNN's layouts"
)
CONFIG = DiTConfig(hidden_size=144, depth=3, num_heads=2, kv_group=2)
SPEEDS = ("exact", lavin_rt.Speed(evaluations=4, refresh={0, 2}, guided={0}))


def small_dit() -> JDiT:
    return randomize_(JDiT(CONFIG)).eval().requires_grad_(False)


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("speed", SPEEDS, ids=["exact", "kept"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_plain_models_answer(speed, guidance, monkeypatch):
    monkeypatch.setattr(prepacked, "ROWS", 7)  # an MLP's parts end within a stream
    dit, cond, noise = small_dit(), latents(2, 16, 5, 4, 6), latents(2, 16, 1, 4, 6, seed=1)
    options = {"guidance": guidance, "speed": speed, "steps": 4 if speed == "exact" else None}
    plain = sample(dit, cond, noise, impl="plain", **options)
    assert relative_error(sample(prepack_(dit), cond, noise, impl="torch", **options), plain) <= 1e-5
    assert relative_error(sample(dit, cond, noise, impl="plain", **options), plain) <= 1e-6, "a dense copy was other"


@pytest.mark.slow
def test_compiled():
    """No weight is a constant of the graph: another model of the same shape runs by it, with its own weights."""
    cond, noise = latents(1, 16, 3, 4, 6), latents(1, 16, 1, 4, 6, seed=1)
    for seed in (0, 1):
        dit = randomize_(small_dit(), seed)
        plain = sample(dit, cond, noise, steps=4, guidance=1.0, impl="plain")
        compiled = sample(prepack_(dit), cond, noise, steps=4, guidance=1.0, impl="torch", compile=True)
        assert relative_error(compiled, plain) <= 1e-5


def test_unpacked_it_is_the_model_it_was():
    dit = small_dit()
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    told = transformer_fingerprint(PackedNetwork(dit, "torch"))
    prepack_(prepack_(dit))
    assert transformer_fingerprint(PackedNetwork(dit, "torch")) == told, "packs of keys and values would be refused"
    assert prepacked.prepacked(dit) and len(dit.state_dict()) < len(before)
    copied = copy.deepcopy(dit)
    for model in (dit, copied):
        after = unpack_(model).state_dict()
        assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
        assert not prepacked.prepacked(model)


def test_a_loaded_pipeline_gives_its_model_back(tmp_path, monkeypatch):
    monkeypatch.setattr(prepacked, "LEAST_WIDTH", 1)
    monkeypatch.setattr(prepacked, "DTYPES", (torch.float32,))
    pipe = Pipeline.from_pretrained(device="cpu", dtype="float32")
    assert prepacked.prepacked(pipe.network.dit)
    task = pipe.task("negative", pairs=1)
    query = torch.full((64, 64, 3), 80, dtype=torch.uint8)
    first = task.run([query], steps=4)[0].latents
    assert prepacked.prepacked(pickle.loads(pickle.dumps(pipe)).network.dit)
    with ThreadPoolExecutor(4) as threads:  # which wait for one another, and for the run
        running = threads.submit(task.run, [query], steps=4)
        asked = [threads.submit(lambda: pipe.dit) for _ in range(3)]
    assert relative_error(running.result()[0].latents, first) <= 1e-5
    assert not prepacked.prepacked(pipe.network.dit) and {id(one.result()) for one in asked} == {id(pipe.dit)}
    assert relative_error(task.run([query], steps=4)[0].latents, first) <= 1e-5
    pickle.loads(pickle.dumps(pipe))
    lavin_rt.save_dit(pipe.dit, tmp_path / "lavin_dit.safetensors")
    written, loaded = (load_dit(folder / "lavin_dit.safetensors") for folder in (tmp_path, BUNDLED / "weights"))
    assert all(torch.equal(a, b.float()) for a, b in zip(written.parameters(), loaded.parameters(), strict=True))


def test_what_is_not_there_or_wrong_is_not_used(monkeypatch):
    def wrong(*arguments):
        return arguments[0].new_zeros(arguments[0].shape[0], 48)

    def missing(weight):
        raise AttributeError("no such operator")

    for owner, name, fault in ((prepacked.PrepackedLinear, "__call__", wrong), (prepacked, "_reordered", missing)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            assert not can_prepack.__wrapped__(torch.device("cpu"), torch.float32)
    assert not can_prepack.__wrapped__(torch.device("meta"), torch.float32)


def test_what_pays(monkeypatch):
    """Wide models of 16 bit; float32 multiplies as fast without."""
    monkeypatch.setattr(prepacked, "can_prepack", lambda device, dtype: True)
    half = small_dit().to(torch.bfloat16)
    assert not pays(half), "too narrow"
    monkeypatch.setattr(prepacked, "LEAST_WIDTH", CONFIG.hidden_size)
    assert pays(half) and not pays(small_dit())
    with torch.backends.mkldnn.flags(enabled=False):
        assert not pays(half)
