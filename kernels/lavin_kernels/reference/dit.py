"""Plain PyTorch meaning of every operator of the diffusion transformer: the oracle of tests and benchmarks.

Functions of the same names in `lavin_kernels` say what the arguments and results are, check them, and call these for
tensors on a CPU. Statistics, rotary positions and softmax are computed in float32 (float64 for float64 tensors), and
results are in the dtype of the rows. Stream 0 is "cond", stream 1 is "x".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lavin_kernels.branches import Branches


def _scale_streams_(rows: torch.Tensor, split: int, factor: torch.Tensor) -> torch.Tensor:
    """Multiplies the rows of each stream by its `factor[stream]`, in place."""
    rows[:split].mul_(factor[0])
    rows[split:].mul_(factor[1])
    return rows


def ada_rms_norm(rows: torch.Tensor, split: int, scale: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`rms(rows) * (1 + scale[stream])`, without a learned weight."""
    return _scale_streams_(F.rms_norm(rows, rows.shape[-1:], eps=eps), split, 1 + scale)


def gated_residual(
    residual: torch.Tensor, update: torch.Tensor, split: int, gate: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """`residual + gate[stream] * rms(update)`."""
    return _scale_streams_(F.rms_norm(update, update.shape[-1:], eps=eps), split, gate).add_(residual)


def gated_residual_ada_rms_norm(
    residual: torch.Tensor,
    update: torch.Tensor,
    split: int,
    gate: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_residual` and the `ada_rms_norm` that follows it, both results."""
    residual = gated_residual(residual, update, split, gate, eps)
    return residual, ada_rms_norm(residual, split, scale, eps)


def apply_rope(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates `[..., heads, head_size]` by per-row angles: thirds of the head for (frame, row, column), half-split
    pairs.

    Args:
        heads: `[..., heads, head_size]`.
        cos, sin: `[..., 3, head_size / 6]`, of the angles of every row.
    """
    cos, sin = (torch.stack(parts, dim=-2).flatten(-3).unsqueeze(-2) for parts in ((cos, cos), (-sin, sin)))
    partners = heads.unflatten(-1, (3, 2, -1)).flip(-2).flatten(-3)
    return torch.addcmul(heads * cos, partners, sin)


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
    cond_parts, x_parts = _normed_rotated(cond, x, positions, cos, sin, q_weight, k_weight, head_size, eps)
    q = _query_rows(cond_parts[0], x_parts[0], branches)
    k, v = (_branch_contiguous(*parts, branches) for parts in zip(cond_parts[1:], x_parts[1:], strict=True))
    if padded_head_size is not None and padded_head_size != head_size:
        q, k, v = (F.pad(part, (0, padded_head_size - head_size)) for part in (q, k, v))
    return q, k, v


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
    cond_parts, x_parts = _normed_rotated(cond, x, positions, cos, sin, q_weight, k_weight, head_size, eps)
    for target, of_cond, of_x in zip((k, v), cond_parts[1:], x_parts[1:], strict=True):
        end = 0
        pieces = zip(of_cond.split(branches.cond_lens), of_x.split(branches.x_lens), branches.key_lens, strict=True)
        for cond_rows, x_rows, rows in pieces:
            end += rows
            middle = end - x_rows.shape[0]
            target[middle - cond_rows.shape[0] : middle, :, :head_size] = cond_rows
            target[middle:end, :, :head_size] = x_rows
    q = _query_rows(cond_parts[0], x_parts[0], branches)
    return F.pad(q, (0, k.shape[2] - head_size)) if k.shape[2] != head_size else q


def _normed_rotated(cond, x, positions, cos, sin, q_weight, k_weight, head_size: int, eps: float):
    """The q, k, v `[rows, heads, head_size]` of each stream, pairs of q and k side by side; no heads of q where cond
    has no queries.
    """
    kv_size, split = k_weight.shape[-1], cond.shape[0]
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(compute)[positions], sin.to(compute)[positions]  # [rows, 3, head_size / 6]

    def rotated(part: torch.Tensor, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        if not part.shape[1]:
            return part.unflatten(-1, (0, head_size))
        normed = F.rms_norm(part.to(compute), part.shape[-1:], weight.to(compute), eps)
        # `apply_rope`, with pairs side by side: this form, because a compiler makes vector code of it.
        first, second = normed.unflatten(-1, (-1, 3, 2, head_size // 6)).unbind(-2)
        cos_of, sin_of = (table[rows].unsqueeze(1) for table in (cos, sin))
        turned = first * cos_of - second * sin_of, second * cos_of + first * sin_of
        return torch.stack(turned, dim=-1).flatten(-3).to(x.dtype)

    for_streams = []
    for stream, (rows, part) in enumerate(((slice(0, split), cond), (slice(split, None), x))):
        q, k, v = part.split([part.shape[1] - 2 * kv_size, kv_size, kv_size], dim=1)
        heads = rotated(q, q_weight[stream], rows), rotated(k, k_weight[stream], rows)
        for_streams.append((*heads, v.unflatten(-1, (-1, head_size))))
    return for_streams


def _branch_contiguous(of_cond: torch.Tensor, of_x: torch.Tensor, branches: Branches) -> torch.Tensor:
    pieces = zip(of_cond.split(branches.cond_lens), of_x.split(branches.x_lens), strict=True)
    return torch.cat([piece for pair in pieces for piece in pair])


def _query_rows(of_cond: torch.Tensor, of_x: torch.Tensor, branches: Branches) -> torch.Tensor:
    return _branch_contiguous(of_cond, of_x, branches) if of_cond.shape[1] else of_x


def joint_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    branches: Branches,
    head_size: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Full (non-causal) attention of every branch over all its rows, cond and x together, with grouped heads."""
    outputs = []
    for part_q, part_k, part_v in _branch_parts(q, k, v, branches, head_size):
        outputs.append(grouped_attention(part_q, part_k, part_v, scale)[0].transpose(0, 1).flatten(1))
    return _stream_major(outputs, branches)


def grouped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """`softmax(scale q k^T) v` of `[B, heads, rows, head_size]`, query head i reading key/value head `i // group`.

    PyTorch's fused CUDA kernels know grouped heads in 16 bits from compute capability 8.0 on only; beyond that it would
    hold all scores in memory, 13 GB at 10,240 rows and 32 heads. There the heads are repeated instead.
    """
    fused = q.dtype in (torch.bfloat16, torch.float16) and q.is_cuda and torch.cuda.get_device_capability() >= (8, 0)
    if not q.is_cuda or fused:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def joint_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    branches: Branches,
    head_size: int,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`joint_attention` and the natural log-sum-exp of its scaled scores, stream-major."""
    scale = head_size**-0.5 if scale is None else scale
    lses = []
    for part_q, part_k, _ in _branch_parts(q, k, v, branches, head_size):
        compute = torch.promote_types(q.dtype, torch.float32)
        keys = part_k.to(compute).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        lses.append((part_q.to(compute) @ keys.transpose(-1, -2) * scale).logsumexp(-1)[0].transpose(0, 1))
    return joint_attention(q, k, v, branches, head_size, scale), _stream_major(lses, branches)


def _branch_parts(q, k, v, branches: Branches, head_size: int):
    """The q, k, v of each branch as `[1, heads, rows, head_size]`."""
    lens = [cond + x for cond, x in zip(branches.cond_lens, branches.x_lens, strict=True)]
    q_lens, key_lens = lens if q.shape[0] == sum(lens) else branches.x_lens, branches.key_lens
    for part in zip(q.split(q_lens), k.split(key_lens), v.split(key_lens), strict=True):
        yield tuple(rows[..., :head_size].transpose(0, 1).unsqueeze(0) for rows in part)


def _stream_major(parts: list[torch.Tensor], branches: Branches) -> torch.Tensor:
    """Branch outputs `[rows of the branch, ...]`, or their x rows alone, to one stream-major tensor."""
    if sum(part.shape[0] for part in parts) != branches.rows:
        return torch.cat(parts)
    pairs = [part.split([cond, part.shape[0] - cond]) for part, cond in zip(parts, branches.cond_lens, strict=True)]
    return torch.cat([pair[0] for pair in pairs] + [pair[1] for pair in pairs])


def stream_linear(rows: torch.Tensor, split: int, weight: torch.Tensor) -> torch.Tensor:
    """Bias-free linear of each stream with its own weight."""
    wants_gradient = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    if torch.compiler.is_compiling() or wants_gradient:
        return torch.cat([F.linear(rows[:split], weight[0]), F.linear(rows[split:], weight[1])])
    # Eagerly, the copy that a compiler plans away would be made.
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for stream, part in enumerate((slice(0, split), slice(split, None))):
        torch.mm(rows[part], weight[stream].T, out=out[part])
    return out


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of the joined projection `[rows, 2 * inner]`, gate first; returns `[rows, inner]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
