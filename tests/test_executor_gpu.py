"""CUDA graphs on a GPU: the same bits with and without, memory, and faults."""

from __future__ import annotations

import pytest
import torch
from conftest import case_names, golden_cases, relative_error
from test_executor import LARGE, REQUESTS, SMALL, answer

from lavin_rt.config import DiTConfig
from lavin_rt.errors import InputError, NonFiniteError
from lavin_rt.executor import Executor
from lavin_rt.knots import schedule
from lavin_rt.layout import Shape
from lavin_rt.model import JDiT, randomize_
from lavin_rt.networks import make_network

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
    for run in range(5):  # both schedules' tables are kept
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


def test_out_of_memory_is_one_clear_error(dit):
    """The allocator is held to what it has, so that the capture of a large shape fails inside."""
    executor = Executor(make_network(dit))
    expected = answer(executor)
    large = Shape(queries=4, cond_frames=9, query_frames=1, target_frames=1, height=128, width=128, guided=True)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
    try:
        with pytest.raises(InputError, match=r"needs (more than )?about"):
            answer(executor, shape=large)
        assert torch.equal(answer(executor), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
