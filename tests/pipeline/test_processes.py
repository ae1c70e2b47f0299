"""Workers, forked with a pipeline that was used or spawned with one that is pickled: an answer, no endless wait."""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import threading
import warnings

import numpy as np
import pytest
import torch

import lavin_rt
from lavin_rt.errors import InputError
from lavin_rt.sampling.turns import Turns

SECONDS = 120


def picture() -> np.ndarray:
    return np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3))


def answer(task: lavin_rt.Task | None, results) -> None:
    """What a worker does."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        task = task or lavin_rt.Pipeline.from_pretrained().task("depth", pairs=1)
        latents = task.run([picture()], steps=4, seed=1)[0].latents.numpy()
        task.run([picture()], steps=4, seed=1)
    results.put((latents, torch.get_num_threads(), [str(one.message) for one in said]))


def of_worker(kind: str, task: lavin_rt.Task | None) -> tuple[np.ndarray, int, list[str]]:
    context = multiprocessing.get_context(kind)
    results = context.Queue()
    worker = context.Process(target=answer, args=(task, results))
    worker.start()
    try:
        return results.get(timeout=SECONDS)
    except queue.Empty:
        pytest.fail(f"the worker still waits after {SECONDS} s, or ended with {worker.exitcode}")
    finally:
        worker.kill()
        worker.join()


@pytest.fixture
def task():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    task = lavin_rt.Pipeline.from_pretrained().task("depth", pairs=1)
    task.run([picture()], steps=4, seed=1)
    yield task
    torch.set_num_threads(before)


def test_a_forked_worker_answers_on_one_thread_and_says_so_once(task):
    plain = task.run([picture()], steps=4, seed=1)[0].latents.numpy()
    for given in (task, None):  # the parent's pipeline, one of its own
        latents, threads, said = of_worker("fork", given)
        np.testing.assert_allclose(latents, plain, rtol=1e-4, atol=1e-5)
        assert threads == 1 and len(said) == 1 and "forked" in said[0] and "spawn" in said[0]
    assert torch.get_num_threads() == 2


def test_a_fork_while_another_thread_samples(task):
    plain, stop = task.run([picture()], steps=4, seed=1)[0].latents.numpy(), threading.Event()

    def sample() -> None:
        while not stop.is_set():
            task.run([picture()], steps=20, seed=2)

    other = threading.Thread(target=sample)
    other.start()
    try:
        latents, *_ = of_worker("fork", task)
    finally:
        stop.set()
        other.join()
    np.testing.assert_allclose(latents, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spawn", "forkserver"])
def test_a_spawned_worker_loads_its_own(task, kind):
    plain = task.run([picture()], steps=4, seed=1)[0].latents.numpy()
    latents, _, said = of_worker(kind, task)
    np.testing.assert_allclose(latents, plain, rtol=1e-4, atol=1e-5)
    assert said == []


def test_what_cannot_run_behind_a_fork_says_so(task, monkeypatch):
    turns = Turns(task.engine.network)
    assert not turns.inherited
    turns._process -= 1
    assert turns.inherited and not turns.behind_fork().inherited
    monkeypatch.setattr(task.engine.network, "forkable", False, raising=False)
    with pytest.raises(InputError, match="make it in the worker, or start workers with the method"):
        turns.behind_fork()


def test_a_pickled_pipeline_is_where_it_was_loaded_from(task, tmp_path, monkeypatch):
    pipe = task.engine
    pipe.tile = 4
    content = pickle.dumps(task)
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(content)
    assert len(content) < 200_000  # the pairs' pictures and latents, no weights
    assert again.engine.source == "lavin-mini" and again.engine.tile == 4 and again.engine.impl == pipe.impl
    found, plain = (one.run([picture()], steps=4, seed=1)[0] for one in (again, task))
    assert torch.equal(found.frames, plain.frames)
    assert again.context.vae_fingerprint == task.context.vae_fingerprint


def test_weights_that_changed_are_not_silently_others(task):
    with torch.no_grad():
        task.engine.dit.prompt_embed.add_(1)
    with pytest.raises(InputError, match="save_dit"):
        pickle.dumps(task)


def test_a_pipeline_of_networks_in_memory_cannot_be_pickled(task):
    pipe = lavin_rt.Pipeline(task.engine.dit, task.engine.vae)
    with pytest.raises(InputError, match="cannot be pickled"):
        pickle.dumps(pipe)
