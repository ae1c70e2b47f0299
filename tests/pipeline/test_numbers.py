"""Numbers, arrays and paths as people hold them, wherever one is taken."""

from __future__ import annotations

import os
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import refusal

import lavin_rt
from lavin_rt.find.model import BUNDLED
from lavin_rt.pictures.context import choose_pairs, find_task, read_template
from lavin_rt.pictures.images import load_picture, parse_size, save_picture
from lavin_rt.sampling.speeds import Speed
from lavin_rt.scalars import real, whole
from lavin_rt.task import check_seed, draw_noise

WHOLES = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)]
REALS = [1.5, np.float32(1.5), np.array(1.5), torch.tensor(1.5), torch.tensor(1.5, dtype=torch.bfloat16)]
REALS += [Decimal("1.5"), Fraction(3, 2)]
NEITHER = [
    True,
    np.bool_(True),
    torch.tensor(True),
    "3",
    b"3",
    None,
    [3],
    np.array([3]),
    torch.tensor([3]),
    3j,
    pytest.param(object(), id="object"),
]


class Held:
    """An `os.PathLike` that is no `pathlib.Path`."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)

    def __fspath__(self) -> str:
        return self.path


@pytest.mark.parametrize("value", WHOLES, ids=repr)
def test_whole_numbers(value):
    assert whole(value) == 3 and type(whole(value)) is int and real(value) == 3.0


@pytest.mark.parametrize("value", REALS, ids=repr)
def test_real_numbers(value):
    assert real(value) == 1.5 and type(real(value)) is float and whole(value) is None


@pytest.mark.parametrize("value", NEITHER, ids=repr)
def test_what_is_no_number(value):
    assert whole(value) is None and real(value) is None


@pytest.mark.parametrize("value", [np.int64(4), np.array(4), torch.tensor(4)], ids=repr)
def test_wherever_a_whole_number_is_taken(value):
    assert torch.equal(lavin_rt.schedule(value), lavin_rt.schedule(4))
    assert torch.equal(Speed(evaluations=value).knots(), Speed(evaluations=4).knots())
    assert Speed(evaluations=value, refresh={0, 2}) == Speed(evaluations=4, refresh=np.array([0, 2]))
    assert Speed(evaluations=4, guided=torch.tensor([0, 1])) == Speed(evaluations=4, guided={0, 1})
    assert Speed(times=np.array([0, 0.25, 1])) == Speed(times=torch.tensor([0, 0.25, 1.0]))
    assert check_seed(value) == 4 and type(check_seed(value)) is int
    assert torch.equal(draw_noise([value], 1, (16, 16)), draw_noise([4], 1, (16, 16)))
    pairs = read_template(BUNDLED / "template" / "depth_estimation")
    for repeats in (False, True):
        assert choose_pairs(pairs, value, value, repeats) == choose_pairs(pairs, 4, 4, repeats)


@pytest.mark.parametrize(
    "size",
    [np.int32(64), np.array(64), torch.tensor(64), np.array([64, 64]), torch.tensor([64, 64]), torch.Size([64, 64])],
    ids=repr,
)
def test_sizes(size):
    assert parse_size(size) == (64, 64) and all(type(edge) is int for edge in parse_size(size))


@pytest.mark.parametrize("size", [np.array([64.0, 64.0]), np.array([[64]]), np.True_, torch.tensor(64.0)], ids=repr)
def test_what_is_no_size(size):
    assert "expected multiples of 16" in refusal(parse_size, size)


@pytest.fixture(scope="module")
def task() -> lavin_rt.Task:
    return lavin_rt.Pipeline.from_pretrained().task("depth", pairs=np.int64(1), size=np.array([64, 64]))


def query() -> np.ndarray:
    return np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3))


def test_a_task_and_its_runs(task):
    plain = task.run([query()], steps=4, seed=5, guidance=2.0)[0]
    for kind in (np.int64, np.array, torch.tensor):
        kinds = {"steps": kind(4), "seed": kind(5), "guidance": kind(2.0) if kind is not np.int64 else np.float32(2)}
        held = task.run([query()], batch_size=kind(1), **kinds)[0]
        assert torch.equal(held.latents, plain.latents) and held.seed == 5 and type(held.seed) is int
    again = task.engine.task("depth", pairs=torch.tensor(1), seed=np.uint8(0))
    assert torch.equal(again.run([query()], steps=4, seed=5, guidance=2.0)[0].latents, plain.latents)


def test_noise(task):
    noise = draw_noise([5], 1, (64, 64))
    plain = task.run([query()], steps=4, noise=noise)[0].latents
    for held in (noise.numpy(), noise.double(), noise.double().numpy(), noise.tolist(), noise.requires_grad_()):
        assert torch.equal(task.run([query()], steps=4, noise=held)[0].latents, plain)
    assert "noise is str" in refusal(task.run, [query()], steps=4, noise="noise")
    assert "expected [1, 16, 1, 8, 8]" in refusal(task.run, [query()], steps=4, noise=np.zeros((1, 16, 8, 8)))


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), np.array([1.0]), torch.tensor([1.0, 2.0])], ids=repr)
def test_what_is_refused_says_what_it_is(task, value):
    assert "guidance is" in refusal(task.run, [query()], steps=4, guidance=value)
    assert "seed is" in refusal(task.run, [query()], steps=4, seed=value)
    if value is not None:
        assert "batch_size is" in refusal(task.run, [query()], steps=4, batch_size=value)
        assert "steps is" in refusal(task.run, [query()], steps=value)


def test_latents_of_sample(task):
    dit, latents, noise = task.engine.dit, torch.randn(1, 16, 3, 8, 8), torch.randn(1, 16, 1, 8, 8)
    plain = lavin_rt.sample(dit, latents, noise, 4, 1.5)
    held = lavin_rt.sample(dit, latents.numpy(), noise.numpy(), np.int64(4), np.float64(1.5), query_frames=np.int8(1))
    assert torch.equal(held, plain)


def test_tiles(task):
    pipe, latents = task.engine, torch.randn(1, 16, 1, 8, 8)
    pipe.tile = 4
    plain = pipe.decode(latents)
    pipe.tile = np.int64(4)
    assert torch.equal(pipe.decode(latents), plain)
    pipe.tile = None


def test_paths_of_any_kind(task, tmp_path):
    Image.fromarray(query()).save(tmp_path / "q.png")
    (tmp_path / "folder").mkdir()
    for kind in (str, Path, Held):
        assert torch.equal(load_picture(kind(tmp_path / "q.png")), load_picture(tmp_path / "q.png"))
        save_picture(load_picture(query()), kind(tmp_path / "o.png"))
        task.context.save(kind(tmp_path / "context.safetensors"))
        loaded = lavin_rt.EncodedContext.load(kind(tmp_path / "context.safetensors"))
        assert torch.equal(loaded.latents, task.context.latents)
        again = task.engine.task(kind(tmp_path / "context.safetensors"))
        assert torch.equal(again.context.latents, task.context.latents)
        assert find_task(kind(BUNDLED / "template" / "negative"), []) == BUNDLED / "template" / "negative"
        assert len(task.run([kind(tmp_path / "q.png")], steps=4)) == 1
        lavin_rt.save_vae(task.engine.vae, kind(tmp_path / "stvae.safetensors"))
        assert lavin_rt.load_vae(kind(tmp_path / "stvae.safetensors")).config == task.engine.vae.config
        lavin_rt.save_dit(task.engine.dit, kind(tmp_path / "lavin_dit.safetensors"), size=np.int64(64))
        assert lavin_rt.Pipeline.from_pretrained(kind(tmp_path)).size == 64
