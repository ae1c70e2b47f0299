"""The kernel cases for pytest-benchmark, which selects, compares and stores: `pytest benchmarks/ --benchmark-autosave`.

The project's own timer takes the samples (on CUDA: device time between events, with a cold L2); pytest-benchmark is
given a clock that advances by them.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lavin_bench.kernels.bench import check
from lavin_bench.kernels.cases import OPERATORS, Case, cases, settings
from lavin_bench.timing import graph_sampler, wall_clock

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
VARIANTS = (
    *("ours", "eager", "compiled", "prepacked", "flash", "cudnn", "efficient", "flex"),
    *("padded to 96", "padded to 128", "grouped, 256 rows", "grouped, 1024 rows", "64 + 8"),
)


class DeviceClock:
    """A clock that stands still but for the samples of the project's timer."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = DeviceClock()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("setting", settings(DEVICE), ids=lambda setting: setting.name)
@pytest.mark.benchmark(timer=CLOCK)
def test_kernel(benchmark, setting, operator, variant):
    # The first of the cases of an operator; `lavin-rt bench kernels` runs them all.
    case = next(case for case in cases(setting, DEVICE, DTYPE) if case.operator == operator)
    if variant not in case.variants:
        pytest.skip(case.skipped.get(variant, f"{variant} is no variant of {operator}"))
    benchmark.group = case.name
    benchmark.extra_info |= {"bytes": case.bytes, "flops": case.flops, "error": check(case, DTYPE)[variant]}
    _time(benchmark, case, variant)


def _time(benchmark, case: Case, variant: str) -> None:
    call = case.variants[variant].call
    # A launch from Python takes longer than a small kernel.
    sample = graph_sampler(call, DEVICE) if DEVICE.type == "cuda" else partial(wall_clock, call)
    assert sample is not None, "cannot be captured"

    def timed() -> None:
        CLOCK.now += sample()

    benchmark.pedantic(timed, rounds=7, iterations=1, warmup_rounds=2)
