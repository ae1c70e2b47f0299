"""CUDA graphs on a GPU: the same bits with and without, memory, and faults."""

from __future__ import annotations

import pytest
import torch
from support.golden import case_names, golden_cases, relative_error
from test_executor import LARGE, REQUESTS, SMALL, answer

import lavin_rt.sampling.executor
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.layout import Shape
from lavin_rt.dit.model import JDiT, randomize_
from lavin_rt.errors import InputError, NonFiniteError
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.capture import CaptureError, Graphs
from lavin_rt.sampling.denoisers import make_network
from lavin_rt.sampling.executor import Executor
from lavin_rt.sampling.schedule import schedule
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.model import STVAE

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32])
def dit(request) -> JDiT:
    config = DiTConfig(hidden_size=144, depth=3, num_heads=2, kv_group=2)
    return randomize_(JDiT(config)).eval().requires_grad_(False).to("cuda", request.param)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_graphs_change_no_bit(dit, impl):
    network = make_network(dit, impl)
    captured, eager = Executor(network), Executor(network, graphs=False)
    evaluations = 0
    for request in REQUESTS:
        assert torch.equal(answer(captured, **request), answer(eager, **request)), request
        evaluations += request.get("steps", 6) - 1
    assert captured.captures == 3 and captured.replays == evaluations
    assert eager.captures == eager.replays == 0


@pytest.mark.parametrize(("name", "case"), case_names(["dit_a", "dit_b", "dit_c"], "sample"))
def test_golden_samples_through_graphs(golden_dit, name, case):
    case, dit = golden_cases(name)[case], golden_dit(name)
    dit.to("cuda")
    try:
        executor = Executor(make_network(dit))
        cond, noise = case["cond_latents"], case["noise"]
        batch, _, frames, height, width = cond.shape
        guidance = float(case["cfg_scale"])
        shape = Shape(batch, frames, 1, noise.shape[2], height, width, guidance != 1.0)
        latents = executor.sample(
            shape,
            executor.embed(cond[:, :, :-1]),
            executor.embed(cond[:, :, -1:]),
            noise,
            schedule(int(case["num_steps"])),
            guidance,
        )
    finally:
        dit.to("cpu")
    assert executor.replays == int(case["num_steps"]) - 1
    assert relative_error(latents.cpu(), case["latents"]) <= 1e-4


def test_nan_names_its_step_without_a_callback(dit):
    executor = Executor(make_network(dit))
    expected = answer(executor)
    noise = torch.full((1, 16, 1, SMALL.height, SMALL.width), float("nan"))
    with pytest.raises(NonFiniteError, match="step 1 of 5"):
        answer(executor, noise=noise)
    assert torch.equal(answer(executor), expected)


def test_memory_does_not_grow_with_runs(dit):
    executor = Executor(make_network(dit))
    for run in range(8):  # the tables of both schedules are kept
        answer(executor, shape=(SMALL, LARGE)[run % 2], steps=(4, 6)[run % 2])
    after_few = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for run in range(195):
        answer(executor, shape=(SMALL, LARGE)[run % 2], context=run, steps=(4, 6)[run % 2])
    assert torch.cuda.memory_allocated() <= after_few[0] and torch.cuda.memory_reserved() <= after_few[1]


def test_memory_does_not_grow_with_captures(dit):
    executor = Executor(make_network(dit), shapes=1)
    for run in range(4):
        answer(executor, shape=(SMALL, LARGE)[run % 2])
    after_few = torch.cuda.memory_reserved()
    for run in range(40):
        answer(executor, shape=(SMALL, LARGE)[run % 2])
    assert executor.captures == 44 and torch.cuda.memory_reserved() <= after_few


@pytest.mark.parametrize("counted", [True, False])
def test_out_of_memory_is_one_clear_error(dit, counted, monkeypatch):
    """The allocator is held to what it has: refused before anything is tried, or, where memory was counted wrongly,
    by the allocator in the middle of a step.
    """
    executor = Executor(make_network(dit))
    expected = answer(executor)
    large = Shape(queries=4, cond_frames=9, query_frames=1, target_frames=1, height=128, width=128, guided=True)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
    if not counted:
        monkeypatch.setattr(lavin_rt.sampling.executor, "memory_at_hand", lambda device: 10**12)
    try:
        with pytest.raises(InputError, match="needs about" if counted else "needs more than about"):
            answer(executor, shape=large)
        assert torch.equal(answer(executor), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_results_stay_right_through_more_shapes_than_are_kept(dit):
    """Twelve shapes of which eight are kept, twice over: no graph reads memory that another one's end has freed."""
    network = make_network(dit)
    captured, eager = Executor(network), Executor(network, graphs=False)
    shapes = [Shape(1 + width % 2, 3, 1, 1, 4, 2 * width, True) for width in range(2, 14)]
    for shape in [*shapes, *shapes[::-1], *shapes]:
        assert torch.equal(answer(captured, shape=shape), answer(eager, shape=shape)), shape
        assert torch.equal(answer(captured, shape=shapes[0]), answer(eager, shape=shapes[0]))
    assert captured.captures > 12 and captured.replays


def test_a_capture_that_fails_leaves_the_thread_usable(dit):
    graphs, buffer, stream = Graphs(), torch.zeros(8, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(CaptureError, match="captur"):
        graphs.capture(lambda: buffer.add_(1).sum().item())
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    assert torch.randn(4, device="cuda").isfinite().all()
    buffer.zero_()
    replay = graphs.capture(lambda: buffer.add_(1))
    replay(), replay()
    assert buffer.tolist() == [2.0] * 8
    executor = Executor(make_network(dit))
    assert torch.equal(answer(executor), answer(Executor(make_network(dit), graphs=False)))
    assert executor.captures == 1


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_autoencoder_is_replayed_to_the_same_bits(dit, impl):
    vae = STVAE(VAEConfig()).requires_grad_(False).to("cuda", dit.dtype)
    captured, eager = (Pipeline(dit, vae, impl=impl, graphs=graphs) for graphs in (True, False))
    captured.executor.prepare(SMALL, schedule(4))
    clips, latents = list(torch.rand(3, 1, 3, 1, 64, 64)), torch.randn(4, 1, 16, 1, 8, 8)
    for one in latents:
        assert torch.equal(captured.decode(one), eager.decode(one))
    for _ in range(3):
        assert all(map(torch.equal, captured.encode(clips), eager.encode(clips)))
    assert len(captured.executor._replays._kept) == 2
    assert all(kept.replay is not None for kept in captured.executor._replays._kept.values())
