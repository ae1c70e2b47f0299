"""The denoiser of an artifact for CUDA: the packed step of `lavin_rt.packed` for branches of one kind, kernels inside.

All branches of a call have the same rows, so that the row ranges are a function of the inputs' sizes: the tables that
the kernels read are made inside of the graph, and the number of branches may vary like every other size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import lavin_kernels
from lavin_export.denoiser import POSITIONS, fixed
from lavin_rt.model import GATE_MLP, GATE_MSA, NORM_EPS, SCALE_MLP, SCALE_MSA, JDiT, patchify, unpatchify
from lavin_rt.rope import rotary_tables

BATCH = (1, 16)  # branches in a call; `lavin_kernels` leaves a graph room for as many


class JointBlock(nn.Module):
    """A block's weights of both streams, the plain model's own tensors."""

    def __init__(self, block: nn.Module):
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.qkv, self.proj = fixed(attention.qkv), fixed(attention.proj)
        self.q_norm, self.k_norm = fixed(attention.q_norm), fixed(attention.k_norm)
        self.gate_up, self.down = fixed(mlp.gate_up), fixed(mlp.down)


class LastBlock(nn.Module):
    """The last block's weights: of the cond stream its keys and values alone."""

    def __init__(self, block: nn.Module, hidden: int):
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.cond_kv, self.x_qkv = fixed(attention.qkv[0, hidden:]), fixed(attention.qkv[1])
        self.q_norm, self.k_norm = fixed(attention.q_norm), fixed(attention.k_norm)
        self.proj = fixed(attention.proj[1])
        self.gate_up, self.down = fixed(mlp.gate_up[1]), fixed(mlp.down[1])


class KernelDenoiser(nn.Module):
    """Velocity of branches of one kind through the operators of `lavin_kernels`; arguments and result as of
    `lavin_export.denoiser.Denoiser`.

    On a CPU the operators' references run, which know no more than one branch here (batch 1) unless Triton's
    interpreter runs the kernels themselves.

    Args:
        dit: the plain model, whose tensors are shared; its modulation linears and time embedder are not used.
    """

    def __init__(self, dit: JDiT):
        super().__init__()
        config = dit.config
        self.config = config
        self.cond_embedder, self.x_embedder = dit.cond_embedder, dit.x_embedder
        *blocks, last = dit.blocks
        self.blocks = nn.ModuleList([*map(JointBlock, blocks), LastBlock(last, config.hidden_size)])
        self.head = dit.head.linear
        cos, sin = rotary_tables(POSITIONS, config.head_size, dit.device)
        self.register_buffer("rotary_cos", cos)  # [POSITIONS, head_size / 6] float32
        self.register_buffer("rotary_sin", sin)
        # The first use of a kernel registers its operator, which the graph calls by name.
        _ = lavin_kernels.qk_norm_rope, lavin_kernels.joint_attention
        # Tensor cores take 16 elements of a head at a time; zeros written once spare the attention kernel its masks.
        self.padded_head_size = -(-config.head_size // 16) * 16

    def forward(
        self, latents: torch.Tensor, cond_latents: torch.Tensor, modulation: torch.Tensor, head_scale: torch.Tensor
    ) -> torch.Tensor:
        config = self.config
        batch, _, frames, height, width = latents.shape
        grid = (height // 2, width // 2)
        lens = cond_latents.shape[2] * grid[0] * grid[1], frames * grid[0] * grid[1]
        split = batch * lens[0]
        tables = row_tables(batch, *lens, latents.device)
        positions = row_positions(batch, cond_latents.shape[2], frames, *grid, latents.device)
        cond = self.cond_embedder(patchify(cond_latents)).flatten(0, 1)
        x = self.x_embedder(patchify(latents)).flatten(0, 1)
        residual = torch.cat([cond, x])  # [rows, D], cond of all branches, then x of all branches
        normed = lavin_kernels.ada_rms_norm(residual, split, modulation[0, :, SCALE_MSA], NORM_EPS)
        for index, block in enumerate(self.blocks):
            last = index + 1 == config.depth
            if last:
                parts = F.linear(normed[:split], block.cond_kv), F.linear(normed[split:], block.x_qkv)
            else:
                qkv = lavin_kernels.stream_linear(normed, split, block.qkv)
                parts = qkv[:split], qkv[split:]
            update = self._attention(parts, block, tables, lens, positions)
            if last:
                residual, split = residual[split:], 0
                update = F.linear(update, block.proj)
            else:
                update = lavin_kernels.stream_linear(update, split, block.proj)
            residual, normed = lavin_kernels.gated_residual_ada_rms_norm(
                residual, update, split, modulation[index, :, GATE_MSA], modulation[index, :, SCALE_MLP], NORM_EPS
            )
            if last:
                update = F.linear(lavin_kernels.swiglu(F.linear(normed, block.gate_up)), block.down)
                next_scale = head_scale.expand(2, -1)
            else:
                inner = lavin_kernels.swiglu(lavin_kernels.stream_linear(normed, split, block.gate_up))
                update = lavin_kernels.stream_linear(inner, split, block.down)
                next_scale = modulation[index + 1, :, SCALE_MSA]
            residual, normed = lavin_kernels.gated_residual_ada_rms_norm(
                residual, update, split, modulation[index, :, GATE_MLP], next_scale, NORM_EPS
            )
        return unpatchify(self.head(normed).unflatten(0, (batch, lens[1])), frames, height, width)

    def _attention(
        self,
        parts: tuple[torch.Tensor, torch.Tensor],
        block: nn.Module,
        tables: tuple[torch.Tensor, torch.Tensor],
        lens: tuple[int, int],
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Joint attention of the joined q, k, v of both streams' rows; `[query rows, D]` in stream-major order."""
        table, branch_rows = tables
        size = self.config.head_size
        # The operators by name: their lists of lengths, one item a branch, would fix the number of branches in the
        # graph. The kernels read the tables; the lists are the references', which one branch of all rows satisfies.
        lengths = [parts[0].shape[0]], [parts[1].shape[0]]
        q, k, v = torch.ops.lavin.qk_norm_rope(
            *parts,
            *lengths,
            table,
            branch_rows,
            positions,
            self.rotary_cos,
            self.rotary_sin,
            block.q_norm,
            block.k_norm,
            size,
            NORM_EPS,
            self.padded_head_size,
        )
        return torch.ops.lavin.joint_attention(q, k, v, table, *lengths, size, size**-0.5)


def row_tables(batch: int, cond: int, x: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`Branches.table` `[batch, 4]` and `Branches.branch_rows` `[rows]` of branches of `cond` and `x` rows each."""
    branch = torch.arange(batch, device=device)
    table = torch.stack(
        [torch.full_like(branch, cond), torch.full_like(branch, x), branch * cond, batch * cond + branch * x], dim=1
    )
    first = (branch * (cond + x))[:, None]
    of_cond = (first + torch.arange(cond, device=device)).flatten()
    of_x = (first + cond + torch.arange(x, device=device)).flatten()
    return table.int(), torch.cat([of_cond, of_x]).int()


def row_positions(
    batch: int, cond_frames: int, frames: int, rows: int, columns: int, device: torch.device
) -> torch.Tensor:
    """(frame, row, column) of every stream-major row, `[rows, 3]` int32; a branch's target follows its condition."""

    def of_stream(count: int, first: int) -> torch.Tensor:
        shape = (batch, count, rows, columns)
        axes = (
            (first + torch.arange(count, device=device))[:, None, None],
            torch.arange(rows, device=device)[:, None],
            torch.arange(columns, device=device),
        )
        return torch.stack([axis.expand(shape) for axis in axes], dim=-1).flatten(0, 3)

    return torch.cat([of_stream(cond_frames, 0), of_stream(frames, cond_frames)]).int()
