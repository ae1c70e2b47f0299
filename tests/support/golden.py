"""The golden tensors, which are inputs and outputs of the original model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from lavin_rt.dit.layout import Shape
from lavin_rt.sampling.denoisers import PackedNetwork
from lavin_rt.sampling.speeds import Speed

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"


def golden_cases(name: str, kind: str = "") -> dict[str, dict[str, torch.Tensor]]:
    """The numbered cases of a golden file that start with `kind`, such as `{"forward0": {"latents": ..., ...}}`."""
    cases: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(GOLDEN / f"{name}_cases.safetensors").items():
        case, tensor = key.split(".")
        if case.startswith(kind):
            cases.setdefault(case, {})[tensor] = value
    return cases


def case_names(names: list[str], kind: str) -> list[tuple[str, str]]:
    """Every (file, case) of a kind, to parametrise over."""
    return [(name, case) for name in names for case in sorted(golden_cases(name, kind))]


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """`||result - truth|| / ||truth||` in float64."""
    return ((result.double() - truth.double()).norm() / truth.double().norm()).item()


CASES = {
    "uniform8": Speed(evaluations=8),
    "uniform4_reuse": Speed(evaluations=4, refresh={0}),
    "official20_reuse": Speed(refresh={0, 9, 13, 16}),
    "official20_held": Speed(guided={0, 9, 13, 16}),
    "uniform8_both": Speed(evaluations=8, refresh={0, 4}, guided={0, 2, 4, 6}),
    "uniform8_skip": Speed(evaluations=8, refresh={0, 3}, guided={0, 4}),
}


DITS = ["dit_a", "dit_b", "dit_c"]


def packed_forward(dit, case, impl="torch"):
    """A packed step used as one forward pass per sample, since all branches of a step share `t`."""
    velocities = []
    for latents, t, cond in zip(
        case["latents"].split(1), case["t"].split(1), case["cond_latents"].split(1), strict=True
    ):
        shape = Shape(1, cond.shape[2], 1, latents.shape[2], *latents.shape[3:], guided=False)
        network = PackedNetwork(dit, impl)
        step, embedded = network.step(shape), network.embed(cond)
        condition = step.buffers()
        step.fill(condition, embedded[:, : -shape.frame_tokens], embedded[:, -shape.frame_tokens :])
        # A schedule's last knot is not evaluated.
        rows = [table[0] for table in network.table(torch.cat([t, t]))]
        velocities.append(step(latents, condition, *rows))
    return torch.cat(velocities)
