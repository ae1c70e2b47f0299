"""The denoiser of an artifact for CUDA: `lavin_rt.dit.packed`'s step for branches of one kind, kernels inside.

All branches of a call have the same rows, so that the row ranges are a function of the inputs' sizes: the tables that
the kernels read are made inside of the graph, and the number of branches may vary like every other size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import lavin_kernels
from lavin_export.networks.denoiser import POSITIONS
from lavin_kernels.branches import Branches
from lavin_rt.dit.layout import Form, Layout
from lavin_rt.dit.model import JDiT, patchify
from lavin_rt.dit.packed import PackedStep
from lavin_rt.dit.rope import rotary_tables

BATCH = (1, 16)  # branches in a call; `lavin_kernels` leaves a graph room for as many


class KernelDenoiser(nn.Module):
    """Velocity of branches of one kind through the operators of `lavin_kernels`; arguments and result as of
    `lavin_export.networks.denoiser.BranchDenoiser`.

    On a CPU the operators' references run, which know no more than one branch here (batch 1) unless Triton's
    interpreter runs the kernels themselves.

    Args:
        dit: the plain model, whose tensors are shared; its modulation linears and time embedder are not used.
    """

    rotary_cos: torch.Tensor
    rotary_sin: torch.Tensor

    def __init__(self, dit: JDiT):
        super().__init__()
        self.config, self.dtype = dit.config, dit.dtype
        self.cond_embedder, self.x_embedder = dit.cond_embedder, dit.x_embedder
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attention": block.attention, "mlp": block.mlp}) for block in dit.blocks
        )
        self.head = nn.ModuleDict({"linear": dit.head.linear})
        cos, sin = rotary_tables(POSITIONS, dit.config.head_size, dit.device)
        self.register_buffer("rotary_cos", cos)  # [POSITIONS, head_size / 6] float32
        self.register_buffer("rotary_sin", sin)

    def forward(
        self, latents: torch.Tensor, cond_latents: torch.Tensor, modulation: torch.Tensor, head_scale: torch.Tensor
    ) -> torch.Tensor:
        batch, _, frames, height, width = latents.shape
        grid, cond_frames = (height // 2, width // 2), cond_latents.shape[2]
        lens = cond_frames * grid[0] * grid[1], frames * grid[0] * grid[1]
        # Lists of lengths with an item a branch would fix the number of branches in the graph. The kernels read the
        # tables; the lists are the references', which one branch of all rows satisfies.
        branches = Branches((batch * lens[0],), (batch * lens[1],), *row_tables(batch, *lens, latents.device))
        positions = row_positions(batch, cond_frames, frames, *grid, latents.device)
        model: Any = self  # what a step reads of a `JDiT` is here
        shape: Any = SimpleNamespace(queries=1, target_frames=frames, height=height, width=width)
        layout = Layout(shape, Form(), branches, ((0, branches.split),), positions, self.rotary_cos, self.rotary_sin)
        step = PackedStep(model, layout, "triton")
        step.ops = GraphOperators()
        cond_rows = self.cond_embedder(patchify(cond_latents)).flatten(0, 1)
        return step(latents, cond_rows, modulation, head_scale)


class GraphOperators:
    """`lavin_kernels` without the checks that the branches' lists are those of the tables."""

    def __getattr__(self, name: str) -> Any:
        return getattr(lavin_kernels, name)

    def qk_norm_rope(
        self, cond: torch.Tensor, x: torch.Tensor, branches: Branches, *rotation: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _ = lavin_kernels.qk_norm_rope  # the first use of a kernel registers its operator
        lens = list(branches.cond_lens), list(branches.x_lens)
        return torch.ops.lavin.qk_norm_rope_pairs(cond, x, *lens, branches.table, branches.branch_rows, *rotation)

    def joint_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, branches: Branches, head_size: int
    ) -> torch.Tensor:
        _ = lavin_kernels.joint_attention
        lens = list(branches.cond_lens), list(branches.x_lens)
        return torch.ops.lavin.joint_attention(q, k, v, branches.table, *lens, head_size, head_size**-0.5)


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
