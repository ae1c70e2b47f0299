"""Speeds: their golden cases, what they compute, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from support.checks import refusal
from support.golden import CASES, GOLDEN, relative_error

from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.layout import Shape
from lavin_rt.dit.model import JDiT, randomize_
from lavin_rt.sampling.denoisers import make_network
from lavin_rt.sampling.executor import Executor
from lavin_rt.sampling.sampler import sample
from lavin_rt.sampling.speeds import SPEEDS, Speed


@pytest.fixture(scope="module")
def tiers() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "tiers_cases.safetensors")


@pytest.mark.parametrize("impl", ["plain", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_golden(golden_dit, tiers, name, impl):
    latents = sample(golden_dit("dit_a"), tiers["cond_latents"], tiers["noise"], impl=impl, speed=CASES[name])
    assert relative_error(latents, tiers[name]) <= 1e-4


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def dit() -> JDiT:
    config = DiTConfig(hidden_size=48, depth=2, num_heads=2, kv_group=2)
    return randomize_(JDiT(config)).eval().requires_grad_(False)


FORMS = [
    Speed(evaluations=4, refresh={0, 2}, guided={0, 1}),
    Speed(evaluations=3, refresh="task"),
    Speed(evaluations=3, refresh="task", guided={0, 2}),
    Speed(times=(0, 0.1, 0.5, 1), refresh={0}),
]


@pytest.mark.parametrize("speed", FORMS, ids=lambda speed: speed.name)
@pytest.mark.parametrize(("pair_frames", "query_frames"), [(4, 1), (4, 2), (0, 1)])
def test_packed_equals_plain_and_batches_equal_single_runs(dit, speed, pair_frames, query_frames):
    """Clips, several target frames, a context without pairs, with and without guidance."""
    cond = latents(2, 16, pair_frames + query_frames, 4, 6)
    noise = latents(2, 16, query_frames, 4, 6, seed=1)
    for guidance in (1.5, 1.0):
        options = {"speed": speed, "guidance": guidance, "query_frames": query_frames}
        plain, packed = (sample(dit, cond, noise, impl=impl, **options) for impl in ("plain", "torch"))
        assert relative_error(packed, plain) <= 1e-5
        for item in range(2):
            one = slice(item, item + 1)
            assert relative_error(packed[one], sample(dit, cond[one], noise[one], impl="torch", **options)) <= 1e-5


def test_every_context_refreshed_and_every_null_run_is_the_exact_run(dit):
    cond, noise = latents(1, 16, 3, 4, 6), latents(1, 16, 1, 4, 6, seed=1)
    everything = set(range(5))
    exact = sample(dit, cond, noise, steps=6, impl="torch")
    assert torch.equal(sample(dit, cond, noise, steps=6, impl="torch", speed=Speed(guided=everything)), exact)
    kept = sample(dit, cond, noise, steps=6, impl="torch", speed=Speed(refresh=everything, guided=everything))
    assert relative_error(kept, exact) <= 1e-6


@pytest.mark.slow  # four compilations
def test_compiled_equals_eager():
    dit = randomize_(JDiT(DiTConfig(hidden_size=48, depth=1, num_heads=2, kv_group=2))).eval().requires_grad_(False)
    cond, noise = latents(1, 16, 3, 4, 4), latents(1, 16, 1, 4, 4, seed=1)
    eager, compiled = (sample(dit, cond, noise, impl="torch", compile=c, speed=FORMS[0]) for c in (False, True))
    assert relative_error(compiled, eager) <= 1e-5


def test_requests_leave_no_trace_in_one_another(dit):
    """Contexts, speeds and sizes in turn on one executor: every answer is that of an executor of its own."""
    network = make_network(dit, "torch")
    shared = Executor(network)
    for request in range(12):
        speed = (*FORMS, Speed(), Speed(guided={0, 3}))[request % 6]
        grid = ((4, 6), (6, 4))[request % 2]
        shape = Shape(1, 3, 1, 1, *grid, guided=request % 5 != 4, kept=speed.keeps)
        answers = []
        for executor in (shared, Executor(network)):
            context = executor.embed(latents(1, 16, 2, *grid, seed=request % 3))
            query = executor.embed(latents(1, 16, 1, *grid, seed=10 + request))
            knots = speed.knots(None if speed.owns_grid else 6)
            keys = executor.context_keys(Shape(1, 3, 1, 1, *grid, False, True), context) if speed.keeps else None
            noise = latents(1, 16, 1, *grid, seed=20)
            answers.append(executor.sample(shape, context, query, noise, knots, 1.5, None, speed, keys))
        assert torch.equal(*answers), (request, speed.name)


def test_one_task_s_keys_serve_a_batch(dit):
    executor, speed = Executor(make_network(dit, "torch")), Speed(evaluations=3, refresh="task", guided={0})
    context, queries = executor.embed(latents(1, 16, 2, 4, 6)), executor.embed(latents(2, 16, 1, 4, 6, seed=3))
    keys = executor.context_keys(Shape(1, 3, 1, 1, 4, 6, False, True), context)
    noise, knots = latents(2, 16, 1, 4, 6, seed=4), speed.knots()
    shape = Shape(2, 3, 1, 1, 4, 6, guided=True, kept=True)
    together = executor.sample(shape, context, queries, noise, knots, 1.5, None, speed, keys)
    for item in range(2):
        one, alone = slice(item, item + 1), dataclasses.replace(shape, queries=1)
        single = executor.sample(alone, context, queries[one], noise[one], knots, 1.5, None, speed, keys)
        assert relative_error(together[one], single) <= 1e-5
    for wrong in (
        None,
        keys[:-1],
        executor.context_keys(Shape(1, 3, 1, 1, 6, 6, False, True), context[:, :0].new_zeros(1, 18, 48)),
    ):
        message = refusal(executor.sample, shape, context, queries, noise, knots, 1.5, None, speed, wrong)
        assert "keys and values from the task" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evaluations": 0}, "evaluations is 0; expected a whole number from 1"),
        ({"evaluations": 4.0}, "evaluations is 4.0"),
        ({"evaluations": True}, "evaluations is True"),
        ({"evaluations": 4, "times": (0, 1)}, "expected one of them"),
        ({"times": (0, 0.5, 0.5, 1)}, "increasing from 0 to 1"),
        ({"times": (0, float("nan"), 1)}, "increasing from 0 to 1"),
        ({"times": (0.1, 1)}, "increasing from 0 to 1"),
        ({"times": ("a", 1)}, "increasing from 0 to 1"),
        ({"times": 5}, "increasing from 0 to 1"),
        ({"evaluations": 4, "refresh": {1, 2}}, "refresh is {1, 2}; expected a set of evaluations with 0 in it"),
        ({"evaluations": 4, "refresh": {0, 4}}, "refresh has evaluation 4, the grid has 4: 0 to 3"),
        ({"evaluations": 4, "refresh": "tasks"}, "refresh is 'tasks'"),
        ({"evaluations": 4, "refresh": {0, -1}}, "refresh is"),
        ({"evaluations": 4, "guided": {0, 1.5}}, "guided is"),
        ({"evaluations": 4, "guided": 3}, "guided is 3"),
        ({"evaluations": 4, "guided": "task"}, "guided is 'task'"),
        ({"times": (0, 0.5, 1), "guided": {0, 2}}, "guided has evaluation 2, the grid has 2"),
    ],
)
def test_bad_speeds_are_named(given, message):
    assert message in refusal(Speed, **given)


def test_a_speed_beside_steps(dit):
    cond, noise = latents(1, 16, 3, 4, 6), latents(1, 16, 1, 4, 6, seed=1)
    assert "grid of its own" in refusal(sample, dit, cond, noise, steps=20, speed="near")
    assert "refresh has evaluation 9, the grid has 5" in refusal(
        sample, dit, cond, noise, steps=6, speed=Speed(refresh={0, 9})
    )
    assert "expected one of exact, near, fast, fastest" in refusal(sample, dit, cond, noise, speed="faster")
    assert "speed is 3" in refusal(sample, dit, cond, noise, speed=3)


def test_names():
    assert [SPEEDS[name].name for name in SPEEDS] == list(SPEEDS) == ["exact", "near", "fast", "fastest"]
    assert Speed(evaluations=3, refresh={0, 2}).name == "Speed(evaluations=3, refresh=[0, 2])"
    assert Speed(evaluations=3, refresh=[0, 2]) == Speed(evaluations=3, refresh=(2, 0))
