"""What a training leaves in its folder, and what goes on from there."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
from support.mini_pools import SMALL, contexts, plan_of

pytest.importorskip("embreex", reason="needs the extra train")

from lavin_rt.checkpoint.load import load_dit
from lavin_rt.errors import InputError
from lavin_rt.mini.train.dit import TransformerRun
from lavin_rt.mini.train.trainer import Length, Rate, Trainer

PLAN = dataclasses.replace(plan_of(3), tokens=64, log_every=200)


def trained(folder: Path, **changes: float) -> torch.nn.Module:
    plan = dataclasses.replace(PLAN, **changes)
    return TransformerRun(SMALL, folder, plan, compile=False).train(contexts(plan))


def line(folder: Path, **options: float) -> Trainer:
    return Trainer(torch.nn.Linear(2, 1), Rate(0.1, 1), Length(steps=6), folder, "line", **options)


def step(trainer: Trainer, factor: float = 1.0) -> None:
    trainer.update(factor * (1 + 0 * trainer.network(torch.ones(1, 2)).sum()))


def test_what_ran_away_is_not_kept(tmp_path):
    with pytest.raises(InputError, match=r"dit: training ran away, the loss is .*; lower the rate"):
        trained(tmp_path, peak=1e30)
    gc.collect()  # ends the loop that was left
    assert not (tmp_path / "lavin_dit.safetensors").exists()
    assert all(p.isfinite().all() for p in trained(tmp_path, peak=1e-3).parameters())
    assert all(p.isfinite().all() for p in load_dit(tmp_path / "lavin_dit.safetensors").parameters())


def test_the_loss_is_judged_before_every_save(tmp_path):
    trainer, seen, saved = line(tmp_path, save_every=-1), [], []
    trainer.on_save = lambda: saved.append(trainer.step)
    for _ in trainer.steps():
        seen.append(trainer.step)
        step(trainer, float("nan") if len(seen) == 3 else 1.0)
    assert seen == [0, 1, 2, 2, 3, 4, 5] and saved == [1, 2, 3, 4, 5, 6] and trainer.slower == 0.5


def test_an_interrupted_run_keeps_nothing_that_ran_away(tmp_path):
    trainer = line(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        for _ in (running := trainer.steps()):
            step(trainer, float("nan") if trainer.step == 2 else 1.0)
            if trainer.step == 3:
                running.throw(KeyboardInterrupt)
    assert torch.load(trainer.state_file)["step"] == 0


def test_a_state_remembers_its_slower_rate_of_a_peak(tmp_path):
    trainer = line(tmp_path)
    trainer.slower = 0.25
    trainer.save()
    same, other = line(tmp_path), line(tmp_path)
    other.rate = Rate(0.05, 1)
    assert same.resume() and other.resume() and (same.slower, other.slower) == (0.25, 1.0)


def test_a_state_of_weights_that_ran_away_is_refused(tmp_path):
    trainer = line(tmp_path)
    trainer.averaged.values["bias"].fill_(float("inf"))
    trainer.save()
    with pytest.raises(InputError, match=r"line-state.pt: its weights are not all finite numbers; remove it"):
        line(tmp_path).resume()
