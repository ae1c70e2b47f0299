"""The golden forward and sampling cases, through the plain model and the packed step."""

from __future__ import annotations

import pytest
import torch
from support.golden import DITS, case_names, golden_cases, packed_forward, relative_error

from lavin_rt.sampling.sampler import sample


@pytest.mark.parametrize(("name", "case"), case_names(DITS, "forward"))
def test_forward(golden_dit, name, case):
    case = golden_cases(name)[case]
    dit = golden_dit(name)
    assert relative_error(dit(case["latents"], case["t"], case["cond_latents"]), case["velocity"]) <= 1e-5
    assert relative_error(packed_forward(dit, case), case["velocity"]) <= 1e-5


@pytest.mark.parametrize("impl", ["plain", "torch"])
@pytest.mark.parametrize(("name", "case"), case_names(DITS, "sample"))
def test_sample(golden_dit, name, case, impl):
    case = golden_cases(name)[case]
    latents = sample(
        golden_dit(name),
        case["cond_latents"],
        case["noise"],
        steps=int(case["num_steps"]),
        guidance=float(case["cfg_scale"]),
        impl=impl,
    )
    assert latents.dtype == torch.float32
    assert relative_error(latents, case["latents"]) <= 1e-4


@pytest.mark.parametrize(("name", "case"), case_names(DITS, "forward"))
def test_forward_in_bfloat16_within_the_error_budget(golden_dit, name, case):
    """The packed step errs at most twice as much as the plain formula does in bfloat16, both against float32."""
    case = golden_cases(name)[case]
    dit = golden_dit(name, torch.bfloat16)
    plain = relative_error(dit(case["latents"], case["t"], case["cond_latents"]), case["velocity"])
    packed = relative_error(packed_forward(dit, case), case["velocity"])
    assert 1e-4 < plain < 0.05, "the plain formula itself is off"
    assert packed <= 2 * plain


@pytest.mark.parametrize(("name", "case"), case_names(DITS, "sample"))
def test_sample_in_bfloat16_within_the_error_budget(golden_dit, name, case):
    case = golden_cases(name)[case]
    errors = {}
    for impl in ("plain", "torch"):
        latents = sample(
            golden_dit(name, torch.bfloat16),
            case["cond_latents"],
            case["noise"],
            steps=int(case["num_steps"]),
            guidance=float(case["cfg_scale"]),
            impl=impl,
        )
        errors[impl] = relative_error(latents, case["latents"])
    assert 1e-5 < errors["plain"] < 0.05, "the plain formula itself is off"
    assert errors["torch"] <= 2 * errors["plain"]
