"""The golden cases through the kernels: the smallest under Triton's interpreter, all of them on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from support.golden import CASES as SPEEDS_OF_CASES
from support.golden import DITS, GOLDEN, case_names, golden_cases, packed_forward, relative_error
from support.kernel_checks import DEVICE, INTERPRETED, kernel_test, launches, run_under_interpreter

from lavin_rt.dit.model import JDiT
from lavin_rt.sampling.sampler import sample

SMALLEST = [("dit_a", "forward2"), ("dit_c", "forward0"), ("dit_b", "forward1")]


@contextlib.contextmanager
def on_device(dit: JDiT) -> Iterator[None]:
    """Moves a shared model to `DEVICE`, and back."""
    dit.to(DEVICE)
    try:
        yield
    finally:
        dit.to("cpu")


@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(marker):
    if not INTERPRETED:
        run_under_interpreter(__file__, marker)


@kernel_test
@pytest.mark.parametrize(("name", "case"), SMALLEST if INTERPRETED else case_names(DITS, "forward"))
def test_forward(golden_dit, name, case):
    dit = golden_dit(name)
    case = {key: value.to(DEVICE) for key, value in golden_cases(name)[case].items()}
    with launches() as counted, on_device(dit):
        velocity = packed_forward(dit, case, impl="triton")
    passes, depth = len(case["t"]), dit.config.depth
    kernels = ("joint_attention_kernel", "_qk_norm_rope_kernel", "_swiglu_kernel")
    assert [counted[kernel] for kernel in kernels] == 3 * [passes * depth]
    assert counted["_gated_residual_ada_rms_norm_kernel"] == 2 * passes * depth
    assert counted["_ada_rms_norm_kernel"] == passes and sum(counted.values()) == passes * (5 * depth + 1)
    assert relative_error(velocity, case["velocity"]) <= 1e-5


@pytest.mark.slow
@kernel_test
@pytest.mark.skipif(INTERPRETED, reason="minutes under the interpreter, where a speed's sampling runs the same kernels")
@pytest.mark.parametrize(("name", "case"), case_names(DITS, "sample"))
def test_sample(golden_dit, name, case):
    dit = golden_dit(name)
    case = {key: value.to(DEVICE) for key, value in golden_cases(name)[case].items()}
    options = {"steps": int(case["num_steps"]), "guidance": float(case["cfg_scale"])}
    with on_device(dit):
        latents = sample(dit, case["cond_latents"], case["noise"], impl="triton", **options)
    assert relative_error(latents, case["latents"]) <= 1e-4


@pytest.mark.slow  # minutes under the interpreter
@kernel_test
@pytest.mark.parametrize("name", ["uniform4_reuse"] if INTERPRETED else list(SPEEDS_OF_CASES))
def test_speed(golden_dit, name):
    dit, tiers = golden_dit("dit_a"), load_file(GOLDEN / "tiers_cases.safetensors")
    cond, noise = tiers["cond_latents"].to(DEVICE), tiers["noise"].to(DEVICE)
    with on_device(dit):
        latents = sample(dit, cond, noise, impl="triton", speed=SPEEDS_OF_CASES[name])
    assert relative_error(latents.cpu(), tiers[name]) <= 1e-4


@kernel_test
def test_bfloat16_within_the_error_budget(golden_dit):
    """The kernels err at most twice as much as the plain formula in bfloat16, both against the golden float32."""
    case = {key: value.to(DEVICE) for key, value in golden_cases("dit_c")["forward0"].items()}
    dit = golden_dit("dit_c", torch.bfloat16)
    with on_device(dit), torch.no_grad():
        plain = relative_error(dit(case["latents"], case["t"], case["cond_latents"]), case["velocity"])
        packed = relative_error(packed_forward(dit, case, impl="triton"), case["velocity"])
    assert 1e-4 < plain < 0.05 and packed <= 2 * plain
