"""Speeds: their golden cases, what they compute, and what is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import GOLDEN, relative_error
from safetensors.torch import load_file

from lavin_rt.sampler import sample
from lavin_rt.speeds import Speed

OFFICIAL = {0, 9, 13, 16}
CASES = {
    "uniform8": Speed(evaluations=8),
    "uniform4_reuse": Speed(evaluations=4, refresh={0}),
    "official20_reuse": Speed(refresh=OFFICIAL),
    "official20_held": Speed(guided=OFFICIAL),
    "uniform8_both": Speed(evaluations=8, refresh={0, 4}, guided={0, 2, 4, 6}),
    "uniform8_skip": Speed(evaluations=8, refresh={0, 3}, guided={0, 4}),
}


@pytest.fixture(scope="module")
def tiers() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "tiers_cases.safetensors")


@pytest.mark.parametrize("impl", ["plain", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_golden(golden_dit, tiers, name, impl):
    latents = sample(golden_dit("dit_a"), tiers["cond_latents"], tiers["noise"], impl=impl, speed=CASES[name])
    assert relative_error(latents, tiers[name]) <= 1e-4
