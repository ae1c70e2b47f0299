"""Training on anybody's pairs: folders, low-rank adapters, checkpointing, several processes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.mini_pools import SMALL, contexts, plan_of
from torch.nn.utils import parametrize

from lavin_rt.checkpoint.load import load_dit, load_vae
from lavin_rt.dit.config import preset
from lavin_rt.dit.model import JDiT, randomize_
from lavin_rt.errors import InputError, TooLittleMemory
from lavin_rt.mini.train import dit as train_dit
from lavin_rt.mini.train import trainer as trainer_module
from lavin_rt.mini.train.__main__ import _chosen, main, parser
from lavin_rt.mini.train.dit import BatchShape, Contexts, Plan, TransformerRun, flow_loss, shapes_of
from lavin_rt.mini.train.folders import folder_pools
from lavin_rt.mini.train.sharded import TrainedDiT, adapt_, merged
from lavin_rt.mini.train.trainer import Length, Rate, Trainer
from lavin_rt.vae.model import scale_latents

TESTS = Path(__file__).parents[1]
PLAN = plan_of(6)


def losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "dit-log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def inputs(pairs: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 16, 1, 4, 4), (2,), (2, 16, 2 * pairs + 1, 4, 4)
    return tuple(torch.rand(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_trains_computes_what_the_model_does(checkpointing: bool):
    dit = randomize_(JDiT(dataclasses.replace(SMALL, depth=2)))
    expected = dit(*inputs())
    expected.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in dit.named_parameters()}
    dit.zero_grad()
    result = TrainedDiT(dit, checkpointing)(*inputs())
    result.square().mean().backward()
    assert torch.allclose(result, expected, atol=1e-6)
    for name, parameter in dit.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7), name


def test_adapters_change_nothing_at_first_and_merge_into_the_weights():
    dit = randomize_(JDiT(SMALL)).requires_grad_(False)
    expected = dit(*inputs())
    adapted = adapt_(dit, rank=2)
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(learning) == 8 and all(".0.down" in name or ".0.up" in name for name in learning)
    assert torch.equal(adapted(*inputs()), expected)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(0, 0.1)
    whole = merged(adapted)
    assert torch.allclose(whole(*inputs()), adapted(*inputs()), atol=1e-6)
    assert not torch.allclose(whole(*inputs()), expected, atol=1e-3)
    assert set(dict(whole.named_parameters())) == set(dict(JDiT(SMALL).named_parameters()))
    assert parametrize.is_parametrized(adapted.blocks[0].mlp, "down")  # the copy alone is merged


def test_adapters_train_and_the_rest_stays(tmp_path):
    start = randomize_(JDiT(SMALL))
    before = {name: p.detach().clone() for name, p in start.named_parameters()}
    run = TransformerRun(SMALL, tmp_path, PLAN, compile=False, warm_start=start, lora=2)
    result = dict(run.train(contexts(PLAN)).named_parameters())
    for name, old in before.items():
        joined = name.endswith(("qkv", "proj", "gate_up", "down"))
        assert torch.equal(result[name], old) != joined, name
    kept = load_dit(tmp_path / "lavin_dit.safetensors", dtype=torch.float32, resident_modulation=True)
    for name, parameter in kept.named_parameters():
        assert (parameter - result[name]).abs().max() < 2e-2, name


def test_folders_become_pools(folders, checkpoint):
    vae = load_vae(checkpoint / "stvae.safetensors")
    pictures, clips = folder_pools(folders, vae, 32, torch.device("cpu"))
    assert clips is None and pictures.latents.shape == (16, 16, 1, 4, 4)
    negative, same = pictures.tasks
    assert (negative.name, same.name) == ("negative", "same") and same.rows.shape == (1, 4, 2)
    assert torch.equal(pictures.latents[same.rows[0, :, 0]], pictures.latents[same.rows[0, :, 1]])
    first = np.asarray(Image.open(folders[1] / "0_input.png").resize((32, 32), Image.Resampling.BICUBIC)) / 127.5 - 1
    pixels = torch.from_numpy(np.ascontiguousarray(first.transpose(2, 0, 1))).float()[None, :, None]
    expected = scale_latents(vae.encode(pixels).mode())[0]
    assert (pictures.latents[same.rows[0, 0, 0]] - expected).norm() < 0.05 * expected.norm()


def test_pairs_are_all_different_where_there_are_enough(folders, checkpoint):
    pictures, _ = folder_pools(folders, load_vae(checkpoint / "stvae.safetensors"), 32, torch.device("cpu"))
    cond, _, _ = pictures.draw(torch.tensor([0.5, 1.0]), 3, 64, torch.Generator().manual_seed(0))
    shown = cond[:, :, 0::2].transpose(1, 2).flatten(2)  # [64, 4, features]
    assert (torch.cdist(shown, shown) > 0).sum((1, 2)).eq(12).all()


def test_a_context_has_fewer_pairs_than_the_smallest_folder(folders, checkpoint):
    """So that the query is one of them by the plan's share alone."""
    for end in ("input", "target"):
        (folders[0] / f"3_{end}.png").unlink()
    vae, plan = load_vae(checkpoint / "stvae.safetensors"), Plan(steps=1, repeat=0.0)
    drawn = Contexts(*folder_pools(folders, vae, 32, torch.device("cpu")), {"negative": 1, "same": 1}, plan)
    generator = torch.Generator().manual_seed(0)
    shapes = {drawn.shape(generator, progress) for progress in (0, 0.5, 1) for _ in range(40)}
    assert {shape.pairs for shape in shapes} == {0, 1, 2} and shapes == set(drawn.shapes())
    cond, data, *_ = drawn.draw(BatchShape(False, 2), 4096, generator)
    assert not (cond[:, :, 1:4:2] == data).all((1, 3, 4)).any()
    for end in ("input", "target"):
        for i in (1, 2):
            (folders[0] / f"{i}_{end}.png").unlink()
    with pytest.raises(InputError, match=r"negative: one pair; expected at least two"):
        folder_pools(folders, vae, 32, torch.device("cpu"))


def test_folders_train_compiled_for_their_shapes(folders, checkpoint, tmp_path, monkeypatch):
    """All that come are asked for, at their own size; nothing is compiled here."""
    asked, seen = set(), set()

    def recorded(network: torch.nn.Module, cond: torch.Tensor, data: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.add((len(cond), cond.shape[2], data.shape[2], data.shape[3]))
        return flow_loss(network, cond, data, *rest)

    monkeypatch.setattr(train_dit, "compile_shapes", lambda network, shapes, *_: asked.update(shapes))
    monkeypatch.setattr(train_dit, "flow_loss", recorded)
    arguments = ["--pairs", folders[0], "--warm-start", checkpoint, "--dit-steps", 12, "--size", 64, "--tokens", 256]
    assert main([*map(str, arguments), "--output", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert len(seen) > 1 and seen <= asked


def test_folders_train_from_a_checkpoint_with_adapters(folders, checkpoint, tmp_path):
    arguments = ["--pairs", *folders, "--warm-start", checkpoint, "--lora", 2, "--dit-steps", 3, "--size", 32]
    arguments += ["--output", tmp_path / "run", "--device", "cpu", "--tokens", 128]
    assert main(list(map(str, arguments))) == 0
    assert load_dit(tmp_path / "run" / "lavin_dit.safetensors").config == SMALL
    assert load_vae(tmp_path / "run" / "stvae.safetensors")


def test_what_cannot_be_is_said(folders, checkpoint, tmp_path, capsys):
    common = ["--output", str(tmp_path / "run"), "--device", "cpu"]
    assert main(common) == 2 and "--cache" in capsys.readouterr().err
    assert main([*common, "--pairs", str(folders[0]), "--lora", "4"]) == 2 and "--warm-start" in capsys.readouterr().err
    assert main([*common, "--pairs", str(folders[0])]) == 2 and "--vae" in capsys.readouterr().err
    vae = load_vae(checkpoint / "stvae.safetensors")
    with pytest.raises(InputError, match="one name"):
        folder_pools([folders[0], folders[0]], vae, 32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((f"--{name}", "-1") for name in ("dit-steps", "vae-steps", "clips", "lora", "seed", "minutes")),
        *((f"--{name}", "0") for name in ("dit-steps", "tokens", "peak", "size", "scenes", "workers", "threads")),
        *((f"--{name}", "nan") for name in ("peak", "vae-minutes", "total-minutes")),
        ("--size", "-16"),
        ("--size", "40"),
        ("--seed", str(2**40)),
        ("--minutes", "inf"),
        ("--vae-steps", "0"),
        ("--output", "/proc/run"),
        ("--output", __file__),
        ("--cache", f"{__file__}/cache"),
    ],
)
def test_numbers_and_folders_are_checked_before_anything(option: str, value: str, tmp_path, capsys):
    given = ["--output", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    assert main([*given, f"{option}={value}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "--pairs" not in said
    assert (option if option not in ("--output", "--cache") else value) in said
    assert not list(tmp_path.iterdir())


def test_a_number_that_is_given_counts():
    given = ["--output", "o", "--clips", "0", "--dit-steps", "1", "--tokens", "5", "--peak", "1e-9"]
    chosen = _chosen(parser().parse_args(given))
    assert chosen.amounts.clips == 0 and (chosen.plan.steps, chosen.plan.tokens, chosen.plan.peak) == (1, 5, 1e-9)


@pytest.mark.parametrize(
    ("name", "parameters"), [("lavin-dit-0.1b", 0.1), ("lavin-dit-0.3b", 0.3), ("lavin-dit-1b", 1)]
)
def test_presets_have_about_their_names_parameters(name: str, parameters: float):
    with torch.device("meta"):
        dit = JDiT(preset(name))
    assert dit.config.head_size == 72 and dit.config.kv_group == 4
    assert sum(p.numel() for p in dit.parameters()) == pytest.approx(parameters * 1e9, rel=0.25)


@pytest.mark.parametrize("processes", [1, 3, 5])
def test_every_process_has_as_many_samples_and_at_least_one(processes: int, monkeypatch):
    monkeypatch.setattr(train_dit, "ranks", lambda: (0, processes))
    for tokens in (1, 40, 300):
        for shape in shapes_of(PLAN):
            samples = contexts(PLAN).draw(shape, tokens, torch.Generator().manual_seed(0))[1]
            assert len(samples) >= processes and len(samples) % processes == 0


def test_processes_end_together(tmp_path, monkeypatch):
    """By the first one's clock: this is the second."""
    trainer = Trainer(torch.nn.Linear(2, 1), Rate(0.1, 1), Length(steps=1), tmp_path, "line")
    monkeypatch.setattr(trainer_module, "ranks", lambda: (1, 2))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: tensor.fill_(7.0 + source))
    assert trainer.of_the_first(3.0) == 7.0


@pytest.mark.parametrize(("tokens", "processes"), [(128, 1), (5000, 1), (5000, 2)])
def test_a_step_that_does_not_fit_is_halved_to_an_end(tokens: int, processes: int, tmp_path, monkeypatch):
    """By one process alone: others would wait for it."""
    tried = []

    def full(network: torch.nn.Module, *tensors: torch.Tensor) -> torch.Tensor:
        tried.append(tensors)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_dit, "flow_loss", full)
    plan = dataclasses.replace(PLAN, tokens=tokens)
    run = TransformerRun(SMALL, tmp_path, plan, compile=False)
    monkeypatch.setattr(train_dit, "ranks", lambda: (0, processes))
    with pytest.raises(TooLittleMemory, match=r"out of memory in a step of \d+ tokens; give fewer --tokens"):
        run.train(contexts(plan))
    assert len(tried) == (3 if tokens == 5000 and processes == 1 else 1)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """Twenty steps to 1e-4, and as well when stopped in the middle."""
    script = ["-m", "support.sharded_training"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *script, tmp_path / "one", "20"], check=True, cwd=TESTS)
    subprocess.run([*torchrun, *script, tmp_path / "two", "20"], check=True, cwd=TESTS)
    for steps in ("10", "20"):
        subprocess.run([*torchrun, *script, tmp_path / "parts", steps, "20"], check=True, cwd=TESTS)
    one, two, parts = (losses(tmp_path / name) for name in ("one", "two", "parts"))
    assert len(one) == 20 and one == pytest.approx(two, abs=1e-4) and one == pytest.approx(parts, abs=1e-4)
    first, second = (load_dit(tmp_path / name / "lavin_dit.safetensors") for name in ("one", "parts"))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-3), name
