"""A task as a session: what is made once, and what many queries, threads and faults leave of it."""

from __future__ import annotations

import pickle
import threading

import pytest
import torch
from support.golden import GOLDEN
from test_pipeline import picture

import lavin_rt.sampling.executor
from lavin_rt.checkpoint.load import load_dit, load_vae, save_dit
from lavin_rt.errors import InputError, NonFiniteError
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.executor import Executor
from lavin_rt.task import Task

SIZE = (32, 48)


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(load_dit(GOLDEN / "dit_c.safetensors", dtype=torch.float32), load_vae(GOLDEN / "stvae.pt"))


@pytest.fixture
def task(pipe) -> Task:
    return pipe.task([(picture(2 * i), picture(2 * i + 1)) for i in range(2)], size=SIZE)


def latents(task: Task, seed: int, **options) -> torch.Tensor:
    return task.run([picture(seed)], **{"steps": 4, **options})[0].latents


def test_a_context_is_encoded_and_embedded_once(pipe, task, monkeypatch):
    encoded, embedded = [], []
    encode, embed = pipe.encode, pipe.executor.embed
    monkeypatch.setattr(pipe, "encode", lambda clips, *more: encoded.append(len(clips)) or encode(clips, *more))
    monkeypatch.setattr(pipe.executor, "embed", lambda given: embedded.append(given.shape[2]) or embed(given))
    for seed in range(3):
        latents(task, seed)
    assert encoded == [1, 1, 1]  # the queries alone
    assert sorted(embedded) == [1, 1, 1, 4]


def test_an_encoded_context_answers_like_the_pictures(pipe, task, tmp_path):
    task.context.save(tmp_path / "task.safetensors")
    again = pipe.task(tmp_path / "task.safetensors", size=SIZE)
    assert torch.equal(latents(again, 5), latents(task, 5))


def test_tasks_of_one_pipeline_do_not_mix(pipe, task):
    other = pipe.task([(picture(20), picture(21)), (picture(22), picture(23))], size=SIZE)
    one, two = latents(task, 5), latents(other, 5)
    assert not torch.equal(one, two)
    assert torch.equal(latents(task, 5), one) and torch.equal(latents(other, 5), two)


def test_threads_on_one_task(task):
    expected = {seed: latents(task, seed) for seed in range(4)}
    answers: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda s=seed: answers.update({s: latents(task, s)})) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(answers[seed], expected[seed]) for seed in expected)


def test_nan_weights_name_the_step_and_the_next_task_works(tmp_path):
    dit, vae = load_dit(GOLDEN / "dit_c.safetensors", dtype=torch.float32), load_vae(GOLDEN / "stvae.pt")
    sound = Pipeline(dit, vae).task([(picture(0), picture(1))], size=SIZE)
    expected = latents(sound, 5)
    dit.head.linear.weight[3, 5] = float("nan")
    save_dit(dit, tmp_path / "broken.safetensors")
    broken = Pipeline(load_dit(tmp_path / "broken.safetensors"), vae).task([(picture(0), picture(1))], size=SIZE)
    with pytest.raises(NonFiniteError, match="step 1 of 3"):
        latents(broken, 5)
    sound = Pipeline(load_dit(GOLDEN / "dit_c.safetensors", dtype=torch.float32), vae)
    assert torch.equal(latents(sound.task([(picture(0), picture(1))], size=SIZE), 5), expected)


def test_pixels_that_are_nan_are_no_picture():
    dit, vae = load_dit(GOLDEN / "dit_c.safetensors", dtype=torch.float32), load_vae(GOLDEN / "stvae.pt")
    list(vae.decoder.parameters())[-1].data.fill_(float("nan"))
    task = Pipeline(dit, vae).task([(picture(0), picture(1))], size=SIZE)
    with pytest.raises(NonFiniteError, match="the decoder's pixels are NaN or infinite; check the weights"):
        latents(task, 5)


@pytest.mark.parametrize("error", [NonFiniteError(3, 19), NonFiniteError()])
def test_an_error_of_numbers_comes_through_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.step, again.evaluations) == (str(error), error.step, error.evaluations)


def test_batches_are_sized_to_the_memory_at_hand(pipe, task, monkeypatch):
    queries = [picture(seed) for seed in range(4)]
    expected = task.run(queries, steps=4, batch_size=4)
    pipe.executor.release()
    need = pipe.network.workspace(task._shape(3, 1.5))
    monkeypatch.setattr(lavin_rt.sampling.executor, "memory_at_hand", lambda device: need)
    assert task.batch_size(4) == 3
    with pytest.raises(InputError, match=r"4 queries at once .* batch size 3 would fit"):
        task.run(queries, steps=4, batch_size=4)
    for smaller, whole in zip(task.run(queries, steps=4), expected, strict=True):
        assert torch.allclose(smaller.latents, whole.latents, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(lavin_rt.sampling.executor, "memory_at_hand", lambda device: 1000)
    pipe.executor.release()
    with pytest.raises(InputError, match="1 query at 32x48 with 2 pairs needs about"):
        latents(task, 5)
    with pytest.raises(InputError, match="at 64x96 with 1 pair needs about"):
        pipe.task([(picture(0), picture(1))], size=(64, 96))
    monkeypatch.undo()
    assert torch.allclose(latents(task, 0), expected[0].latents, rtol=1e-4, atol=1e-5)


def test_warmup_prepares_and_changes_nothing(pipe, task):
    assert task.warmup(steps=4) > 0
    assert len(pipe.executor._plans) == 1
    expected = latents(task, 5)
    task.warmup(steps=6, queries=2, guidance=1.0)
    assert torch.equal(latents(task, 5), expected)
    with pytest.raises(InputError, match="guidance is nan"):
        task.warmup(guidance=float("nan"))


def test_a_remainder_runs_in_the_shape_of_the_batches_before(pipe, task, monkeypatch):
    """Where shapes are captured or compiled; what fills it up is seen nowhere."""
    queries, seen = [picture(seed) for seed in range(3)], []
    expected = task.run(queries, steps=4, batch_size=2)
    assert len(pipe.executor._plans) == 2
    pipe.executor.release()
    monkeypatch.setattr(Executor, "settles_shapes", True)
    results = task.run(
        queries, steps=4, batch_size=2, callback=lambda done, evaluations, state: seen.append(len(state))
    )
    assert len(pipe.executor._plans) == 1 and seen == [2, 2, 2, 1, 1, 1]
    for result, alone in zip(results, expected, strict=True):
        assert result.seed == alone.seed
        assert torch.allclose(result.latents, alone.latents, rtol=1e-4, atol=1e-5)
    task.run(queries[:1], steps=4)
    task.run(queries, steps=4, batch_size=2)
    assert len(pipe.executor._plans) == 2  # what is there is used
