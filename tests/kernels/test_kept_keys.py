"""Operators over kept keys and values: the kernels against the references, their registration, what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import kernel_checks
from support.kernel_checks import DTYPES, assert_within_budget, compiled_test, kernel_test, launches, poisoned_memory
from test_joint_attention import assert_in_budget

from lavin_kernels import Branches, joint_attention, joint_attention_with_lse, qk_norm_rope_into, tuning
from lavin_kernels.reference import dit as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, SIZE, PADDED, POSITIONS = 4, 2, 72, 80, 30
KEPT = [
    ((2, 1), (2, 1), (5, 2)),
    ((1, 2), (1, 2), (7, 0)),  # what the first evaluation of a task's run does: one branch has nothing kept yet
    ((0,), (3,), (40,)),
    ((2, 1), (1, 1), ()),
]


def random(*shape: int, **options) -> torch.Tensor:
    return kernel_checks.random(*shape, **options, device=DEVICE)


@compiled_test
def test_under_the_interpreter():
    kernel_checks.run_under_interpreter(__file__)


def rows_of(lens, dtype: torch.dtype, cond_queries: bool) -> tuple:
    """The arguments of `qk_norm_rope_into`, keys and values full of numbers that must stay where they are kept."""
    branches = Branches.make(*lens[:2], DEVICE, lens[2])
    q_size, kv_size = HEADS * SIZE, KV_HEADS * SIZE
    joined = random(branches.rows, q_size + 2 * kv_size, dtype=dtype, seed=1)
    cond = joined[: branches.split, 0 if cond_queries else q_size :]
    k, v = (random(branches.keys, KV_HEADS, PADDED, dtype=dtype, seed=seed) for seed in (2, 3))
    generator = torch.Generator().manual_seed(4)
    positions = torch.randint(POSITIONS, (branches.rows, 3), generator=generator, dtype=torch.int32).to(DEVICE)
    cos, sin = (random(POSITIONS, SIZE // 6, dtype=torch.float32, seed=seed) for seed in (5, 6))
    weights = [1 + random(2, size, dtype=dtype, seed=7, magnitude=0.3) for size in (q_size, kv_size)]
    return cond, joined[branches.split :], k, v, branches, positions, cos, sin, *weights, SIZE


def all_of(operator, arguments: tuple) -> tuple[torch.Tensor, ...]:
    """q, and the buffers as they are left."""
    k, v = arguments[2].clone(), arguments[3].clone()
    q = operator(*arguments[:2], k, v, *arguments[4:])
    return q, k, v


def in_float64(values: tuple) -> tuple:
    return tuple(v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values)


def fresh(branches: Branches) -> torch.Tensor:
    """Which rows of keys and values a step writes."""
    written = torch.zeros(branches.keys, dtype=torch.bool, device=DEVICE)
    written[(branches.branch_rows if branches.key_rows is None else branches.key_rows).long()] = True
    return written


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cond_queries", [True, False])
@pytest.mark.parametrize("lens", KEPT, ids=str)
def test_rows_are_written_behind_the_kept_ones(lens, cond_queries, dtype):
    arguments = rows_of(lens, dtype, cond_queries)
    with poisoned_memory(), launches() as counts:
        results = all_of(qk_norm_rope_into, arguments)
    assert counts == {"_qk_norm_rope_kernel": 1}
    written = fresh(arguments[4])
    for result, before in zip(results[1:], arguments[2:4], strict=True):
        assert torch.equal(result[~written], before[~written])
        assert not result[written][..., SIZE:].any()
    expected, truth = (all_of(reference.qk_norm_rope_into, values) for values in (arguments, in_float64(arguments)))
    for parts in (results, expected, truth):
        for part in parts[1:]:
            part[..., SIZE:] = 0  # the reference leaves the padding of its buffers alone
    assert_within_budget(results, expected, truth)


def attended(lens, dtype: torch.dtype, x_only: bool) -> tuple:
    branches = Branches.make(*lens[:2], DEVICE, lens[2])
    rows = sum(lens[1]) if x_only else branches.rows
    shapes = ((rows, HEADS), (branches.keys, KV_HEADS), (branches.keys, KV_HEADS))
    return (
        *(random(*shape, PADDED, dtype=dtype, seed=i) for i, shape in enumerate(shapes)),
        branches,
        SIZE,
    )


@kernel_test
@pytest.mark.parametrize(("dtype", "x_only"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize(
    "lens", [((19, 5), (11, 9), (20, 17)), ((9, 17), (5, 7), (32, 0)), ((0, 3), (17, 2), (7, 40))], ids=str
)
def test_attention_over_kept_keys(lens, x_only, dtype):
    arguments = attended(lens, dtype, x_only)
    small = {"variant": "pointer", "block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 2}
    with poisoned_memory(), tuning.override("joint_attention", **small):
        out, lse = joint_attention_with_lse(*arguments)
    plain = reference.joint_attention_with_lse(*arguments)
    q, k, *rest = in_float64(arguments)
    truth = reference.joint_attention_with_lse(q, k, *rest)
    assert_in_budget(out, plain[0], truth[0], dtype)
    # As of `test_joint_attention`: scores are sums of products far larger than themselves.
    magnitude = reference.joint_attention_with_lse(q.abs(), k.abs(), *rest)[1]
    assert_in_budget(lse, plain[1], truth[1], torch.float32, magnitude)


def test_kept_rows_are_those_of_one_longer_branch():
    """Rows of a step, and the last rows of a step over all of them: the same answers."""
    arguments = attended(((3, 2), (4, 5), (6, 1)), torch.float32, False)
    whole = Branches.make((9, 3), (4, 5), DEVICE)
    queries = torch.zeros(whole.rows, HEADS, PADDED, device=DEVICE)
    last = fresh(arguments[3])
    queries[last] = arguments[0]
    stream_rows = torch.cat([torch.arange(6, 9), torch.arange(10, 12), torch.arange(12, 21)])
    expected = reference.joint_attention(queries, *arguments[1:3], whole, SIZE)[stream_rows]
    torch.testing.assert_close(reference.joint_attention(*arguments), expected)


@compiled_test
@pytest.mark.parametrize("lens", [KEPT[0], KEPT[3]], ids=str)
def test_registration(lens):
    """opcheck, one graph in torch.compile with buffers written in place, and export."""
    arguments = rows_of(lens, torch.float32, True)
    branches = arguments[4]

    def step(cond, x, k, v):
        q = qk_norm_rope_into(cond, x, k, v, *arguments[4:])
        return joint_attention(q, k, v, branches, SIZE)

    lens = (list(branches.cond_lens), list(branches.x_lens), list(branches.kept_lens))
    rows = branches.key_rows if branches.kept_lens else branches.branch_rows
    tables = (branches.table, branches.branch_rows, rows)
    torch.library.opcheck(
        torch.ops.lavin.qk_norm_rope_pairs_into.default, (*arguments[:4], *lens, *tables, *arguments[5:], 1e-6)
    )
    inputs = list(arguments[:4])
    expected_inputs = [part.clone() for part in inputs]
    expected = step(*expected_inputs)
    result = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")(*inputs)
    for found, wanted in zip([result, *inputs], [expected, *expected_inputs], strict=True):
        torch.testing.assert_close(found, wanted)


@compiled_test
def test_bad_input_is_named():
    arguments = list(rows_of(KEPT[0], torch.float32, True))
    cases = [
        (2, arguments[2][:-1], ValueError, "k has shape"),
        (3, arguments[3].double(), TypeError, "v has dtype float64"),
        (2, arguments[2].transpose(0, 1).contiguous().transpose(0, 1), ValueError, "k has strides"),
        (4, dataclasses.replace(arguments[4], kept_lens=(5, 3)), ValueError, "k has shape"),
    ]
    for place, wrong, error, message in cases:
        with pytest.raises(error, match=message):
            qk_norm_rope_into(*arguments[:place], wrong, *arguments[place + 1 :])
    q, k, v, branches, size = attended(KEPT[0], torch.float32, False)
    with pytest.raises(ValueError, match=r"k has 6 rows; expected 13"):
        joint_attention(q, k[:6], v, branches, size)
    with pytest.raises(ValueError, match="kept_lens is"):
        Branches.make((1, 2), (1, 1), kept_lens=(1,))
