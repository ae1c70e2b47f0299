"""The operators of a packed step as PyTorch runs them fastest on a CPU without a compiler: fewer passes over memory.

Functions of the same names in `lavin_kernels.reference.dit` say what they compute, and run where a step is compiled.
The two differ by rounding, and these have no gradients: results are written into buffers. Rows are taken a part at a
time, so that what a row becomes on its way stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lavin_kernels.branches import Branches
from lavin_kernels.reference.dit import joint_attention, stream_linear

# `joint_attention` and `stream_linear` are the references: nothing is gained on them here.
__all__ = [
    "ada_rms_norm",
    "gated_residual_ada_rms_norm",
    "joint_attention",
    "qk_norm_rope",
    "qk_norm_rope_into",
    "stream_linear",
    "swiglu",
]

PART = 2**19  # elements, two megabytes in float32


def ada_rms_norm(rows: torch.Tensor, split: int, scale: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`rms(rows) * (1 + scale[stream])`."""
    normed, factor = torch.empty_like(rows), 1 + scale
    for part in _parts(rows):
        _by_stream(torch.mul, (_rms_norm(rows[part], eps),), factor, split - part.start, normed[part])
    return normed


def gated_residual_ada_rms_norm(
    residual: torch.Tensor,
    update: torch.Tensor,
    split: int,
    gate: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual + gate[stream] * rms(update)` and the `ada_rms_norm` of it."""
    total, normed, factor = torch.empty_like(residual), torch.empty_like(residual), 1 + scale
    for part in _parts(residual):
        of_part, here = total[part], split - part.start
        _by_stream(torch.addcmul, (residual[part], _rms_norm(update[part], eps)), gate, here, of_part)
        _by_stream(torch.mul, (_rms_norm(of_part, eps),), factor, here, normed[part])
    return total, normed


def qk_norm_rope(
    cond: torch.Tensor,
    x: torch.Tensor,
    branches: Branches,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    head_size: int,
    eps: float = 1e-6,
    padded_head_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm over all heads of q and of k, 3D rotary positions, and the change to branch-contiguous order."""
    k, v = (_heads(x, branches.rows, k_weight, head_size, padded_head_size or head_size) for _ in range(2))
    return qk_norm_rope_into(cond, x, k, v, branches, positions, cos, sin, q_weight, k_weight, head_size, eps), k, v


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
    """`qk_norm_rope` that writes keys and values into buffers which outlive the step, behind the rows kept there."""
    kv_size, with_queries = k_weight.shape[-1], cond.shape[1] == x.shape[1]
    turns = torch.complex(cos, sin)[positions].flatten(1).tensor_split((len(cond),))  # [rows, head_size / 2]
    q = _heads(x, branches.rows if with_queries else len(x), q_weight, head_size, k.shape[2])
    targets = [buffer[..., :head_size] for buffer in (q, k, v)]
    for stream, (rows, places) in enumerate(zip((cond, x), _places(branches, with_queries), strict=True)):
        for part in _parts(rows):
            of_q, of_k, of_v = rows[part].split([rows.shape[1] - 2 * kv_size, kv_size, kv_size], dim=1)
            turn, values = turns[stream][part], of_v.unflatten(-1, (-1, head_size))
            keys = _turned(of_k, k_weight[stream], turn, head_size, eps)
            queries = _turned(of_q, q_weight[stream], turn, head_size, eps) if of_q.shape[1] else None
            for piece, *starts in _pieces(places, part):
                for target, start, heads in zip(targets, (*starts, starts[1]), (queries, keys, values), strict=True):
                    if heads is not None:
                        target[start : start + piece.stop - piece.start] = heads[piece]
    return q


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `[rows, 2 * inner]`, gate first; returns `[rows, inner]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    product = torch.empty_like(gate, memory_format=torch.contiguous_format)
    for part in _parts(gate):
        torch.ops.aten.silu.out(gate[part], out=product[part]).mul_(up[part])
    return product


def _parts(rows: torch.Tensor) -> Iterator[slice]:
    size = max(1, PART // rows.shape[1])
    return (slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size))


def _by_stream(
    operator: Callable[..., torch.Tensor],
    rows: tuple[torch.Tensor, ...],
    factors: torch.Tensor,
    split: int,
    out: torch.Tensor,
) -> None:
    """`operator(*rows, factor of the stream)` into `out`, whose first `split` rows are the cond stream's."""
    split = min(max(split, 0), len(out))
    for factor, part in zip(factors, (slice(0, split), slice(split, len(out))), strict=True):
        if part.start < part.stop:
            operator(*(values[part] for values in rows), factor, out=out[part])


def _heads(like: torch.Tensor, rows: int, weight: torch.Tensor, head_size: int, padded: int) -> torch.Tensor:
    """A buffer of heads, zeros behind each where they are stored wider than they are."""
    make = like.new_empty if padded == head_size else like.new_zeros
    return make(rows, weight.shape[-1] // head_size, padded)


def _places(branches: Branches, with_queries: bool) -> tuple[list[tuple[int, int, int, int]], ...]:
    """Of both streams, the runs of rows of every branch: where it begins and ends in the stream, where its queries and
    its keys begin.
    """
    places: tuple[list[tuple[int, int, int, int]], ...] = ([], [])
    ends, query_end, key_end = [0, 0], 0, 0
    for *lens, key_len in zip(branches.cond_lens, branches.x_lens, branches.key_lens, strict=True):
        key_end += key_len - sum(lens)
        for stream, rows in enumerate(lens):
            places[stream].append((ends[stream], ends[stream] + rows, query_end, key_end))
            ends[stream] += rows
            query_end += rows if stream or with_queries else 0
            key_end += rows
    return places


def _pieces(places: list[tuple[int, int, int, int]], part: slice) -> Iterator[tuple[slice, int, int]]:
    """The rows of a part of a stream that every run has, and where their queries and their keys begin."""
    for first, end, query, key in places:
        start, stop = max(first, part.start), min(end, part.stop)
        if start < stop:
            yield slice(start - part.start, stop - part.start), query + start - first, key + start - first


def _inverse_rms(rows: torch.Tensor, eps: float) -> torch.Tensor:
    """`[rows, 1]` in float32, or in float64."""
    compute = torch.promote_types(rows.dtype, torch.float32)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=compute)
    return norm.square_().div_(rows.shape[1]).add_(eps).rsqrt_()


def _rms_norm(rows: torch.Tensor, eps: float) -> torch.Tensor:
    """In float32, or in float64."""
    inverse = _inverse_rms(rows, eps)
    return rows.to(inverse.dtype) * inverse


def _turned(rows: torch.Tensor, weight: torch.Tensor, turns: torch.Tensor, head_size: int, eps: float) -> torch.Tensor:
    """Heads `[rows, heads * head_size]` normed and turned, `[rows, heads, head_size]`, elements of a pair side by side:
    the real and the imaginary part of a number that a product turns.
    """
    inverse = _inverse_rms(rows, eps)
    weighed = rows.to(inverse.dtype) * weight.to(inverse.dtype)
    pairs = torch.complex(*weighed.unflatten(-1, (-1, 3, 2, head_size // 6)).unbind(-2)).flatten(-2)
    pairs *= (turns * inverse).unsqueeze(1)
    return torch.view_as_real(pairs).flatten(-2)
