"""The denoiser of an artifact with keys and values of the context among its inputs and outputs, for speeds that keep
them: the same parameters, so that both parts share their weights.
"""

from __future__ import annotations

import torch
from torch import nn

from lavin_export.networks import denoiser as denoiser_part
from lavin_export.networks.denoiser import BranchDenoiser
from lavin_rt.artifact.parts import Ranges, TensorSpec
from lavin_rt.dit.config import DiTConfig

# Together as many frames as a joint sequence has positions.
RANGES = {
    "batch": (1, 64),
    "target_frames": (1, 342),
    "cond_frames": (1, 342),
    "kept_frames": (0, 340),
    "rows": (1, 1024),
    "columns": (1, 1024),
}


class KeptDenoiser(BranchDenoiser):
    """Velocity of one guidance branch, of whose condition the first frames' keys and values are given instead of their
    latents; and the keys and values of the others, to be given at a later evaluation.

    Of no frames given it is a `BranchDenoiser` that keeps what it computes.

    Args:
        denoiser: whose parameters and buffers it has, under the same names.

    Args of the call:
        latents, modulation, head_scale: as of `BranchDenoiser`.
        cond_latents: `[batch, 16, cond_frames, height, width]`, the frames behind those given.
        keys, values: `[depth, batch, kept_frames, height / 2, width / 2, kv_heads * head_size]` in the model's dtype,
            keys after norm and rotary positions; kept_frames may be 0.

    Returns of the call:
        velocity, and the keys and values of `cond_latents`' frames, shaped likewise.
    """

    def __init__(self, denoiser: BranchDenoiser):
        nn.Module.__init__(self)
        self.config = denoiser.config
        self.cond_embedder, self.x_embedder = denoiser.cond_embedder, denoiser.x_embedder
        self.blocks, self.head = denoiser.blocks, denoiser.head
        for name, buffer in denoiser.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(  # type: ignore[override]
        self,
        latents: torch.Tensor,
        cond_latents: torch.Tensor,
        modulation: torch.Tensor,
        head_scale: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, columns = latents.shape[3] // 2, latents.shape[4] // 2
        length = cond_latents.shape[2] * rows * columns
        fresh: list[tuple[torch.Tensor, torch.Tensor]] = []

        def joined(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            index = len(fresh)
            fresh.append((k[:, :length], v[:, :length]))
            k_before, v_before = (self.heads(part[index].flatten(1, 3)) for part in (keys, values))
            return torch.cat([k_before, k], dim=1), torch.cat([v_before, v], dim=1)

        velocity = self.velocity(latents, cond_latents, modulation, head_scale, keys.shape[2], joined)
        grid = (cond_latents.shape[2], rows, columns)
        new_keys, new_values = (torch.stack(parts).flatten(3).unflatten(2, grid) for parts in zip(*fresh, strict=True))
        return velocity, new_keys, new_values


def dynamic_shapes() -> dict[str, dict[int, object]]:
    """What of the inputs may vary, as `torch.export.export(..., dynamic_shapes=...)` wants it."""
    from torch.export import Dim

    batch, target, cond, kept, rows, columns = (
        Dim(name, min=least, max=most) for name, (least, most) in RANGES.items()
    )
    of_kept: dict[int, object] = {1: batch, 2: kept, 3: rows, 4: columns}
    return {
        "latents": {0: batch, 2: target, 3: 2 * rows, 4: 2 * columns},
        "cond_latents": {0: batch, 2: cond, 3: 2 * rows, 4: 2 * columns},
        "modulation": {},
        "head_scale": {},
        "keys": of_kept,
        "values": of_kept,
    }


def example_inputs(
    config: DiTConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    sizes: tuple[int, int, int, int, int] = (2, 2, 3, 4, 6),
    kept_frames: int = 4,
) -> tuple[torch.Tensor, ...]:
    """Random inputs to trace or try a `KeptDenoiser` with; sizes as of `denoiser.example_inputs`."""
    batch, _, _, height, width = sizes
    shape = (2, config.depth, batch, kept_frames, height // 2, width // 2, config.kv_size)
    keys, values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return *denoiser_part.example_inputs(config, dtype, device, sizes), keys, values


def specification(config: DiTConfig, dtype: str) -> tuple[list[TensorSpec], list[TensorSpec], Ranges]:
    """Inputs, outputs and ranges of the part "denoiser_kept", as the manifest has them."""
    grid = ["2*rows", "2*columns"]

    def latents(name: str, frames: str) -> TensorSpec:
        return {"name": name, "dtype": dtype, "shape": ["batch", config.in_channels, frames, *grid]}

    def kept(name: str, frames: str) -> TensorSpec:
        shape: list[int | str] = [config.depth, "batch", frames, "rows", "columns", config.kv_size]
        return {"name": name, "dtype": dtype, "shape": shape}

    inputs: list[TensorSpec] = [
        latents("latents", "target_frames"),
        latents("cond_latents", "cond_frames"),
        {"name": "modulation", "dtype": "float32", "shape": [config.depth, 2, 4, config.hidden_size]},
        {"name": "head_scale", "dtype": "float32", "shape": [config.hidden_size]},
        kept("keys", "kept_frames"),
        kept("values", "kept_frames"),
    ]
    outputs = [
        latents("velocity", "target_frames"),
        kept("new_keys", "cond_frames"),
        kept("new_values", "cond_frames"),
    ]
    return inputs, outputs, {name: list(bounds) for name, bounds in RANGES.items()}
