"""Every form of the attention kernel on a real GPU: what the interpreter and the stand-ins cannot show."""

from __future__ import annotations

import pytest
import torch
from support.kernel_checks import assert_within_budget, poisoned_memory, random

from lavin_kernels import Branches, joint_attention, joint_attention_with_lse, tuning
from lavin_kernels.ops.joint_attention import CANDIDATES
from lavin_kernels.reference import dit as reference

HEADS, KV_HEADS, HEAD_SIZE, STORED = 8, 2, 72, 80
# Odd lengths, a short branch, tiles of every candidate that are not full; keys enough for a whole tile in each branch.
BRANCHES = ((1153, 217), (300, 129), (128, 65))
# The number of stages changes no arithmetic, and every compilation takes seconds of a GPU; tuning checks the others.
TESTED = [c for c in CANDIDATES if c["variant"] == "gluon" or c["num_stages"] == 3]


def inputs(branches: Branches, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    parts = []
    for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)):
        part = torch.zeros(branches.rows, heads, STORED, dtype=dtype, device="cuda")
        part[..., :HEAD_SIZE] = random(branches.rows, heads, HEAD_SIZE, dtype=dtype, seed=seed, device="cuda")
        parts.append(part)
    return tuple(parts)


@pytest.mark.gpu
@pytest.mark.parametrize("x_only", [False, True])
@pytest.mark.parametrize("candidate", TESTED, ids=lambda c: "-".join(str(value) for value in c.values()))
def test_candidate(candidate, x_only):
    if torch.cuda.get_device_capability()[0] != 9 and candidate["variant"] == "gluon":
        pytest.skip("the Gluon form is for compute capability 9.0")
    branches = Branches.make(*zip(*BRANCHES, strict=True), device="cuda")
    q, k, v = inputs(branches, torch.bfloat16)
    if x_only:
        starts = [sum(cond + x for cond, x in BRANCHES[:b]) + BRANCHES[b][0] for b in range(len(BRANCHES))]
        q = torch.cat([q[start : start + x] for start, (_, x) in zip(starts, BRANCHES, strict=True)])
    truth = reference.joint_attention(q.double(), k.double(), v.double(), branches, HEAD_SIZE)
    plain = reference.joint_attention(q, k, v, branches, HEAD_SIZE)
    try:
        with tuning.override("joint_attention", **candidate), poisoned_memory():
            result = joint_attention(q, k, v, branches, HEAD_SIZE)
            torch.cuda.synchronize()
    except Exception as error:
        if "OutOfResources" in type(error).__name__:
            pytest.skip(f"does not fit this device: {error}")
        raise
    assert_within_budget(result, plain, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_default_with_lse(dtype):
    branches = Branches.make(*zip(*BRANCHES, strict=True), device="cuda")
    q, k, v = inputs(branches, dtype)
    result, lse = joint_attention_with_lse(q, k, v, branches, HEAD_SIZE)
    truth, true_lse = reference.joint_attention_with_lse(q.double(), k.double(), v.double(), branches, HEAD_SIZE)
    assert_within_budget(result, reference.joint_attention(q, k, v, branches, HEAD_SIZE), truth)
    assert (lse - true_lse).abs().max() < (3e-6 if dtype == torch.float32 else 1e-4)


@pytest.mark.gpu
def test_a_run_repeats_bit_for_bit():
    """A result that changes from run to run is a race."""
    branches = Branches.make(*zip(*BRANCHES, strict=True), device="cuda")
    parts = inputs(branches, torch.bfloat16)
    results = [joint_attention(*parts, branches, HEAD_SIZE) for _ in range(20)]
    assert all(torch.equal(result, results[0]) for result in results)
