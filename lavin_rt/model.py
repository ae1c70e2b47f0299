"""J-DiT as a plain module: the oracle, what training uses and what export traces.

Every weight that exists once per stream is held as one tensor with the stream first (0 = "cond", 1 = "x"), and
weights that read the same
input are joined (q, k, v; gate, up), so that the packed step runs on the very same parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from lavin_kernels.reference import apply_rope, grouped_attention, swiglu
from lavin_rt.config import DiTConfig
from lavin_rt.rope import token_angles

NORM_EPS = 1e-6
TIME_FEATURES = 256
SCALE_MSA, GATE_MSA, SCALE_MLP, GATE_MLP = range(4)


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """Latents `[B, C, T, h, w]` to tokens `[B, T * h/2 * w/2, 4 C]`, features ordered (row in patch, column in patch,
    channel).
    """
    batch, channels, frames, height, width = latents.shape
    patches = latents.reshape(batch, channels, frames, height // 2, 2, width // 2, 2).permute(0, 2, 3, 5, 4, 6, 1)
    return patches.reshape(batch, frames * (height // 2) * (width // 2), 4 * channels)


def unpatchify(tokens: torch.Tensor, frames: int, height: int, width: int) -> torch.Tensor:
    """Tokens `[B, T * h/2 * w/2, 4 C]` back to latents `[B, C, T, h, w]`."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, frames, height // 2, width // 2, 2, 2, features // 4).permute(0, 6, 1, 2, 4, 3, 5)
    return patches.reshape(batch, features // 4, frames, height, width)


class PatchEmbedder(nn.Sequential):
    """Linear and LayerNorm of patches `[..., 4 C]` to rows `[..., D]`."""

    def __init__(self, config: DiTConfig):
        super().__init__(
            nn.Linear(config.patch_features, config.hidden_size), nn.LayerNorm(config.hidden_size, eps=1e-5)
        )


class TimeEmbedder(nn.Module):
    """Sinusoidal features `[cos(t f), sin(t f)]` of times `[B]`, then Linear, SiLU, Linear to `[B, D]`."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.first = nn.Linear(TIME_FEATURES, config.hidden_size)
        self.second = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = TIME_FEATURES // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half))
        angles = t.float()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(features)))


@dataclasses.dataclass(frozen=True, eq=False)
class KeptBlock:
    """One block's keys and values of a condition's first rows, stored by one pass and reused by later ones.

    Attributes:
        keys, values: `[B, rows, kv_heads, head_size]`, keys after norm and rotary positions; stored in place.
        reused: whether they are read; else they are written.
    """

    keys: torch.Tensor
    values: torch.Tensor
    reused: bool

    def __call__(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all rows, of those of the rows that were computed."""
        if self.reused:
            return torch.cat([self.keys, k], dim=1), torch.cat([self.values, v], dim=1)
        self.keys.copy_(k[:, : self.keys.shape[1]])
        self.values.copy_(v[:, : self.values.shape[1]])
        return k, v


class JointAttention(nn.Module):
    """Attention of both streams over their joint sequence, cond first, with grouped key/value heads."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        hidden, kv = config.hidden_size, config.kv_size
        self.qkv = nn.Parameter(torch.empty(2, hidden + 2 * kv, hidden))
        self.q_norm = nn.Parameter(torch.empty(2, hidden))
        self.k_norm = nn.Parameter(torch.empty(2, kv))
        self.proj = nn.Parameter(torch.empty(2, hidden, hidden))

    def forward(
        self,
        cond: torch.Tensor,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        kept: KeptBlock | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        streams = [self._heads(rows, stream) for stream, rows in enumerate((cond, x))]
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))  # [B, L, heads, head_size]
        q, k = (apply_rope(part.float(), *angles).to(v.dtype) for part in (q, k))
        if kept is not None:
            k, v = kept(k, v)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        joint = grouped_attention(q, k, v, config.head_size**-0.5)
        joint = joint.transpose(1, 2).flatten(2)  # [B, L, D]
        length = cond.shape[1]
        return F.linear(joint[:, :length], self.proj[0]), F.linear(joint[:, length:], self.proj[1])

    def _heads(self, rows: torch.Tensor, stream: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, kv = self.config.hidden_size, self.config.kv_size
        q, k, v = F.linear(rows, self.qkv[stream]).split([hidden, kv, kv], dim=-1)
        q = F.rms_norm(q, (hidden,), self.q_norm[stream], NORM_EPS)
        k = F.rms_norm(k, (kv,), self.k_norm[stream], NORM_EPS)
        return tuple(part.unflatten(-1, (-1, self.config.head_size)) for part in (q, k, v))


class MLP(nn.Module):
    """SwiGLU, one per stream."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, 2 * config.mlp_size, config.hidden_size))
        self.down = nn.Parameter(torch.empty(2, config.hidden_size, config.mlp_size))

    def forward(self, rows: torch.Tensor, stream: int) -> torch.Tensor:
        return F.linear(swiglu(F.linear(rows, self.gate_up[stream])), self.down[stream])


class Modulation(nn.Module):
    """The adaptive-norm linears of one block; the weights are None while they stay in the checkpoint's file."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 4 * config.hidden_size, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(2, 4 * config.hidden_size))

    def drop(self) -> None:
        """Lets the weights go."""
        self.weight = self.bias = None


def modulate(weight: torch.Tensor, bias: torch.Tensor, silu_t: torch.Tensor) -> torch.Tensor:
    """`SiLU(t)` of both streams `[B, 2, D]` to `[B, 2, 4, D]`: scale_msa, gate_msa, scale_mlp, gate_mlp, the gates
    through tanh.
    """
    streams = [F.linear(silu_t[:, stream], weight[stream], bias[stream]) for stream in range(2)]
    scale_msa, gate_msa, scale_mlp, gate_mlp = torch.stack(streams, dim=1).unflatten(-1, (4, -1)).unbind(2)
    return torch.stack([scale_msa, gate_msa.tanh(), scale_mlp, gate_mlp.tanh()], dim=2)


class Block(nn.Module):
    """One block: joint attention and an MLP per stream, each between an adaptive norm and a gated, normed residual."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.attention = JointAttention(config)
        self.mlp = MLP(config)
        self.modulation = Modulation(config)

    def forward(
        self,
        cond: torch.Tensor,
        x: torch.Tensor,
        modulation: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        kept: KeptBlock | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`cond` `[B, Lc, D]`, `x` `[B, Lx, D]`, `modulation` `[B, 2, 4, D]` of `modulate`; returns the new cond and
        x.
        """
        of_cond, of_x = ([part.unsqueeze(1) for part in stream.unbind(1)] for stream in modulation.unbind(1))
        cond_out, x_out = self.attention(
            ada_rms_norm(cond, of_cond[SCALE_MSA]), ada_rms_norm(x, of_x[SCALE_MSA]), angles, kept
        )
        cond = cond + of_cond[GATE_MSA] * rms_norm(cond_out)
        x = x + of_x[GATE_MSA] * rms_norm(x_out)
        cond = cond + of_cond[GATE_MLP] * rms_norm(self.mlp(ada_rms_norm(cond, of_cond[SCALE_MLP]), 0))
        x = x + of_x[GATE_MLP] * rms_norm(self.mlp(ada_rms_norm(x, of_x[SCALE_MLP]), 1))
        return cond, x


class Head(nn.Module):
    """Adaptive norm of the x stream and the projection to patches."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.modulation = nn.Linear(config.hidden_size, config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.patch_features)

    def forward(self, x: torch.Tensor, silu_t: torch.Tensor) -> torch.Tensor:
        return self.linear(ada_rms_norm(x, self.modulation(silu_t).unsqueeze(1)))


class JDiT(nn.Module):
    """The joint diffusion transformer of LaVin-DiT (arXiv 2411.11505, section 3.3).

    `dit(latents, t, cond_latents)` predicts the velocity `data - noise`:

    Args of the call:
        latents: `[B, 16, Tx, h, w]`, the target's noisy latents; h and w even.
        t: `[B]`, times in [0, 1].
        cond_latents: `[B, 16, Tc, h, w]`, the context's and the query's clean latents.
        kept: a `KeptBlock` for every block where keys and values of the condition's first frames are stored or reused.

    Returns of the call:
        velocity `[B, 16, Tx, h, w]` in the model's dtype.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.modulation_source: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
        self.cond_embedder = PatchEmbedder(config)
        self.x_embedder = PatchEmbedder(config)
        self.time_embedder = TimeEmbedder(config)
        self.prompt_embed = nn.Parameter(torch.empty(1, config.hidden_size))
        self.answer_embed = nn.Parameter(torch.empty(1, config.hidden_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.prompt_embed.dtype

    @property
    def device(self) -> torch.device:
        return self.prompt_embed.device

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        cond_latents: torch.Tensor,
        kept: Sequence[KeptBlock] | None = None,
    ) -> torch.Tensor:
        frames, height, width = latents.shape[2:]
        angles = token_angles(
            cond_latents.shape[2] + frames, height // 2, width // 2, self.config.head_size, latents.device
        )
        cond = self.cond_embedder(patchify(cond_latents.to(self.dtype)))
        x = self.x_embedder(patchify(latents.to(self.dtype)))
        silu_t = self.silu_times(t)  # [B, 2, D]
        if kept is not None and kept[0].reused:
            first = kept[0].keys.shape[1]
            cond, angles = cond[:, first:], tuple(part[first:] for part in angles)
        for index, block in enumerate(self.blocks):
            of_block = None if kept is None else kept[index]
            cond, x = block(cond, x, modulate(*self.modulation_parameters(index), silu_t), angles, of_block)
        return unpatchify(self.head(x, silu_t[:, 1]), frames, height, width)

    def silu_times(self, t: torch.Tensor) -> torch.Tensor:
        """`SiLU` of the time embeddings of both streams, `[B, 2, D]`: what every modulation linear reads."""
        embedded = self.time_embedder(t)
        return F.silu(torch.stack([embedded + self.prompt_embed, embedded + self.answer_embed], dim=1))

    def modulation_parameters(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight `[2, 4 D, D]` and bias `[2, 4 D]` of a block's modulation, read from the checkpoint if they stayed
        there.
        """
        modulation = self.blocks[index].modulation
        if modulation.weight is not None:
            return modulation.weight, modulation.bias
        return self.modulation_source(index, self.device, self.dtype)

    @contextmanager
    def resident_modulation(self) -> Iterator[None]:
        """Keeps all modulation weights in memory for as long as the context lasts, for many calls of `forward`."""
        loaded = [(i, b.modulation) for i, b in enumerate(self.blocks) if b.modulation.weight is None]
        try:
            for index, modulation in loaded:
                weight, bias = self.modulation_parameters(index)
                modulation.weight = nn.Parameter(weight, requires_grad=False)
                modulation.bias = nn.Parameter(bias, requires_grad=False)
            yield
        finally:
            for _, modulation in loaded:
                modulation.drop()


def rms_norm(rows: torch.Tensor) -> torch.Tensor:
    """RMSNorm without a weight; statistics in float32."""
    return F.rms_norm(rows, rows.shape[-1:], eps=NORM_EPS)


def ada_rms_norm(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return rms_norm(rows) * (1 + scale)


@torch.no_grad()
def randomize_(dit: JDiT, seed: int = 0) -> JDiT:
    """Fills a model with random weights that keep activations at unit scale; no tensor is zero. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in dit.named_parameters():
        if name.endswith(("_norm", "embedder.1.weight")):
            mean, std = 1.0, 0.1
        elif parameter.dim() == 1 or name.endswith(("bias", "_embed")):
            mean, std = 0.0, 0.1
        else:
            mean, std = 0.0, parameter.shape[-1] ** -0.5
        values = torch.empty(parameter.shape, dtype=torch.float32).normal_(mean, std, generator=generator)
        parameter.copy_(values)
    return dit
