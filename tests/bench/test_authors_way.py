"""The baseline: it must be right, and no slower than it has to be in ways that a test can see."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from support.golden import GOLDEN, case_names, golden_cases, relative_error

from lavin_bench.pipeline import authors_way
from lavin_bench.pipeline.authors_way import AuthorsWay, useful_flops
from lavin_rt.checkpoint.load import load_vae
from lavin_rt.dit.config import PRESETS, DiTConfig
from lavin_rt.dit.model import JDiT, randomize_
from lavin_rt.pictures.images import from_pixels, resize, to_pixels
from lavin_rt.sampling.schedule import schedule

DITS = ["dit_a", "dit_b", "dit_c"]


@pytest.mark.parametrize(("name", "case"), case_names(DITS, "forward"))
def test_forward(golden_dit, name, case):
    case = golden_cases(name)[case]
    way = AuthorsWay(golden_dit(name))
    assert relative_error(way.velocity(case["latents"], case["t"], case["cond_latents"]), case["velocity"]) <= 1e-5


@pytest.mark.parametrize(("name", "case"), case_names(DITS, "sample"))
def test_sample(golden_dit, name, case):
    case = golden_cases(name)[case]
    way = AuthorsWay(golden_dit(name), steps=int(case["num_steps"]), guidance=float(case["cfg_scale"]))
    latents = way.sample(case["cond_latents"], case["noise"])
    assert latents.dtype == torch.float32
    assert relative_error(latents, case["latents"]) <= 1e-4


@pytest.mark.parametrize(("name", "case"), case_names(["pipeline"], "pipeline"))
def test_answer(golden_dit, name, case):
    case = golden_cases(name)[case]
    way = AuthorsWay(
        golden_dit("dit_c"), load_vae(GOLDEN / "stvae.pt", dtype=torch.float32), guidance=float(case["cfg_scale"])
    )
    size = tuple(case["size"].tolist())
    context = to_pixels(resize(case["context"].flatten(0, 1), size))
    latents, pixels = way.answer(context, to_pixels(resize(case["query"][None], size)), case["noise"])
    assert relative_error(latents, case["latents"]) <= 1e-4
    assert (from_pixels(pixels)[0].int() - case["image"].int()).abs().max() <= 1


@pytest.mark.slow
def test_compiled_is_the_same_function():
    dit = randomize_(JDiT(DiTConfig(hidden_size=48, depth=2, num_heads=2, kv_group=2))).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    cond, noise = (torch.randn(1, 16, frames, 4, 4, generator=generator) for frames in (3, 1))
    eager, compiled = (AuthorsWay(dit, compile=c, steps=6).sample(cond, noise) for c in (False, True))
    assert 0 < relative_error(compiled, eager) <= 1e-5


def test_weights_are_shared_and_the_model_is_left_as_it_was(golden_dit):
    dit = randomize_(JDiT(DiTConfig(hidden_size=48, depth=2, num_heads=2, kv_group=2)))
    way = AuthorsWay(dit)
    assert way.network.blocks[1][1].qkv.data_ptr() == dit.blocks[1].attention.qkv[1].data_ptr()
    assert all(parameter.requires_grad for parameter in dit.parameters())
    from_file = golden_dit("dit_a")
    AuthorsWay(from_file)
    assert from_file.blocks[0].modulation.weight is None


def test_the_standard_run_has_the_published_work():
    """55.8 TFLOP a step: 32.65 of linears and 23.17 of attention; 512 px, 4 pairs."""
    assert useful_flops(PRESETS["lavin-dit-3.4b"], 32 * 32, (9, 2)) / 1e12 == pytest.approx(55.82, abs=0.01)


@pytest.mark.parametrize("steps", [4, 20, 30, 40, 136])
def test_knots(steps):
    assert torch.equal(authors_way.knots(steps), schedule(steps))


def test_the_faster_attention_is_chosen_and_what_does_not_run_is_passed_over(monkeypatch):
    shape, cpu = (1, 12, 4, 2, 24), torch.device("cpu")
    for faster in (True, False):

        def seconds(call, device, repeats):
            call()
            return [1.0 if seconds.grouped[0] else 2.0, 3.0]

        def attend(q, k, v, grouped, seconds=seconds, faster=faster):
            seconds.grouped = [grouped == faster]

        monkeypatch.setattr(authors_way, "_seconds", seconds)
        monkeypatch.setattr(authors_way, "attend", attend)
        assert authors_way.fastest_attention(*shape, cpu, torch.float32).grouped == faster

    def only_repeated(q, k, v, grouped):
        if grouped:
            raise RuntimeError("No available kernel")
        seconds.grouped = [False]

    monkeypatch.setattr(authors_way, "attend", only_repeated)
    assert not authors_way.fastest_attention(*shape, cpu, torch.float32).grouped


def test_it_stands_alone():
    """Nothing of the fast path is imported outside `main`, which only prints."""
    tree = ast.parse(Path(authors_way.__file__).read_text())
    modules = {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert not {name for name in modules if name.startswith("lavin")}
    inner = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == "main")]
    nested = [sub for node in inner for sub in ast.walk(node) if isinstance(sub, ast.ImportFrom)]
    assert not [node.module for node in nested if node.module.startswith("lavin")]


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu(compile):
    """Two contexts in turn, with and without the context in every step, the graphs of reduce-overhead included."""
    dit = randomize_(JDiT(DiTConfig(hidden_size=288, depth=2, num_heads=4, kv_group=2))).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    cond, noise = (torch.randn(2, 16, frames, 8, 8, generator=generator) for frames in (5, 1))
    truths = [AuthorsWay(dit, steps=6).sample(c[None], n[None]) for c, n in zip(cond, noise, strict=True)]
    way = AuthorsWay(dit.to("cuda", torch.bfloat16), compile=compile, steps=6)
    for _ in range(2):
        for c, n, truth in zip(cond, noise, truths, strict=True):
            latents = way.sample(c[None].cuda(), n[None].cuda())
            assert relative_error(latents.cpu(), truth) <= 0.03
    assert all(choice.backend is not None for choice in way.attention.values())
