"""`qk_norm_rope` into buffers of keys and values that outlive a step, behind the rows that were kept there."""

import torch

from lavin_kernels import validate
from lavin_kernels.branches import Branches
from lavin_kernels.launch import operator
from lavin_kernels.ops.qk_norm_rope import check, launch_rows
from lavin_kernels.reference import dit as reference


def _reference(cond, x, k, v, cond_lens, x_lens, kept_lens, table, branch_rows, key_rows, *rest):
    branches = Branches(tuple(cond_lens), tuple(x_lens), table, branch_rows, tuple(kept_lens), key_rows)
    return reference.qk_norm_rope_into(cond, x, k, v, branches, *rest)


@operator("qk_norm_rope_pairs_into", _reference, mutates_args=("k", "v"))
def _qk_norm_rope_into(
    cond: torch.Tensor,
    x: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cond_lens: list[int],
    x_lens: list[int],
    kept_lens: list[int],
    table: torch.Tensor,
    branch_rows: torch.Tensor,
    key_rows: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    head_size: int,
    eps: float,
) -> torch.Tensor:
    tables = (branch_rows, key_rows, positions, cos, sin)
    return launch_rows(cond, x, k, v, *tables, q_weight, k_weight, head_size, eps)


def qk_norm_rope_into(
    cond: torch.Tensor,
    x: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    branches: Branches,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    head_size: int,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`qk_norm_rope`, its keys and values written in place into buffers that outlive the step.

    What `branches.kept_lens` counts was written by an earlier step and is left as it is; the rows of this one are
    written behind it, so that attention reads one range of keys a branch. Where no rows are kept, all are written.

    Args:
        k, v: `[branches.keys, kv_heads, padded]` in the dtype of `x`, contiguous, no overlap; heads are stored at
            `padded >= head_size` elements, the rest zero in the rows written.
        The others: as of `qk_norm_rope`; `positions` are those of the rows given.

    Returns:
        q `[rows, heads, padded]` in branch-contiguous order of the rows given, or the x rows alone, in their order,
        where `cond` has no queries.

    Raises:
        TypeError, ValueError: as `qk_norm_rope`, and for buffers of another size, dtype, device or with gaps.
    """
    validate.tensor("k", k, (branches.keys, k_weight.shape[1] // head_size, None), device=x.device)
    validate.tensor("v", v, tuple(k.shape), device=x.device)
    check(cond, x, branches, positions, cos, sin, q_weight, k_weight, head_size, k.shape[2])
    for name, part in (("k", k), ("v", v)):
        validate.alike(name, part, "x", x)
        if not part.is_contiguous():
            raise ValueError(f"{name} has strides {part.stride()}; expected a contiguous tensor")
    key_rows = branches.branch_rows if branches.key_rows is None else branches.key_rows
    ranges = list(branches.cond_lens), list(branches.x_lens), list(branches.kept_lens)
    tables = branches.table, branches.branch_rows, key_rows, positions, cos, sin
    return _qk_norm_rope_into(cond, x, k, v, *ranges, *tables, q_weight, k_weight, head_size, eps)
