"""Query and key norm with rotary positions: the kernel against the reference's error, and what it refuses."""

from __future__ import annotations

import dataclasses
from importlib import import_module

import pytest
import torch
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

from lavin_kernels import Branches, qk_norm_rope, tuning
from lavin_kernels.reference import dit as reference

POSITIONS = 40


@dataclasses.dataclass(frozen=True)
class Case:
    cond_lens: tuple[int, ...]
    x_lens: tuple[int, ...]
    heads: int
    kv_heads: int
    head_size: int
    padded: int | None = None
    cond_queries: bool = True

    def __str__(self) -> str:
        form = "" if self.cond_queries else "-x"
        return f"{self.cond_lens}{self.x_lens}-{self.heads}h{self.kv_heads}x{self.head_size}p{self.padded}{form}"


CASES = [
    # The model's heads, two branches of odd lengths; and its last block, where cond has no queries.
    Case((2, 1), (1, 1), 32, 8, 72, 80),
    Case((2, 1), (1, 1), 32, 8, 72, 80, cond_queries=False),
    # One row of either stream, and an empty stream on either side.
    Case((1,), (0,), 4, 1, 24),
    Case((0,), (1,), 4, 2, 24),
    Case((0,), (2,), 4, 2, 24, cond_queries=False),
    Case((2,), (0,), 4, 2, 24, cond_queries=False),
    # Five branches, some without rows of a stream.
    Case((1, 0, 2, 0, 1), (1, 2, 0, 0, 1), 4, 2, 24, 32),
    Case((1, 0, 2, 0, 1), (1, 2, 0, 0, 1), 4, 2, 24, 32, cond_queries=False),
    # Numbers of heads that are no power of two, every way that a head is cut, padding wider than a piece.
    Case((1,), (1,), 6, 3, 48),
    Case((1,), (2,), 5, 5, 96, 128),
    Case((1,), (1,), 3, 1, 120, 128),
    Case((1,), (1,), 12, 12, 72, 128),
]


@compiled_test
@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(marker):
    kernel_checks.run_under_interpreter(__file__, marker)


def arguments(case: Case, dtype: torch.dtype, magnitude: float = 1.0, weight_dtype: torch.dtype | None = None) -> list:
    """Both streams as slices of one buffer (cond apart where it has no queries), in a frame of NaN."""
    q_size, kv_size = case.heads * case.head_size, case.kv_heads * case.head_size
    split, x_rows = sum(case.cond_lens), sum(case.x_lens)
    joined = framed(
        kernel_checks.random(split + x_rows, q_size + 2 * kv_size, dtype=dtype, seed=1, magnitude=magnitude)
    )
    cond, x = joined[:split], joined[split:]
    if not case.cond_queries:
        cond = framed(kernel_checks.random(split, 2 * kv_size, dtype=dtype, seed=2, magnitude=magnitude))
    pairs = case.head_size // 6
    frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.arange(POSITIONS, dtype=torch.float64)[:, None] * frequencies
    generator = torch.Generator().manual_seed(3)
    positions = torch.randint(POSITIONS, (split + x_rows, 3), generator=generator, dtype=torch.int32).to(DEVICE)
    weights = [
        1 + kernel_checks.random(2, size, dtype=weight_dtype or dtype, seed=size, magnitude=0.3)
        for size in (q_size, kv_size)
    ]
    branches = Branches.make(case.cond_lens, case.x_lens, DEVICE)
    tables = [table.float().to(DEVICE) for table in (angles.cos(), angles.sin())]
    return [cond, x, branches, positions, *tables, *weights, case.head_size, 1e-6, case.padded]


@kernel_test
def test_pairs_are_turned_as_complex_numbers():
    """Real and imaginary part side by side in q and k, every third of a head by the angle of its axis."""
    case = Case((2, 1), (1, 2), 4, 2, 48)
    cond, x, branches, positions, cos, sin, q_weight, k_weight, *rest = in_float64(arguments(case, torch.float32))
    q, k, _ = reference.qk_norm_rope(cond, x, branches, positions, cos, sin, q_weight, k_weight, *rest)
    turns = torch.complex(cos, sin)[positions.long()][:, None]  # [rows, 1, 3, pairs]
    streams = torch.arange(6) // 3
    for result, weight, first in ((q, q_weight, 0), (k, k_weight, 4 * 48)):
        rows = torch.cat([cond, x])[:, first : first + weight.shape[1]]
        rows = rows / (rows.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight[streams]
        real, imaginary = rows.unflatten(1, (-1, 3, 2, 8)).unbind(3)
        expected = torch.empty_like(result)
        expected[branches.branch_rows.long()] = torch.view_as_real(torch.complex(real, imaginary) * turns).flatten(2)
        torch.testing.assert_close(result, expected)


def in_float64(values: list) -> list:
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def check(operator, values: list) -> None:
    with poisoned_memory(), launches() as counts:
        results = operator(*values)
    assert counts == {"_qk_norm_rope_kernel": 1}
    assert all(result.is_contiguous() for result in results)
    assert_within_budget(results, reference.qk_norm_rope(*values), reference.qk_norm_rope(*in_float64(values)))


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_budget(case, dtype):
    check(qk_norm_rope, arguments(case, dtype))


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
# At 1e-4 the mean of squares is a hundredth of eps; at 1e4 float16 rows are near their end, 65504.
@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
def test_extreme_values(magnitude, dtype):
    check(qk_norm_rope, arguments(Case((2,), (1,), 4, 2, 72, 80), dtype, magnitude))


@kernel_test
def test_weights_in_another_dtype():
    check(qk_norm_rope, arguments(CASES[6], torch.bfloat16, weight_dtype=torch.float32))


@kernel_test
def test_values_are_copied_bit_for_bit():
    values = arguments(CASES[6], torch.bfloat16)
    assert torch.equal(qk_norm_rope(*values)[2], reference.qk_norm_rope(*values)[2])


@kernel_test
def test_a_branch_of_nan_stays_alone():
    case = Case((2, 1), (1, 2), 4, 2, 72, 80)
    cond, x, *rest = arguments(case, torch.bfloat16)
    expected = qk_norm_rope(cond, x, *rest)
    cond[:2], x[:1] = torch.nan, torch.inf
    for result, unharmed in zip(qk_norm_rope(cond, x, *rest), expected, strict=True):
        assert torch.equal(result[3:], unharmed[3:])
        assert not result[:3, :, :72].isfinite().any()
        assert (result[:, :, 72:] == 0).all()


@kernel_test
@pytest.mark.parametrize("position", [-1, POSITIONS])
def test_position_beyond_the_tables_is_nan(position):
    values = arguments(Case((1,), (2,), 4, 2, 24), torch.float32)
    expected = qk_norm_rope(*values)
    values[3] = values[3].clone()
    values[3][1, 2] = position
    for result, right in zip(qk_norm_rope(*values)[:2], expected[:2], strict=True):
        assert result[1, :, 16:24].isnan().all()
        assert torch.equal(result[1, :, :16], right[1, :, :16])
        assert torch.equal(result[[0, 2]], right[[0, 2]])


@kernel_test
def test_no_rows_launch_nothing():
    with launches() as counts:
        q, k, v = qk_norm_rope(*arguments(Case((0,), (0,), 4, 2, 24, 32), torch.float32))
    assert not counts
    assert q.shape == (0, 4, 32) and k.shape == v.shape == (0, 2, 32)


@kernel_test
def test_every_candidate_is_right():
    for candidate in import_module("lavin_kernels.ops.qk_norm_rope").CANDIDATES:
        with tuning.override("qk_norm_rope", **candidate):
            check(qk_norm_rope, arguments(Case((0,), (1,), 32, 8, 72, 80), torch.bfloat16))


@kernel_test
@pytest.mark.slow
@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("first * cos - second * sin", "first * cos + second * sin"),
        ("tl.load(pointers + PAIRS, ", "tl.load(pointers + 2 * PAIRS, "),
        ("second * cos + first * sin)", "second * cos + second * sin)"),
        ("stream = (row >= split)", "stream = (row < split)"),
        ("wanted & (heads < HEADS)[:, None]", "wanted & (heads <= HEADS)[:, None]"),
        ("values, mask=mask)", "values, mask=mask & (heads < HEADS - 1)[:, None])"),
        ("zeros = tl.zeros(", "zeros = 1 + tl.zeros("),
        ("main // (SIZE // 6)", "main // (SIZE // 4)"),
        ("tl.where(query_start == 0, target, row - split)", "(row - query_start)"),
        ("q_weight_ptr + stream * q_weight_stride", "q_weight_ptr"),
        ("k_ptr + key_target * KV_HEADS", "k_ptr + row * KV_HEADS"),
    ],
    ids=[
        "rotation sign",
        "rotation partner",
        "rotation of the second",
        "swapped streams",
        "load mask",
        "store mask",
        "padding",
        "axes",
        "query order",
        "query weight",
        "key order",
    ],
)
def test_mutants_are_caught(original, changed, tmp_path):
    broken = kernel_checks.mutant("lavin_kernels.ops.qk_norm_rope", original, changed, tmp_path)
    with pytest.raises(AssertionError):
        check(broken.qk_norm_rope, arguments(Case((1, 2), (2, 1), 6, 3, 72, 80), torch.float32))


def good() -> dict:
    return {
        "cond": torch.ones(3, 96 + 2 * 48),
        "x": torch.ones(2, 96 + 2 * 48),
        "branches": Branches.make((2, 1), (1, 1)),
        "positions": torch.zeros(5, 3, dtype=torch.int32),
        "cos": torch.ones(4, 4),
        "sin": torch.ones(4, 4),
        "q_weight": torch.ones(2, 96),
        "k_weight": torch.ones(2, 48),
        "head_size": 24,
        "padded_head_size": 32,
    }


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("cond", torch.ones(3, 100), ValueError, "cond has width 100; expected 192, or 96 without queries"),
        ("cond", torch.ones(3, 192).half(), TypeError, "cond has dtype float16; expected float32, as x has"),
        ("cond", torch.ones(4, 192), ValueError, "branches cover 3 cond and 2 x rows; expected 4 and 2"),
        ("x", torch.ones(2, 96), ValueError, r"x has shape \[2, 96\]; expected \[any, 192\]"),
        ("x", torch.ones(192, 2).T, ValueError, "x has stride 2 in its last dimension"),
        ("x", torch.ones(3, 192), ValueError, "branches cover 3 cond and 2 x rows; expected 3 and 3"),
        ("branches", None, TypeError, "branches is of type NoneType; expected Branches"),
        ("branches", Branches.make((2, 2), (1, 1)), ValueError, "branches cover 4 cond and 2 x rows"),
        ("branches", Branches.make((2, 1), (1, 1), "meta"), ValueError, "branches.table is on meta; expected cpu"),
        ("positions", torch.zeros(5, 3), TypeError, "positions has dtype float32; expected int32"),
        ("positions", torch.zeros(4, 3, dtype=torch.int32), ValueError, r"positions has shape \[4, 3\]"),
        ("cos", torch.ones(4, 12), ValueError, r"cos has shape \[4, 12\]; expected \[any, 4\]"),
        ("cos", torch.ones(4, 8)[:, :4], ValueError, "cos has strides"),
        ("sin", torch.ones(5, 4), ValueError, r"sin has shape \[5, 4\]; expected \[4, 4\]"),
        ("q_weight", torch.ones(96), ValueError, r"q_weight has shape \[96\]; expected 2 dimensions"),
        ("k_weight", torch.ones(2, 50), ValueError, "k_weight has width 50; expected a multiple of 24"),
        ("head_size", 20, ValueError, "head_size is 20; expected a multiple of"),
        ("head_size", 0, ValueError, "head_size is 0; expected a multiple of"),
        ("padded_head_size", 16, ValueError, "padded_head_size is 16; expected at least 24"),
    ],
)
def test_bad_input(argument, value, error, message):
    with launches() as counts, pytest.raises(error, match=message) as raised:
        qk_norm_rope(**{**good(), argument: value})
    assert not counts and "\n" not in str(raised.value)


def test_branches_whose_tables_do_not_fit_their_lengths():
    branches = Branches.make((2, 1), (1, 1))
    short = dataclasses.replace(branches, branch_rows=branches.branch_rows[:4])
    with pytest.raises(ValueError, match=r"branches.branch_rows has shape \[4\]; expected \[5\]"):
        qk_norm_rope(**{**good(), "branches": short})


@kernel_test
def test_kernel_refuses_a_head_size_that_is_no_multiple_of_8():
    values = arguments(Case((1,), (1,), 2, 1, 12), torch.float32)
    with pytest.raises(ValueError, match="head_size is 12; expected a multiple of 24"):
        qk_norm_rope(*values)


@compiled_test
def test_cpu_runs_the_reference():
    values = {**good(), "head_size": 6, "cos": torch.rand(4, 1), "sin": torch.rand(4, 1), "padded_head_size": None}
    for result, expected in zip(qk_norm_rope(**values), reference.qk_norm_rope(**values), strict=True):
        assert torch.equal(result, expected)


@compiled_test
def test_row_counts_are_never_compiled_in():
    kernel = import_module("lavin_kernels.ops.qk_norm_rope")._qk_norm_rope_kernel
    names = [parameter.name for parameter in kernel.params if parameter.do_not_specialize]
    assert names == ["split", "query_start", "table_rows"]
