"""The knots of the sampling schedule."""

from __future__ import annotations

import torch

from lavin_rt.errors import InputError
from lavin_rt.scalars import whole

MIN_STEPS, MAX_STEPS = 4, 136


def schedule(steps: int = 20) -> torch.Tensor:
    """The "linear-quadratic" knots from noise (0) to data (1).

    The first half is `linspace(0, 0.05, n / 2)`, the second `0.05 + 0.95 * linspace(1 / n, 1, n / 2) ** 2`, rounded
    to four decimals. For n = 20, 30 and 40 these are the tables of the published model; a run evaluates the network
    `n - 1` times.

    Args:
        steps: number of knots n, even, from 4 to 136 (beyond, rounding would repeat knots).

    Returns:
        `[steps]` float32, strictly increasing from 0 to 1.

    Raises:
        InputError: an odd, too small or too large number of steps.
    """
    given, steps = steps, whole(steps)
    if steps is None or steps % 2 or not MIN_STEPS <= steps <= MAX_STEPS:
        raise InputError(f"steps is {given!r}; expected an even number from {MIN_STEPS} to {MAX_STEPS}, such as 20")
    half = steps // 2
    linear = torch.linspace(0, 0.05, half, dtype=torch.float64)
    quadratic = 0.05 + 0.95 * torch.linspace(1 / steps, 1, half, dtype=torch.float64) ** 2
    return torch.cat([linear, quadratic]).round(decimals=4).float()
