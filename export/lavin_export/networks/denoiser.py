"""The denoiser of an artifact: one branch of one evaluation, the modulation given, as plain torch calls.

The same function as `JDiT.forward` with what the mathematics does not need taken out: the modulation comes in as a row
of the table, and in the last block the cond stream stops at its keys and values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from lavin_rt.artifact.parts import Ranges, TensorSpec
from lavin_rt.checkpoint.names import STREAMS, Place, resident_layout
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.model import GATE_MLP, GATE_MSA, NORM_EPS, SCALE_MLP, SCALE_MSA, Block, JDiT, patchify, unpatchify
from lavin_rt.dit.rope import rotary_tables

POSITIONS = 1024  # frames of the joint sequence, token rows and token columns that the rotary table has
RANGES = {"batch": (1, 64), "target_frames": (1, 512), "cond_frames": (1, 512), "height": (2, 2048), "width": (2, 2048)}


class Stream(nn.Module):
    """One stream's weights of one block, views of the plain model's; `kv` instead of the rest where only keys and
    values are wanted.
    """

    def __init__(self, block: Block, stream: int, hidden: int, keys_only: bool):
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.k_norm = fixed(attention.k_norm[stream])
        if keys_only:
            self.kv = fixed(attention.qkv[stream, hidden:])
            return
        self.qkv = fixed(attention.qkv[stream])
        self.q_norm = fixed(attention.q_norm[stream])
        self.proj = fixed(attention.proj[stream])
        self.gate_up = fixed(mlp.gate_up[stream])
        self.down = fixed(mlp.down[stream])


class BranchDenoiser(nn.Module):
    """Velocity of one guidance branch.

    Parameters are views of the given model's (no copy), one per stream, named `blocks.N.cond.qkv` and so on; `sources`
    says what of the official checkpoint each is. A model on the meta device or of fake tensors gives a module that can
    be traced without weights.

    Args:
        dit: the plain model; its modulation linears and time embedder are not used.

    Args of the call:
        latents: `[batch, 16, target_frames, height, width]` in the model's dtype; height and width even.
        cond_latents: `[batch, 16, cond_frames, height, width]`, likewise; cond_frames + target_frames, height / 2 and
            width / 2 at most `POSITIONS`.
        modulation: `[depth, 2, 4, D]` float32, one evaluation of the modulation table, tanh applied to the gates.
        head_scale: `[D]` float32, likewise.

    Returns of the call:
        velocity, shape and dtype of `latents`.
    """

    rotary_cos: torch.Tensor
    rotary_sin: torch.Tensor
    unit: torch.Tensor

    def __init__(self, dit: JDiT):
        super().__init__()
        config = dit.config
        self.config = config
        self.cond_embedder, self.x_embedder = dit.cond_embedder, dit.x_embedder
        self.blocks = cast("list[Mapping[str, Stream]]", nn.ModuleList())
        for index, block in enumerate(dit.blocks):
            last = index + 1 == config.depth
            streams = {
                name: Stream(block, stream, config.hidden_size, keys_only=last and name == "cond")
                for stream, name in enumerate(STREAMS)
            }
            self.blocks.append(cast("Mapping[str, Stream]", nn.ModuleDict(streams)))
        self.head = dit.head.linear
        cos, sin = rotary_tables(POSITIONS, config.head_size, dit.device)
        self.register_buffer("rotary_cos", cos)  # [POSITIONS, head_size / 6] float32
        self.register_buffer("rotary_sin", sin)
        # RMSNormalization of ONNX wants a weight; one of ones for all of them, so that it has a name.
        self.register_buffer("unit", torch.ones(config.hidden_size, dtype=dit.dtype, device=dit.device))

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def forward(
        self, latents: torch.Tensor, cond_latents: torch.Tensor, modulation: torch.Tensor, head_scale: torch.Tensor
    ) -> torch.Tensor:
        return self.velocity(latents, cond_latents, modulation, head_scale)

    def velocity(
        self,
        latents: torch.Tensor,
        cond_latents: torch.Tensor,
        modulation: torch.Tensor,
        head_scale: torch.Tensor,
        first_frame: int = 0,
        joined: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """The velocity, with the place of the first condition frame in the joint sequence, and what makes of a block's
        keys and values `[B, L, kv_heads, head_size]`, cond's rows first, those that are attended to.
        """
        frames, height, width = latents.shape[2:]
        joint = cond_latents.shape[2] + frames
        angles = [
            self._angles(table, first_frame, joint, height // 2, width // 2)
            for table in (self.rotary_cos, self.rotary_sin)
        ]
        cond, x = self.cond_embedder(patchify(cond_latents)), self.x_embedder(patchify(latents))
        rows = modulation.flatten(0, 2)  # [depth * 2 * 4, D]
        for index, block in enumerate(self.blocks):
            of_cond, of_x = ([rows[8 * index + 4 * stream + kind] for kind in range(4)] for stream in range(2))
            cond, x = self._block(block, cond, x, (of_cond, of_x), angles, joined)
        return unpatchify(self.head(self._ada_norm(x, head_scale)), frames, height, width)

    def _block(
        self,
        block: Mapping[str, Stream],
        cond: torch.Tensor,
        x: torch.Tensor,
        modulation: tuple[list[torch.Tensor], list[torch.Tensor]],
        angles: list[torch.Tensor],
        joined: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`cond` `[B, Lc, D]`, `x` `[B, Lx, D]`, `modulation` four `[D]` per stream; returns the new cond and x, the
        old cond where the block wants its keys and values only.
        """
        config, of_cond, of_x = self.config, block["cond"], block["x"]
        hidden, kv = config.hidden_size, config.kv_size
        cond_mod, x_mod = modulation
        last = hasattr(of_cond, "kv")
        cond_qkv = F.linear(self._ada_norm(cond, cond_mod[SCALE_MSA]), of_cond.kv if last else of_cond.qkv)
        x_qkv = F.linear(self._ada_norm(x, x_mod[SCALE_MSA]), of_x.qkv)
        q = self.heads(self._norm(x_qkv[..., :hidden], of_x.q_norm))
        if not last:
            q = torch.cat([self.heads(self._norm(cond_qkv[..., :hidden], of_cond.q_norm)), q], dim=1)
            cond_qkv = cond_qkv[..., hidden:]
        keys = [
            self.heads(self._norm(part[..., :kv], weight))
            for part, weight in ((cond_qkv, of_cond.k_norm), (x_qkv[..., hidden:], of_x.k_norm))
        ]
        values = [self.heads(part) for part in (cond_qkv[..., kv:], x_qkv[..., hidden + kv :])]
        k, v = torch.cat(keys, dim=1), torch.cat(values, dim=1)  # [B, L, kv heads, head size]
        length = cond.shape[1]
        q_angles = [table[length:] for table in angles] if last else angles
        q, k = rotated(q, *q_angles), rotated(k, *angles)
        if joined is not None:
            k, v = joined(k, v)
        # Tracing for ONNX refuses groups of one.
        grouped = {"scale": config.head_size**-0.5, "enable_gqa": config.kv_group > 1}
        joint = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **grouped)
        joint = joint.transpose(1, 2).flatten(2)  # [B, L or Lx, D]
        if last:
            return cond, self._residuals(x, joint, of_x, x_mod)
        cond = self._residuals(cond, joint[:, :length], of_cond, cond_mod)
        return cond, self._residuals(x, joint[:, length:], of_x, x_mod)

    def _residuals(self, rows: torch.Tensor, joint: torch.Tensor, of: Stream, mod: list[torch.Tensor]) -> torch.Tensor:
        """One stream behind its attention: output projection, MLP, and the gated residual of either."""
        rows = rows + self._norm(F.linear(joint, of.proj), self.unit) * mod[GATE_MSA].to(rows.dtype)
        gate_up = F.linear(self._ada_norm(rows, mod[SCALE_MLP]), of.gate_up)
        inner = self.config.mlp_size
        update = F.linear(F.silu(gate_up[..., :inner]) * gate_up[..., inner:], of.down)
        return rows + self._norm(update, self.unit) * mod[GATE_MLP].to(rows.dtype)

    def heads(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (-1, self.config.head_size))

    def _norm(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(rows, rows.shape[-1:], weight, NORM_EPS)

    def _ada_norm(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self._norm(rows, self.unit) * (1 + scale).to(rows.dtype)

    def _angles(self, table: torch.Tensor, first: int, frames: int, rows: int, columns: int) -> torch.Tensor:
        """Cosines or sines of every token of frames from the first on, `[tokens, 1, 3, 1, head_size / 6]`, as
        `lavin_rt.dit.rope.token_angles`.
        """
        shape = (frames, rows, columns, table.shape[1])
        axes = table[first : first + frames, None, None], table[:rows, None], table[:columns]
        return torch.stack([axis.expand(shape) for axis in axes], dim=-2).flatten(0, 2)[:, None, :, None]


def fixed(weight: torch.Tensor) -> nn.Parameter:
    """A parameter that shares a weight's memory and is not trained."""
    return nn.Parameter(weight.detach(), requires_grad=False)


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of `[B, L, heads, head_size]` by the angles `[L, 1, 3, 1, head_size / 6]`, in float32."""
    pairs = heads.float().unflatten(-1, (3, 2, -1))
    first, second = pairs[..., :1, :], pairs[..., 1:, :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-2)
    return turned.flatten(-3).to(heads.dtype)


def dynamic_shapes(ranges: dict[str, tuple[int, int]] = RANGES) -> dict[str, dict[int, object]]:
    """What of the inputs may vary, as `torch.export.export(..., dynamic_shapes=...)` wants it."""
    from torch.export import Dim

    batch, target, cond = (Dim(name, min=ranges[name][0], max=ranges[name][1]) for name in list(RANGES)[:3])
    height, width = (2 * Dim(f"token_{name}", min=1, max=ranges[name][1] // 2) for name in ("height", "width"))
    return {
        "latents": {0: batch, 2: target, 3: height, 4: width},
        "cond_latents": {0: batch, 2: cond, 3: height, 4: width},
        "modulation": {},
        "head_scale": {},
    }


def example_inputs(
    config: DiTConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    sizes: tuple[int, int, int, int, int] = (2, 2, 3, 4, 6),
) -> tuple[torch.Tensor, ...]:
    """Random inputs to trace or try a `BranchDenoiser` with; sizes are (batch, target frames, cond frames, height,
    width).
    """
    batch, target, cond, height, width = sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    latents = draw(batch, config.in_channels, target, height, width).to(device, dtype)
    cond_latents = draw(batch, config.in_channels, cond, height, width).to(device, dtype)
    modulation = 0.3 * draw(config.depth, 2, 4, config.hidden_size)
    return latents, cond_latents, modulation.to(device), (0.3 * draw(config.hidden_size)).to(device)


def specification(config: DiTConfig, dtype: str) -> tuple[list[TensorSpec], list[TensorSpec], Ranges]:
    """Inputs, outputs and ranges of the part "denoiser", as the manifest has them."""
    grid = ["height", "width"]
    shape: list[int | str] = ["batch", config.in_channels, "target_frames", *grid]
    latents: TensorSpec = {"name": "latents", "dtype": dtype, "shape": shape}
    inputs: list[TensorSpec] = [
        latents,
        {"name": "cond_latents", "dtype": dtype, "shape": ["batch", config.in_channels, "cond_frames", *grid]},
        {"name": "modulation", "dtype": "float32", "shape": [config.depth, 2, 4, config.hidden_size]},
        {"name": "head_scale", "dtype": "float32", "shape": [config.hidden_size]},
    ]
    return inputs, [{**latents, "name": "velocity"}], {name: list(bounds) for name, bounds in RANGES.items()}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter of `BranchDenoiser` comes from: official tensors, joined along their first dimension."""

    shape: tuple[int, ...]
    places: tuple[Place, ...]


def sources(config: DiTConfig) -> dict[str, Source]:
    """The official tensors behind every parameter of a `BranchDenoiser`; buffers have none."""
    found: dict[str, list[Place]] = {}
    for place in resident_layout(config):
        name = parameter_name(place, config)
        if name is not None:
            found.setdefault(name, []).append(place)
    return {
        name: Source((sum(p.shape[0] for p in places), *places[0].shape[1:]), tuple(places))
        for name, places in found.items()
    }


def parameter_name(place: Place, config: DiTConfig) -> str | None:
    """The parameter of a `BranchDenoiser` that holds, or begins with, an official tensor; None where there is none."""
    first, *rest = place.parameter.split(".")
    if first in ("cond_embedder", "x_embedder"):
        return place.parameter
    if place.parameter.startswith("head.linear."):
        return f"head.{rest[-1]}"
    if first != "blocks":
        return None
    assert place.stream is not None  # of a block's tensors every one has a stream
    index, kind, stream = int(rest[0]), rest[-1], STREAMS[place.stream]
    if index + 1 == config.depth and stream == "cond":
        if kind == "qkv" and place.first_row:
            kind = "kv"
        elif kind != "k_norm":
            return None
    return f"blocks.{index}.{stream}.{kind}"
