"""The linear of each stream: slices of one output against two linears, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import kernel_checks
from support.kernel_checks import assert_within_budget, framed, poisoned_memory

from lavin_kernels import stream_linear

DTYPES = [torch.bfloat16, torch.float32]
# (rows, split, K, N): odd rows, one row of either stream, an empty stream on either side, no rows.
SHAPES = [(5, 2, 72, 48), (1, 0, 24, 8), (1, 1, 24, 8), (4, 0, 16, 3), (4, 4, 16, 3), (0, 0, 16, 8)]


def arguments(rows: int, split: int, inner: int, outer: int, dtype: torch.dtype, device: str = "cpu") -> list:
    matrix = framed(kernel_checks.random(rows, inner, dtype=dtype, seed=1, device=device))
    weight = kernel_checks.random(2, outer, inner, dtype=dtype, seed=2, magnitude=inner**-0.5, device=device)
    return [matrix, split, weight]


def check(operator, values: list) -> None:
    with poisoned_memory():
        result = operator(*values)
    matrix, split, weight = values
    assert result.is_contiguous()
    assert_within_budget(result, two_linears(*values), two_linears(matrix.double(), split, weight.double()))


def two_linears(rows: torch.Tensor, split: int, weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.linear(rows[:split], weight[0]), F.linear(rows[split:], weight[1])])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_into_slices(shape, dtype):
    check(stream_linear, arguments(*shape, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 257, 2304, 3456)], ids=str)
def test_error_budget_on_cuda(shape, dtype):
    check(stream_linear, arguments(*shape, dtype, "cuda"))


@pytest.mark.gpu
def test_nothing_is_copied_on_cuda():
    values = arguments(300, 257, 2304, 3456, torch.bfloat16, "cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stream_linear(*values)
    names = [event.name for event in profile.events()]
    assert names.count("aten::mm") == 2 and not {"aten::cat", "aten::copy_"} & set(names)


@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("weight[stream].T, out", "weight[1 - stream].T, out"),
        (
            "slice(0, split), slice(split, None))):\n        torch.mm",
            "slice(0, split), slice(split + 1, None))):\n        torch.mm",
        ),
    ],
    ids=["swapped streams", "a row left out"],
)
def test_mutants_are_caught(original, changed, tmp_path):
    broken = kernel_checks.mutant("lavin_kernels.reference.dit", original, changed, tmp_path)
    with pytest.raises(AssertionError):
        check(broken.stream_linear, arguments(5, 2, 72, 48, torch.float32))


def test_gradients_reach_rows_and_weight():
    matrix, split, weight = arguments(5, 2, 8, 4, torch.float32)
    matrix, weight = matrix.clone().requires_grad_(), weight.requires_grad_()
    stream_linear(matrix, split, weight).sum().backward()
    assert torch.allclose(matrix.grad[0], weight[0].sum(0)) and torch.allclose(matrix.grad[4], weight[1].sum(0))


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("rows", torch.ones(3, 8, dtype=torch.int8), TypeError, "rows has dtype int8"),
        ("rows", torch.ones(8), ValueError, r"rows has shape \[8\]; expected 2 dimensions"),
        ("rows", torch.ones(8, 3).T, ValueError, "rows has stride 3 in its last dimension"),
        ("split", 4, ValueError, "split is 4; expected 0 <= split <= 3"),
        ("weight", torch.ones(2, 5, 9), ValueError, r"weight has shape \[2, 5, 9\]; expected \[2, any, 8\]"),
        ("weight", torch.ones(1, 5, 8), ValueError, r"weight has shape \[1, 5, 8\]"),
        ("weight", torch.ones(2, 5, 8).half(), TypeError, "weight has dtype float16; expected float32, as rows has"),
    ],
)
def test_bad_input(argument, value, error, message):
    values = {"rows": torch.ones(3, 8), "split": 1, "weight": torch.ones(2, 5, 8)}
    with pytest.raises(error, match=message):
        stream_linear(**{**values, argument: value})
