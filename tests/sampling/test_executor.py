"""The executor: buffers and captured steps reused through changing contexts, schedules and sizes, and its faults."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref

import pytest
import torch

import lavin_rt.sampling.executor
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.layout import Shape
from lavin_rt.dit.model import JDiT, randomize_
from lavin_rt.errors import Cancelled, InputError, NonFiniteError
from lavin_rt.sampling.denoisers import PackedNetwork, make_network
from lavin_rt.sampling.executor import EVALUATIONS, Executor
from lavin_rt.sampling.schedule import schedule

SMALL = Shape(
    queries=1, cond_frames=3, query_frames=1, target_frames=1, height=4, width=6, guided=True
)  # one pair, 32 x 48 pixels
LARGE = Shape(queries=2, cond_frames=5, query_frames=1, target_frames=1, height=6, width=4, guided=True)
ALONE = Shape(queries=1, cond_frames=3, query_frames=1, target_frames=1, height=4, width=6, guided=False)


def random_latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def dit() -> JDiT:
    config = DiTConfig(hidden_size=144, depth=2, num_heads=2, kv_group=2)
    return randomize_(JDiT(config)).eval().requires_grad_(False)


class Recording(Executor):
    """Captures as a CUDA graph does, in that the recorded step is run again without being built again."""

    fail: list[BaseException]

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.graphs, self.fail = True, []

    def _capture(self, advance):
        advance()
        if self.fail:
            raise self.fail.pop(0)
        self.captures += 1

        return advance


def answer(executor: Executor, shape: Shape = SMALL, context: int = 0, steps: int = 6, guidance: float = 1.5, **more):
    frames, batch = shape.cond_frames - shape.query_frames, shape.queries
    grid = (shape.height, shape.width)
    return executor.sample(
        shape,
        executor.embed(random_latents(1, 16, frames, *grid, seed=context)),
        executor.embed(random_latents(batch, 16, 1, *grid, seed=100)),
        more.pop("noise", random_latents(batch, 16, 1, *grid, seed=200)),
        more.pop("knots", schedule(steps)),
        guidance,
        **more,
    )


REQUESTS = [
    {"context": 0},
    {"context": 1},
    {"context": 0},
    {"steps": 8},
    {"shape": LARGE},
    {"guidance": 3.0},
    {"shape": ALONE, "guidance": 1.0},
    {"shape": LARGE, "steps": 8, "context": 2},
    {},
]


@pytest.mark.parametrize("impl", ["plain", "torch"])
def test_reused_buffers_leave_no_trace(dit, impl):
    """Contexts A, B, A, two schedules, three shapes: every answer is that of an executor that has done nothing else."""
    executor = Executor(make_network(dit, impl))
    for request in REQUESTS:
        assert torch.equal(answer(executor, **request), answer(Executor(make_network(dit, impl)), **request)), request


def test_one_capture_serves_every_request_of_a_shape(dit):
    executor, plain = Recording(make_network(dit, "torch")), Executor(make_network(dit, "torch"))
    evaluations = 0
    for request in REQUESTS:
        assert torch.equal(answer(executor, **request), answer(plain, **request)), request
        evaluations += request.get("steps", 6) - 1
    assert executor.captures == 3 and executor.replays == evaluations


def test_a_longer_schedule_makes_the_buffers_grow_once(dit):
    executor = Recording(make_network(dit, "torch"))
    steps = EVALUATIONS + 5
    for _ in range(2):
        assert torch.equal(answer(executor, steps=steps), answer(Executor(executor.network), steps=steps))
        assert torch.equal(answer(executor), answer(Executor(executor.network)))
    assert executor.captures == 1
    shorter_first = Recording(executor.network)
    answer(shorter_first), answer(shorter_first, steps=steps), answer(shorter_first)
    assert shorter_first.captures == 2


def test_shapes_unused_for_longest_are_let_go(dit):
    executor = Recording(make_network(dit, "torch"), shapes=2)
    for request in ({}, {"shape": LARGE}, {}, {"shape": ALONE}, {}):
        answer(executor, **request)
    assert executor.captures == 3
    answer(executor, shape=LARGE)
    assert executor.captures == 4
    with pytest.raises(InputError, match="shapes is 0"):
        Executor(executor.network, shapes=0)


def test_out_of_memory_during_capture(dit):
    """Other shapes make room first; where that does not help, the error says what was asked and the next run works."""
    executor = Recording(make_network(dit, "torch"))
    expected = answer(Executor(executor.network))
    answer(executor, shape=LARGE)
    executor.fail = [torch.OutOfMemoryError("CUDA out of memory")]
    assert torch.equal(answer(executor), expected)

    def broken_capture() -> RuntimeError:
        error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
        error.__context__ = torch.OutOfMemoryError("CUDA out of memory")
        return error

    executor.fail = [broken_capture(), broken_capture()]
    with pytest.raises(InputError, match=r"2 queries .* needs more than about .* would fit") as error:
        answer(executor, shape=LARGE)
    assert "\n" not in str(error.value)
    assert torch.equal(answer(executor), expected)
    executor.fail = [broken_capture(), broken_capture()]
    with pytest.raises(InputError, match="would fit"):
        executor.prepare(LARGE, schedule(6))
    assert torch.equal(answer(executor), expected)
    executor.fail = [RuntimeError("something else")]
    with pytest.raises(RuntimeError, match="something else"):
        answer(executor, shape=ALONE, guidance=1.0)
    assert torch.equal(answer(executor), expected)


def test_too_little_memory_names_what_fits(dit, monkeypatch):
    executor = Executor(make_network(dit, "torch"))
    need = executor.network.workspace
    wide = Shape(queries=4, cond_frames=5, query_frames=1, target_frames=1, height=32, width=64, guided=True)
    for room, fits in (
        (need(wide) - 1, "batch size 3 would fit"),
        (need(wide) // 4 - 1, "one query at size 240x480 would fit"),
        (10, "free some"),
    ):
        monkeypatch.setattr(lavin_rt.sampling.executor, "memory_at_hand", lambda device, room=room: room)
        with pytest.raises(InputError, match=fits):
            executor.check_memory(wide)
        with pytest.raises(InputError, match=fits):
            answer(executor, shape=wide)
    monkeypatch.setattr(lavin_rt.sampling.executor, "memory_at_hand", lambda device: need(wide) // 2)
    assert executor.most_queries(wide) == 2


def test_interrupt_and_cancel_leave_the_executor_usable(dit):
    executor = Executor(make_network(dit, "torch"))
    expected = answer(executor)
    for exception in (KeyboardInterrupt, Cancelled):

        def stop(done, evaluations, latents, exception=exception):
            if done == 3:
                raise exception

        with pytest.raises(exception):
            answer(executor, context=5, callback=stop)
        assert torch.equal(answer(executor), expected)


def test_nan_in_the_weights_names_the_step(dit):
    config = dit.config
    broken = randomize_(JDiT(config)).eval().requires_grad_(False)
    broken.head.linear.bias[0] = float("nan")
    executor = Executor(make_network(broken, "torch"))
    with pytest.raises(NonFiniteError, match="step 1 of 5"):
        answer(executor)
    broken.head.linear.bias[0] = 0.0
    assert answer(executor).isfinite().all()


def test_one_executor_serves_inside_and_outside_inference_mode(dit):
    """Buffers, tables and embedded frames made in inference mode would refuse to be written outside of it."""
    expected = answer(Executor(make_network(dit, "torch")))
    for impl, modes in (
        ("torch", (True, False, True, False)),
        ("torch", (False, True, False)),
        ("plain", (True, False)),
    ):
        executor = Executor(make_network(dit, impl))
        for mode in modes:
            with torch.inference_mode(mode):
                result = answer(executor)
            assert not result.is_inference() and not executor.embed(random_latents(1, 16, 1, 4, 6)).is_inference()
            assert impl == "plain" or torch.equal(result, expected)


def test_threads_are_served_in_turn(dit):
    executor = Executor(make_network(dit, "torch"))
    expected = [answer(executor, **request) for request in REQUESTS]
    wrong = []

    def work():
        for request, result in zip(REQUESTS, expected, strict=True):
            if not torch.equal(answer(executor, **request), result):
                wrong.append(request)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_callback_may_not_ask_for_another_run(dit):
    executor = Executor(make_network(dit, "torch"))
    with pytest.raises(InputError, match="callback"):
        answer(executor, callback=lambda *step: answer(executor))
    assert answer(executor).isfinite().all()


def test_memory_does_not_grow_with_runs(dit):
    """Bytes held by live tensors after 200 runs are those after 5, with shapes and schedules changing."""
    executor = Recording(make_network(dit, "torch"), shapes=2)

    def held_after(runs: int) -> int:
        for run in range(runs):
            answer(executor, shape=(SMALL, LARGE, ALONE)[run % 3], steps=(4, 6)[run % 2], context=run)
        gc.collect()
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu"  # other tests leave fake ones behind
        }
        return sum(storages.values())

    after_few = held_after(5)
    assert held_after(195) <= after_few


def test_the_schedule_of_before_is_not_tabulated_again(dit, monkeypatch):
    network = make_network(dit, "torch")
    made = []
    table = network.table
    monkeypatch.setattr(network, "table", lambda knots: made.append(len(knots)) or table(knots))
    executor = Executor(network)
    for steps in (6, 8, 6, 8, 6):
        answer(executor, steps=steps)
    assert made == [6, 8]
    for steps in (10, 12, 14, 6):
        answer(executor, steps=steps)
    assert made == [6, 8, 10, 12, 14]


def test_memory_is_counted_without_what_failed(dit, monkeypatch):
    """Where sampling runs out of memory, the message counts the failed run's buffers, and the graph's, as free."""
    executor = Recording(make_network(dit, "torch"))
    expected = answer(executor)
    [plan] = executor._plans.values()

    def refused() -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    [form] = plan.advances
    plan.advances[form] = refused
    buffers = [weakref.ref(tensor) for tensor in (plan.latents, *plan.condition)]
    del plan, refused
    alive = []
    counted = lavin_rt.sampling.executor.memory_at_hand
    monkeypatch.setattr(
        lavin_rt.sampling.executor,
        "memory_at_hand",
        lambda d: alive.append(sum(b() is not None for b in buffers)) or counted(d),
    )
    with pytest.raises(InputError, match="would fit"):
        answer(executor)
    assert alive and not any(alive)
    assert torch.equal(answer(executor), expected)


def test_prepare_leaves_nothing_to_do(dit):
    executor = Recording(make_network(dit, "torch"))
    executor.prepare(SMALL, schedule(6))
    assert executor.captures == 1
    expected = answer(Executor(executor.network))
    assert torch.equal(answer(executor), expected) and executor.captures == 1


def test_what_is_let_go_frees_its_memory_at_once(dit):
    """No reference cycle holds a plan's buffers until the next garbage collection."""
    executor = Executor(make_network(dit, "torch"))
    answer(executor)
    [plan] = executor._plans.values()
    buffers = weakref.ref(plan.latents)
    del plan
    gc.disable()
    try:
        executor.release()
        assert buffers() is None
        alone = weakref.ref(executor)
        del executor
        assert alone() is None
    finally:
        gc.enable()


class OneAtATime(PackedNetwork):
    def check(self, shape: Shape) -> None:
        if shape.queries > 1:
            raise InputError("one query at a time")


def test_batches_are_sized_to_what_the_network_takes(dit):
    assert Executor(OneAtATime(dit, "torch")).most_queries(dataclasses.replace(SMALL, queries=4)) == 1
