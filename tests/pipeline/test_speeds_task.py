"""Speeds of a task and of the command line: what is kept with the task, faults, threads, records."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from support.checks import refusal
from support.command import run
from support.golden import GOLDEN, relative_error
from test_pipeline import picture

import lavin_rt.sampling.executor
from lavin_rt.checkpoint.load import load_dit, load_vae
from lavin_rt.dit.model import randomize_
from lavin_rt.errors import Cancelled, NonFiniteError
from lavin_rt.pictures.images import load_clip, to_pixels
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.sampler import sample
from lavin_rt.sampling.speeds import Speed
from lavin_rt.task import Task, draw_noise

SIZE = (32, 48)
SPEEDY = [
    "exact",
    "near",
    Speed(evaluations=3, refresh={0, 2}, guided={0, 1}),
    Speed(evaluations=3, refresh="task", guided={0}),
]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(load_dit(GOLDEN / "dit_c.safetensors", dtype=torch.float32), load_vae(GOLDEN / "stvae.pt"))


@pytest.fixture
def task(pipe) -> Task:
    return pipe.task([(picture(2 * i), picture(2 * i + 1)) for i in range(2)], size=SIZE)


def latents(task: Task, speed, seed: int = 5, **options) -> torch.Tensor:
    return task.run([picture(seed)], speed=speed, **options)[0].latents


def test_batches_equal_single_runs_and_the_task_s_keys_are_made_once(task, monkeypatch):
    made = []
    keys = task.engine.executor.context_keys
    monkeypatch.setattr(task.engine.executor, "context_keys", lambda *given: made.append(given) or keys(*given))
    queries = [picture(5), picture(6), picture(7)]
    for speed in SPEEDY[1:]:
        together = task.run(queries, speed=speed, batch_size=2)
        for index, query in enumerate(queries):
            [alone] = task.run([query], speed=speed, seed=index)
            assert relative_error(together[index].latents, alone.latents) <= 1e-5
    assert len(made) == 1


def test_clips(pipe):
    """A task's run is the plain model's sampling of the same latents."""
    task = pipe.task([(picture(0, frames=5), picture(1, frames=5))], size=SIZE)
    pixels = to_pixels(load_clip(picture(2, frames=5))).transpose(0, 1)[None]
    cond = torch.cat([task.context.latents, *pipe.encode([pixels])], dim=2)
    noise = draw_noise([0], 2, SIZE)
    for speed in SPEEDY[2:]:
        [result] = task.run([picture(2, frames=5)], speed=speed)
        assert (
            relative_error(result.latents, sample(pipe.dit, cond, noise, impl="plain", query_frames=2, speed=speed))
            <= 1e-5
        )


def test_keys_belong_to_their_weights(pipe, task):
    """A task that another pipeline takes over makes its keys and values anew."""
    speed = SPEEDY[3]
    before = latents(task, speed)
    other = Pipeline(randomize_(load_dit(GOLDEN / "dit_c.safetensors", dtype=torch.float32), seed=1), pipe.vae)
    expected = latents(other.task(task.context), speed)
    task.engine, task._embedded = other, None
    assert torch.equal(latents(task, speed), expected) and not torch.equal(expected, before)


def test_cancelled_and_broken_runs_leave_nothing(task):
    expected = [latents(task, speed) for speed in SPEEDY]

    def cancel(step, evaluations, state):
        if step == 2:
            raise Cancelled

    def poison(step, evaluations, state):
        state[:] = float("nan")

    for speed in SPEEDY:
        with pytest.raises(Cancelled):
            latents(task, speed, seed=9, callback=cancel)
        with pytest.raises(NonFiniteError, match="step 2 of"):
            latents(task, speed, seed=9, callback=poison)
        for other, wanted in zip(SPEEDY, expected, strict=True):
            assert torch.equal(latents(task, other), wanted)


def test_threads_with_different_speeds_on_one_task(task):
    expected = [latents(task, speed) for speed in SPEEDY]
    wrong = []

    def work(first: int) -> None:
        for turn in range(4):
            index = (first + turn) % len(SPEEDY)
            if not torch.equal(latents(task, SPEEDY[index]), expected[index]):
                wrong.append(SPEEDY[index])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_warmup_leaves_nothing_to_do(task, monkeypatch):
    executor, made = task.engine.executor, []
    executor.release()
    step = executor.network.step
    monkeypatch.setattr(executor.network, "step", lambda *given, **more: made.append(given) or step(*given, **more))
    task.warmup(speed=SPEEDY[3])
    forms = len(made)
    latents(task, SPEEDY[3])
    assert len(made) == forms >= 3


def test_memory_of_what_is_kept_is_counted_and_refused(task, monkeypatch):
    executor, speed = task.engine.executor, SPEEDY[2]
    executor.release()
    need = executor.network.workspace
    exact, kept = task._shape(1, 1.5), task._shape(1, 1.5, speed)
    config = executor.network.config
    assert need(kept) - need(exact) == 2 * config.depth * kept.rows * config.kv_size * 4
    monkeypatch.setattr(lavin_rt.sampling.executor, "memory_at_hand", lambda device: need(kept) - 1)
    assert "needs about" in refusal(latents, task, speed)
    assert latents(task, "exact").isfinite().all()


def test_refused_before_work(task):
    assert "grid of its own" in refusal(latents, task, "near", steps=20)
    assert "speed is 'quick'" in refusal(latents, task, "quick")
    assert "guided has evaluation 5" in refusal(latents, task, Speed(guided={0, 5}), steps=6)


def test_command_line(setup, capsys):
    assert run({**setup, "--steps": None, "--speed": "fastest"}, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["speed"] == "fastest" and record["times"][0] == 0 and record["times"][-1] == 1
    assert record["steps"] == len(record["times"])
    for changed, message in (
        ({"--speed": "quick", "--steps": None}, "invalid choice: 'quick' (choose from"),
        ({"--speed": "near"}, "has a grid of its own, steps is 4"),
    ):
        assert run({**setup, **changed}) == 2
        assert message in capsys.readouterr().err
