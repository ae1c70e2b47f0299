"""SwiGLU: the kernel against the reference's error, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from support import kernel_checks
from support.kernel_checks import (
    DTYPES,
    assert_within_budget,
    compiled_test,
    framed,
    kernel_test,
    launches,
    poisoned_memory,
)

from lavin_kernels import swiglu, tuning
from lavin_kernels.reference import dit as reference

# (rows, inner): the model's width once, one row, no whole block, less than a block, an odd width, one column.
SHAPES = [(3, 6144), (1, 2048), (2, 2049), (5, 24), (3, 77), (2, 1)]


@compiled_test
def test_under_the_interpreter():
    kernel_checks.run_under_interpreter(__file__)


def check(operator, rows: int, inner: int, dtype: torch.dtype, magnitude: float = 1.0) -> None:
    gate_up = framed(kernel_checks.random(rows, 2 * inner, dtype=dtype, seed=rows + inner, magnitude=magnitude))
    with poisoned_memory(), launches() as counts:
        result = operator(gate_up)
    assert counts == {"_swiglu_kernel": 1}
    assert result.is_contiguous()
    assert_within_budget(result, reference.swiglu(gate_up), reference.swiglu(gate_up.double()))


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner"), SHAPES)
def test_error_budget(rows, inner, dtype):
    check(swiglu, rows, inner, dtype)


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
# float16 ends at 65504, and the product of two numbers must stay below it.
@pytest.mark.parametrize("magnitude", [1e-4, 50.0])
def test_extreme_values(dtype, magnitude):
    check(swiglu, 3, 100, dtype, magnitude)
    if dtype != torch.float16:
        check(swiglu, 3, 100, dtype, 1e4)


@kernel_test
@pytest.mark.parametrize("rows, inner", [(0, 24), (3, 0)])
def test_nothing_to_do_launches_nothing(rows, inner):
    with launches() as counts:
        result = swiglu(torch.empty(rows, 2 * inner, device=kernel_checks.DEVICE))
    assert result.shape == (rows, inner) and not counts


@kernel_test
def test_every_candidate_is_right():
    from importlib import import_module

    for candidate in import_module("lavin_kernels.ops.swiglu").CANDIDATES:
        with tuning.override("swiglu", **candidate):
            check(swiglu, 2, 2500, torch.bfloat16)


@kernel_test
@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("mask = columns < INNER", "mask = columns < INNER - 1"),
        ("tl.load(gate_ptrs + INNER,", "tl.load(gate_ptrs + INNER - 1,"),
        ("gate * tl.sigmoid(gate) * up", "up * tl.sigmoid(up) * gate"),
        ("row * row_stride", "row * 2 * INNER"),
    ],
    ids=["mask", "offset", "gate and up swapped", "stride"],
)
def test_mutants_are_caught(original, changed, tmp_path):
    broken = kernel_checks.mutant("lavin_kernels.ops.swiglu", original, changed, tmp_path)
    with pytest.raises(AssertionError):
        check(broken.swiglu, 3, 77, torch.float32)


@pytest.mark.parametrize(
    ("gate_up", "error", "message"),
    [
        ([[1.0, 2.0]], TypeError, "gate_up is of type list; expected a tensor"),
        (torch.ones(2, 4, dtype=torch.int32), TypeError, "gate_up has dtype int32; expected bfloat16"),
        (torch.ones(4), ValueError, r"gate_up has shape \[4\]; expected 2 dimensions"),
        (torch.ones(2, 5), ValueError, "gate_up has width 5; expected an even one"),
        (torch.ones(4, 6).T, ValueError, "gate_up has stride 6 in its last dimension; expected 1"),
    ],
)
def test_bad_input(gate_up, error, message):
    with launches() as counts, pytest.raises(error, match=message):
        swiglu(gate_up)
    assert not counts


@kernel_test
def test_kernel_refuses_float64():
    with pytest.raises(TypeError, match="gate_up has dtype float64; kernels take bfloat16 or float16 or float32"):
        swiglu(torch.ones(2, 4, dtype=torch.float64, device=kernel_checks.DEVICE))


@compiled_test
def test_cpu_runs_the_reference():
    gate_up = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(swiglu(gate_up), reference.swiglu(gate_up))
