"""The engine of a service alone: batches, fairness, cancelling, draining, and runs that fail."""

from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra serve")

from support.serving import wait_until

from lavin_rt.errors import InputError, NonFiniteError, TooLittleMemory
from lavin_rt.serve.engine import ServingEngine, Ticket
from lavin_rt.serve.limits import Limits, Refused, public_line


class Runs:
    """Stands in for a pipeline: runs wait for `gate`, and are written down."""

    def __init__(self, evaluations: int = 3):
        self.ran: list[list[int]] = []
        self.gate = threading.Event()
        self.evaluations = evaluations
        self.fail = lambda seeds: None

    def __call__(self, tickets, callback):
        seeds = [ticket.seed for ticket in tickets]
        self.ran.append(seeds)
        assert self.gate.wait(20)
        self.fail(seeds)
        for done in range(1, self.evaluations + 1):
            callback(done, self.evaluations, None)
        return [f"answer {seed}" for seed in seeds]


def ticket(task: str, seed: int, kind: str = "") -> Ticket:
    return Ticket(task, (task, kind), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), seed)


@pytest.fixture
def make():
    engines = []

    def engine(runs, most=lambda kind, count: count, **limits):
        engines.append(ServingEngine(runs, most, Limits(**limits)))
        return engines[-1]

    yield engine
    for one in engines:
        one.stop(1)


def test_waiting_requests_of_one_kind_run_together_and_tasks_take_turns(make):
    runs = Runs()
    engine = make(runs, batch=3, most=lambda kind, count: 2 if kind[0] == "b" else count)
    first = engine.submit(ticket("a", 0))
    wait_until(lambda: runs.ran)
    rest = [engine.submit(ticket("a", seed, "x" if seed == 3 else "")) for seed in range(1, 7)]
    rest += [engine.submit(ticket("b", seed)) for seed in (10, 11, 12)]
    runs.gate.set()
    answers = [one.future.result(20) for one in (first, *rest)]
    # Three at most, two of b, another kind apart, and a's many do not keep b waiting.
    assert runs.ran == [[0], [1, 2, 4], [10, 11], [3], [12], [5, 6]]
    assert [answer.result for answer in answers] == [f"answer {one.seed}" for one in (first, *rest)]
    assert answers[1].batch == 3 and answers[1].evaluations == 3 and all(one.state == "done" for one in rest)


def test_a_full_queue_says_when_to_come_again(make):
    runs = Runs()
    engine = make(runs, queue=2)
    first = engine.submit(ticket("a", 0))
    wait_until(lambda: runs.ran)
    waiting = [engine.submit(ticket("a", seed)) for seed in (1, 2)]
    with pytest.raises(Refused) as refused:
        engine.submit(ticket("b", 3))
    assert refused.value.status == 429 and refused.value.retry_after >= 1
    assert waiting[0].cancel() and not waiting[0].cancel()
    engine.submit(ticket("b", 4))
    runs.gate.set()
    assert first.future.result(20) and waiting[1].future.result(20)
    with pytest.raises(Refused, match="cancelled"):
        waiting[0].future.result(1)
    assert [1] not in runs.ran and engine.waiting == 0


def test_cancelling_one_of_a_batch_leaves_the_others_and_cancelling_all_ends_the_run(make):
    runs = Runs(evaluations=1000)
    engine = make(runs)
    blocker = engine.submit(ticket("z", 0))
    wait_until(lambda: runs.ran)
    one, other, alone = (engine.submit(ticket(task, seed)) for task, seed in (("a", 1), ("a", 2), ("b", 3)))
    runs.fail = lambda seeds: [t.cancel() for t in (one, alone) if t.seed in seeds]  # in mid-run
    runs.gate.set()
    assert blocker.future.result(20) and other.future.result(20).result == "answer 2" and runs.ran[1] == [1, 2]
    for cancelled in (one, alone):
        with pytest.raises(Refused, match="cancelled"):
            cancelled.future.result(20)
    wait_until(lambda: runs.ran[2:] == [[3]] and engine.running == 0)
    assert alone.done == 1 and alone.state == one.state == "cancelled"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (NonFiniteError(2, 3), 500, "NaN"),
        (MemoryError(), 503, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 503, "out of memory"),
        (TooLittleMemory("1 query needs about 9.00 GB, 1.00 GB are free"), 503, "9.00 GB"),
        (InputError("words: 9.00 GB of memory on cuda"), 422, "words"),
        (InputError("something about /secret/place/file.png"), 422, "something about file.png"),
        (KeyError("/secret/place"), 500, "the run failed"),
    ],
)
def test_a_run_that_fails_is_answered_and_the_others_of_its_batch_do_not_suffer(make, error, status, words):
    runs = Runs()
    engine = make(runs)

    def fail(seeds):
        if 1 in seeds:
            raise error

    runs.fail = fail
    blocker = engine.submit(ticket("z", 9))
    wait_until(lambda: runs.ran)
    tickets = [engine.submit(ticket("a", seed)) for seed in (0, 1, 2)]
    runs.gate.set()
    assert blocker.future.result(20)
    assert [tickets[i].future.result(20).result for i in (0, 2)] == ["answer 0", "answer 2"]
    with pytest.raises(Refused, match=words) as refused:
        tickets[1].future.result(20)
    assert refused.value.status == status and "/secret" not in str(refused.value)
    assert engine.submit(ticket("a", 7)).future.result(20)


def test_draining_finishes_what_runs_and_refuses_the_rest(make):
    runs = Runs()
    engine = make(runs)
    first = engine.submit(ticket("a", 0))
    wait_until(lambda: runs.ran)
    waiting, chore = engine.submit(ticket("a", 1)), engine.call(lambda: 1)
    engine.drain()
    for future in (waiting.future, chore):
        with pytest.raises(Refused, match="shutting down"):
            future.result(1)
    with pytest.raises(Refused) as refused:
        engine.submit(ticket("a", 2))
    assert refused.value.status == 503 and not engine.accepting
    threading.Timer(0.2, runs.gate.set).start()
    assert engine.stop(20) and first.future.result(1).result == "answer 0"


def test_a_run_that_outlasts_the_grace_is_told_so(make):
    runs = Runs(evaluations=10**9)
    runs.gate.set()
    engine = make(runs)
    long = engine.submit(ticket("a", 0))
    wait_until(lambda: long.state == "running")
    assert not engine.stop(0.1)
    with pytest.raises(Refused, match="shutting down"):
        long.future.result(1)


def test_other_work_has_its_turn_and_its_errors(make):
    runs = Runs()
    runs.gate.set()
    engine = make(runs)
    assert engine.call(lambda: 5).result(20) == 5
    with pytest.raises(Refused, match="found 1, expected 2"):
        engine.call(lambda: (_ for _ in ()).throw(InputError("found 1, expected 2"))).result(20)


def test_messages_lose_the_folders_of_this_machine():
    assert public_line("a\n /home/me/x/y.png: bad, see https://host/a/b") == "a y.png: bad, see https://host/a/b"
    assert public_line("384x640, 1/2 and PNG/JPEG") == "384x640, 1/2 and PNG/JPEG"
