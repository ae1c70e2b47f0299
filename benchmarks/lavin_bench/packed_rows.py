"""The packed step without its savings: one rung of the waterfall, and nothing that anyone should run.

All branches in one pass on stream-major rows, as `lavin_rt.packed` has them, but with everything computed in every
step: the condition's embedding, the modulation (in the model's dtype), and the last block's cond stream to its end.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext

import torch

from lavin_kernels import reference as ops
from lavin_rt.layout import Form, Layout, Shape
from lavin_rt.model import (
    GATE_MLP,
    GATE_MSA,
    NORM_EPS,
    SCALE_MLP,
    SCALE_MSA,
    JDiT,
    modulate,
    patchify,
    unpatchify,
)
from lavin_rt.networks import LatentCondition, Tensors


class PackedRowsNetwork:
    """A network for the executor; the modulation linears stay in the device's memory."""

    impl = "packed rows"
    capturable = compiles = False

    def __init__(self, dit: JDiT):
        self.dit = dit
        self.config, self.device, self.dtype = dit.config, dit.device, dit.dtype
        self.modulation = [dit.modulation_parameters(index) for index in range(dit.config.depth)]

    def table(self, knots: torch.Tensor) -> Tensors:
        """The times `[n - 1]` float32."""
        return (knots[:-1].to(self.device),)

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents with their frames as rows, `[n, T, 16, h, w]`."""
        return latents.to(self.device).transpose(1, 2)

    def step(self, shape: Shape, form: Form | None = None, once: bool = False) -> PackedRowsStep:
        layout = Layout.make(self.config, shape, self.device)
        return PackedRowsStep(shape, torch.float32, self.device, None, Form.exact(shape), self, layout)

    def check(self, shape: Shape) -> None:
        """Takes every shape."""

    def workspace(self, shape: Shape) -> int:
        """Nothing is promised: who runs this rung has memory for the others, too."""
        return 0

    def running(self) -> AbstractContextManager[object]:
        return nullcontext()


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRowsStep(LatentCondition):
    """One step; the buffers hold condition latents."""

    network: PackedRowsNetwork
    layout: Layout

    def __call__(self, latents: torch.Tensor, condition: Tensors, *rows: torch.Tensor) -> torch.Tensor:
        """Velocities `[branches, 16, target frames, h, w]` at the time `rows[0]` `[]`."""
        dit, layout = self.network.dit, self.layout
        shape, branches, config = layout.shape, layout.branches, dit.config
        split = branches.split
        residual = [dit.cond_embedder(patchify(latent.to(dit.dtype))).flatten(0, 1) for latent in condition]
        residual += [dit.x_embedder(patchify(latents.to(dit.dtype))).flatten(0, 1)] * len(condition)
        residual = torch.cat(residual)
        silu_t = dit.silu_times(rows[0].expand(1))  # [1, 2, D]
        for block, linears in zip(dit.blocks, self.network.modulation, strict=True):
            attention, mlp, modulation = block.attention, block.mlp, modulate(*linears, silu_t)[0]  # [2, 4, D]
            normed = ops.ada_rms_norm(residual, split, modulation[:, SCALE_MSA], NORM_EPS)
            qkv = ops.stream_linear(normed, split, attention.qkv)
            q, k, v = ops.qk_norm_rope(
                qkv[:split],
                qkv[split:],
                branches,
                layout.positions,
                layout.cos,
                layout.sin,
                attention.q_norm,
                attention.k_norm,
                config.head_size,
                NORM_EPS,
            )
            update = ops.stream_linear(ops.joint_attention(q, k, v, branches, config.head_size), split, attention.proj)
            residual, normed = ops.gated_residual_ada_rms_norm(
                residual, update, split, modulation[:, GATE_MSA], modulation[:, SCALE_MLP], NORM_EPS
            )
            update = ops.stream_linear(ops.swiglu(ops.stream_linear(normed, split, mlp.gate_up)), split, mlp.down)
            residual = ops.gated_residual(residual, update, split, modulation[:, GATE_MLP], NORM_EPS)
        tokens = dit.head(residual[split:].unflatten(0, (shape.branches, -1)), silu_t[:, 1])
        return unpatchify(tokens, shape.target_frames, shape.height, shape.width)
