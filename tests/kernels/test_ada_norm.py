"""Adaptive norm and gated residual: the kernels against the references' error, and what they refuse."""

from __future__ import annotations

import contextlib
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import kernel_checks
from support.kernel_checks import (
    DEVICE,
    DTYPES,
    assert_within_budget,
    compiled_test,
    framed,
    kernel_test,
    launches,
    poisoned_memory,
)

from lavin_kernels import ada_rms_norm, gated_residual, gated_residual_ada_rms_norm, tuning
from lavin_kernels.reference import dit as reference

OPERATORS = [ada_rms_norm, gated_residual, gated_residual_ada_rms_norm]
# (rows, split, width): the model's width with an odd number of rows, one row of either stream, an empty stream on
# either side, the narrowest row, odd widths, a power of two, which takes two warps, and two pieces of almost the same.
SHAPES = [
    (5, 2, 2304),
    (1, 0, 2304),
    (1, 1, 72),
    (4, 0, 40),
    (4, 4, 40),
    (3, 1, 8),
    (3, 2, 9),
    (2, 1, 2303),
    (2, 1, 4096),
    (3, 1, 127),
]


@compiled_test
@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(marker):
    kernel_checks.run_under_interpreter(__file__, marker)


def arguments(operator, rows: int, split: int, width: int, dtype: torch.dtype, table_dtype: torch.dtype, magnitude=1.0):
    """Strided rows in a frame of NaN, gate and scale from a modulation table as the model keeps it."""
    matrices = [
        framed(kernel_checks.random(rows, width, dtype=dtype, seed=seed, magnitude=magnitude)) for seed in (1, 2)
    ]
    table = kernel_checks.random(2, 4, width, dtype=table_dtype, seed=3, magnitude=0.5)  # [streams, 4, D]
    gate, scale = table[:, 1], table[:, 2]
    return {
        "ada_rms_norm": [matrices[0], split, scale],
        "gated_residual": [*matrices, split, gate],
        "gated_residual_ada_rms_norm": [*matrices, split, gate, scale],
    }[operator.__name__]


def in_float64(values: list) -> list:
    return [value.double() if isinstance(value, torch.Tensor) else value for value in values]


def check(operator, values: list) -> None:
    name = operator.__name__
    with poisoned_memory(), launches() as counts:
        results = operator(*values)
    assert counts == {f"_{name}_kernel": 1}
    assert all(result.is_contiguous() for result in (results if isinstance(results, tuple) else [results]))
    of_reference = getattr(reference, name)
    assert_within_budget(results, of_reference(*values), of_reference(*in_float64(values)))


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_error_budget(operator, shape, dtype):
    check(operator, arguments(operator, *shape, dtype, torch.float32))


@kernel_test
@pytest.mark.parametrize(("dtype", "table_dtype"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_table_in_another_dtype(operator, dtype, table_dtype):
    check(operator, arguments(operator, 3, 1, 200, dtype, table_dtype))


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
# At 1e-4 the mean of squares is a hundredth of eps; at 1e4 float16 rows are near their end, 65504.
@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
@pytest.mark.parametrize("operator", OPERATORS)
def test_extreme_values(operator, magnitude, dtype):
    check(operator, arguments(operator, 3, 1, 2304, dtype, torch.float32, magnitude))


@kernel_test
@pytest.mark.parametrize("operator", OPERATORS)
def test_one_vector_expanded_to_both_streams(operator):
    values = arguments(operator, 3, 1, 48, torch.float32, torch.float32)
    check(operator, [*values[:-1], values[-1][0].expand(2, -1)])


@kernel_test
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(1, 4), width=st.integers(8, 300), data=st.data())
def test_any_width_and_split(rows, width, data):
    split = data.draw(st.integers(0, rows))
    operator = gated_residual_ada_rms_norm
    check(operator, arguments(operator, rows, split, width, torch.float32, torch.float32))


@kernel_test
def test_a_row_of_nan_stays_alone():
    residual, update, *rest = arguments(gated_residual_ada_rms_norm, 5, 2, 100, torch.bfloat16, torch.float32)
    expected = gated_residual_ada_rms_norm(residual, update, *rest)
    residual[1], update[3] = torch.nan, torch.nan
    results = gated_residual_ada_rms_norm(residual, update, *rest)
    for result, unharmed in zip(results, expected, strict=True):
        assert torch.equal(result[[0, 2, 4]], unharmed[[0, 2, 4]])
        assert result[[1, 3]].isnan().all()


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_gives_the_bits_of_two(dtype):
    residual, update, split, gate, scale = arguments(gated_residual_ada_rms_norm, 5, 2, 2304, dtype, torch.float32)
    with contextlib.ExitStack() as same_launch:
        for kernel in ("gated_residual_ada_rms_norm", "gated_residual", "ada_rms_norm"):
            same_launch.enter_context(tuning.override(kernel, num_warps=1))
        first, second = gated_residual_ada_rms_norm(residual, update, split, gate, scale)
        assert torch.equal(first, gated_residual(residual, update, split, gate))
        assert torch.equal(second, ada_rms_norm(first, split, scale))


@kernel_test
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_rows_launch_nothing(operator):
    rows, table = torch.empty(0, 40, device=DEVICE), torch.ones(2, 40, device=DEVICE)
    matrices = [rows] if operator is ada_rms_norm else [rows, rows]
    tables = [table, table] if operator is gated_residual_ada_rms_norm else [table]
    with launches() as counts:
        results = operator(*matrices, 0, *tables)
    assert not counts
    assert all(result.shape == (0, 40) for result in (results if isinstance(results, tuple) else [results]))


@kernel_test
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_candidate_is_right(operator):
    for candidate in import_module("lavin_kernels.ops.ada_norm").CANDIDATES:
        with tuning.override(operator.__name__, **candidate):
            check(operator, arguments(operator, 2, 1, 2304, torch.bfloat16, torch.float32))


SECOND_NORM = "tail.to(tl.float32)\n    inverse = _inverse_rms(main, tail, D, eps)"


@kernel_test
@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "original", "changed"),
    [
        (ada_rms_norm, "tail, mask=columns < D,", "tail, mask=columns < D - 1,"),
        (ada_rms_norm, "row_ptr + columns, mask=columns < D,", "row_ptr + columns, mask=columns <= D,"),
        (ada_rms_norm, "tl.sum(main * main) + tl.sum(tail * tail)", "tl.sum(main * main)"),
        (ada_rms_norm, "/ D + eps", "/ D"),
        (gated_residual, "residual + update * inverse * gate,", "residual + residual * inverse * gate,"),
        (gated_residual_ada_rms_norm, SECOND_NORM, "tail.to(tl.float32)\n    inverse = 1.0"),
    ],
    ids=["store mask", "load mask", "half of the sum", "no eps", "wrong operand", "second norm left out"],
)
def test_mutants_are_caught(operator, original, changed, tmp_path):
    broken = kernel_checks.mutant("lavin_kernels.ops.ada_norm", original, changed, tmp_path)
    broken_operator = getattr(broken, operator.__name__)
    with pytest.raises(AssertionError):
        check(broken_operator, arguments(operator, 3, 1, 77, torch.float32, torch.float32, magnitude=1e-3))


@kernel_test
@pytest.mark.parametrize("operator", OPERATORS)
def test_swapped_streams_are_caught(operator, tmp_path):
    kernel = f"_{operator.__name__}_kernel"
    source = kernel_checks.source("lavin_kernels.ops.ada_norm")
    after = source[source.index(f"def {kernel}(") :]
    body = after[: after.index("stream = (row >= split)")]
    broken = kernel_checks.mutant(
        "lavin_kernels.ops.ada_norm", body + "stream = (row >= split)", body + "stream = (row < split)", tmp_path
    )
    with pytest.raises(AssertionError):
        check(getattr(broken, operator.__name__), arguments(operator, 3, 1, 40, torch.float32, torch.float32))


GOOD = {
    "residual": torch.ones(3, 16),
    "update": torch.ones(3, 16),
    "split": 1,
    "gate": torch.ones(2, 16),
    "scale": torch.ones(2, 16),
}


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("residual", None, TypeError, "residual is of type NoneType; expected a tensor"),
        ("residual", torch.ones(3, 16, dtype=torch.int64), TypeError, "residual has dtype int64; expected bfloat16"),
        ("residual", torch.ones(1, 3, 16), ValueError, r"residual has shape \[1, 3, 16\]; expected 2 dimensions"),
        ("residual", torch.ones(3, 4), ValueError, "residual has width 4; expected at least 8"),
        ("residual", torch.ones(16, 3).T, ValueError, "residual has stride 3 in its last dimension"),
        ("update", torch.ones(3, 8), ValueError, r"update has shape \[3, 8\]; expected \[3, 16\]"),
        ("update", torch.ones(3, 16).half(), TypeError, "update has dtype float16; expected float32, as residual has"),
        ("update", torch.ones(3, 16, device="meta"), ValueError, "update is on meta; expected cpu"),
        ("split", 4, ValueError, "split is 4; expected 0 <= split <= 3"),
        ("split", -1, ValueError, "split is -1; expected 0 <= split <= 3"),
        ("split", 1.0, TypeError, "split is of type float; expected an int"),
        ("gate", torch.ones(16), ValueError, r"gate has shape \[16\]; expected 2 dimensions, \[2, 16\]"),
        ("gate", torch.ones(2, 16, dtype=torch.int8), TypeError, "gate has dtype int8"),
        ("scale", torch.ones(1, 16), ValueError, r"scale has shape \[1, 16\]; expected \[2, 16\]"),
        ("scale", torch.ones(16, 2).T, ValueError, "scale has stride 2 in its last dimension"),
    ],
)
def test_bad_input(argument, value, error, message):
    with launches() as counts, pytest.raises(error, match=message) as raised:
        gated_residual_ada_rms_norm(**{**GOOD, argument: value})
    assert not counts and "\n" not in str(raised.value)


def test_bad_input_of_the_other_operators():
    with pytest.raises(ValueError, match="rows has width 4"):
        ada_rms_norm(torch.ones(3, 4), 1, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"scale has shape \[2, 8\]"):
        ada_rms_norm(torch.ones(3, 16), 1, torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"gate has shape \[2, 8\]"):
        gated_residual(torch.ones(3, 16), torch.ones(3, 16), 1, torch.ones(2, 8))


@kernel_test
def test_kernel_refuses_float64():
    with pytest.raises(TypeError, match="rows has dtype float64; kernels take bfloat16 or float16 or float32"):
        ada_rms_norm(torch.ones(2, 8, dtype=torch.float64, device=DEVICE), 1, torch.ones(2, 8, device=DEVICE))


@compiled_test
def test_cpu_runs_the_reference():
    values = [value.double() if isinstance(value, torch.Tensor) else value for value in GOOD.values()]
    for result, expected in zip(
        gated_residual_ada_rms_norm(*values), reference.gated_residual_ada_rms_norm(*values), strict=True
    ):
        assert torch.equal(result, expected)


@compiled_test
def test_split_is_never_compiled_in():
    module = import_module("lavin_kernels.ops.ada_norm")
    for operator in OPERATORS:
        kernel = getattr(module, f"_{operator.__name__}_kernel")
        assert [parameter.name for parameter in kernel.params if parameter.do_not_specialize] == ["split"]
