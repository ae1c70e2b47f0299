"""LaVin-DiT the way its authors run it, which the pipeline's speed is held against.

Written from the paper (LaVin-DiT, arXiv 2411.11505, section 3) with PyTorch alone, sharing nothing with the fast path
but the weights: two passes a step, modulation in every step in the model's dtype, joined weights (q, k, v; gate, up),
cached rotary tables, the fastest of the attention backends that PyTorch has on the device, found by measuring, and
`torch.compile` of the whole network, with mode="reduce-overhead" (CUDA graphs) on CUDA. The context is encoded for
every query, a frame at a time.

Frozen: making it slower or faster changes what every published ratio means.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

NORM_EPS = 1e-6
LATENT_SHIFT, LATENT_SCALE = 0.032470703125, 1.08936170213
CUDA_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def knots(steps: int) -> torch.Tensor:
    """The "linear-quadratic" times `[steps]` float32, from 0 (noise) to 1 (data)."""
    half = steps // 2
    linear = torch.linspace(0, 0.05, half, dtype=torch.float64)
    quadratic = 0.05 + 0.95 * torch.linspace(1 / steps, 1, half, dtype=torch.float64) ** 2
    return torch.cat([linear, quadratic]).round(decimals=4).float()


def rotary_tables(
    frames: int, height: int, width: int, head_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine `[frames * height * width, 1, 3, head_size / 6]` float32 of every token of a joint sequence."""
    third = head_size // 3
    frequencies = 10000.0 ** (torch.arange(0, third, 2, dtype=torch.float64) / -third)
    positions = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))
    angles = positions.double()[:, None, :, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotation within each third of the heads `[B, L, heads, head_size]`, in float32."""
    first, second = heads.float().unflatten(-1, (3, 2, -1)).unbind(-2)
    pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)
    return pairs.flatten(-3).to(heads.dtype)


def rms(rows: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    return F.rms_norm(rows, rows.shape[-1:], weight, NORM_EPS)


def patches(latents: torch.Tensor) -> torch.Tensor:
    """`[B, C, T, h, w]` to `[B, T h/2 w/2, 4 C]`, features ordered (row, column, channel)."""
    batch, channels, frames, height, width = latents.shape
    cut = latents.reshape(batch, channels, frames, height // 2, 2, width // 2, 2)
    return cut.permute(0, 2, 3, 5, 4, 6, 1).reshape(batch, -1, 4 * channels)


def pictures(tokens: torch.Tensor, frames: int, height: int, width: int) -> torch.Tensor:
    """The inverse of `patches`."""
    cut = tokens.reshape(tokens.shape[0], frames, height // 2, width // 2, 2, 2, -1)
    return cut.permute(0, 6, 1, 2, 4, 3, 5).reshape(tokens.shape[0], -1, frames, height, width)


@dataclasses.dataclass(frozen=True)
class Attention:
    """A way to call PyTorch's attention: a backend (None leaves the choice to PyTorch) and whether key/value heads
    stay grouped or are repeated for their query heads.
    """

    backend: SDPBackend | None
    grouped: bool

    @property
    def name(self) -> str:
        backend = self.backend.name.lower().removesuffix("_attention") if self.backend else "default"
        return f"{backend}, {'grouped' if self.grouped else 'repeated'} heads"

    def chosen(self) -> AbstractContextManager[object]:
        return nullcontext() if self.backend is None else sdpa_kernel(self.backend)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grouped: bool) -> torch.Tensor:
    """Softmax attention of `[B, heads, L, head_size]`; query head i reads key/value head `i // group`."""
    if not grouped:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, enable_gqa=grouped)


def fastest_attention(
    batch: int, length: int, heads: int, kv_heads: int, head_size: int, device: torch.device, dtype: torch.dtype
) -> Attention:
    """The fastest way to attend at a length, found by measuring those that run on the device (best of five)."""
    wide = [torch.randn(batch, length, n, head_size, device=device, dtype=dtype) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (part.transpose(1, 2) for part in wide)
    backends = CUDA_BACKENDS if device.type == "cuda" else (None,)
    found: dict[Attention, float] = {}
    for candidate in [Attention(backend, grouped) for backend in backends for grouped in (True, False)]:
        try:
            with candidate.chosen(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # reasons why a backend does not run, which is tried for here
                found[candidate] = min(_seconds(partial(attend, q, k, v, candidate.grouped), device, 5))
        except RuntimeError:  # a backend that does not take this head size, dtype or grouping
            continue
    return min(found, key=found.__getitem__) if found else Attention(None, grouped=False)


def _seconds(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each call after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter on the memory of a tensor, which a captured graph reads in place."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


class AuthorsStream(nn.Module):
    """What a block holds for one of its two streams; the weights are the given model's, not copies."""

    def __init__(self, block: Any, stream: int, kv_size: int, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.kv_size = kv_size
        self.qkv = _parameter(block.attention.qkv[stream])
        self.q_norm = _parameter(block.attention.q_norm[stream])
        self.k_norm = _parameter(block.attention.k_norm[stream])
        self.proj = _parameter(block.attention.proj[stream])
        self.gate_up = _parameter(block.mlp.gate_up[stream])
        self.down = _parameter(block.mlp.down[stream])
        self.modulation = _parameter(weight[stream])
        self.modulation_bias = _parameter(bias[stream])

    def modulate(self, silu_t: torch.Tensor) -> list[torch.Tensor]:
        """`[B, D]` to scale_msa, gate_msa, scale_mlp, gate_mlp, `[B, 1, D]` each."""
        parts = F.linear(silu_t, self.modulation, self.modulation_bias).unsqueeze(1).chunk(4, dim=-1)
        return [parts[0], parts[1].tanh(), parts[2], parts[3].tanh()]

    def heads(self, rows: torch.Tensor, head_size: int) -> list[torch.Tensor]:
        """q, k, v of normed rows, `[B, L, heads, head_size]`, before the rotation."""
        q, k, v = F.linear(rows, self.qkv).split([rows.shape[-1], self.kv_size, self.kv_size], dim=-1)
        return [part.unflatten(-1, (-1, head_size)) for part in (rms(q, self.q_norm), rms(k, self.k_norm), v)]

    def mlp(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(rows, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)

    def updated(self, rows: torch.Tensor, attended: torch.Tensor, modulation: list[torch.Tensor]) -> torch.Tensor:
        """The rows behind both residuals of a block."""
        _, gate_msa, scale_mlp, gate_mlp = modulation
        rows = rows + gate_msa * rms(F.linear(attended, self.proj))
        return rows + gate_mlp * rms(self.mlp(rms(rows) * (1 + scale_mlp)))


class Network(nn.Module):
    """The whole transformer: `network(latents, t, cond_latents, cos, sin, grouped)` is the velocity.

    Args:
        dit: a `lavin_rt.dit.model.JDiT`, whose parameters are shared; modulation linears that stayed in its
            checkpoint's file are loaded.
    """

    def __init__(self, dit: Any):
        super().__init__()
        config = dit.config
        self.head_size = config.head_size
        self.cond_embedder, self.x_embedder = dit.cond_embedder, dit.x_embedder
        self.time_first, self.time_second = dit.time_embedder.first, dit.time_embedder.second
        self.prompt_embed, self.answer_embed = dit.prompt_embed, dit.answer_embed
        streams = []
        for index, block in enumerate(dit.blocks):
            weight, bias = dit.modulation_parameters(index)
            streams.append(nn.ModuleList(AuthorsStream(block, i, config.kv_size, weight, bias) for i in range(2)))
        self.blocks = cast("Sequence[Sequence[AuthorsStream]]", nn.ModuleList(streams))
        self.head_modulation, self.head = dit.head.modulation, dit.head.linear

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        cond_latents: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        grouped: bool,
    ) -> torch.Tensor:
        dtype = self.prompt_embed.dtype
        cond = self.cond_embedder(patches(cond_latents.to(dtype)))
        x = self.x_embedder(patches(latents.to(dtype)))
        split = cond.shape[1]
        frequencies = torch.exp(torch.arange(128, dtype=torch.float32, device=t.device) * (-math.log(10000) / 128))
        angles = t.float()[:, None] * frequencies
        times = self.time_second(F.silu(self.time_first(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))))
        silu_cond, silu_x = F.silu(times + self.prompt_embed), F.silu(times + self.answer_embed)
        for of_cond, of_x in self.blocks:
            cond_modulation, x_modulation = of_cond.modulate(silu_cond), of_x.modulate(silu_x)
            cond_heads = of_cond.heads(rms(cond) * (1 + cond_modulation[0]), self.head_size)
            x_heads = of_x.heads(rms(x) * (1 + x_modulation[0]), self.head_size)
            q, k, v = (torch.cat(parts, dim=1) for parts in zip(cond_heads, x_heads, strict=True))
            q, k, v = (part.transpose(1, 2) for part in (rotate(q, cos, sin), rotate(k, cos, sin), v))
            joint = attend(q, k, v, grouped).transpose(1, 2).flatten(2)
            cond = of_cond.updated(cond, joint[:, :split], cond_modulation)
            x = of_x.updated(x, joint[:, split:], x_modulation)
        normed = rms(x) * (1 + self.head_modulation(silu_x).unsqueeze(1))
        return pictures(self.head(normed), *latents.shape[2:])


class AuthorsWay:
    """The published pipeline.

    Args:
        dit: a `lavin_rt.dit.model.JDiT` on its device and in its dtype.
        vae: a `lavin_rt.vae.model.STVAE` likewise, run in its plain form; None where only `velocity` and `sample` are
            asked.
        compile: `torch.compile` the network, once per shape; mode "reduce-overhead" on CUDA, the default one on a CPU,
            where there is no launch overhead to reduce.
        steps: knots of the schedule.
        guidance: classifier-free guidance scale.
    """

    def __init__(self, dit: Any, vae: Any = None, compile: bool = False, steps: int = 20, guidance: float = 1.5):
        self.config, self.vae, self.compiles, self.guidance = dit.config, vae, compile, guidance
        self.knots = knots(steps)
        self.network = Network(dit)
        self.device, self.dtype = dit.device, dit.dtype
        self.mode = "reduce-overhead" if self.device.type == "cuda" else None
        self._run = (
            torch.compile(self.network, dynamic=False, fullgraph=True, mode=self.mode) if compile else self.network
        )
        self._tables: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.attention: dict[int, Attention] = {}  # by joint length, for those who want to see what was chosen

    @torch.no_grad()
    def velocity(self, latents: torch.Tensor, t: torch.Tensor, cond_latents: torch.Tensor) -> torch.Tensor:
        """Velocity `[B, 16, Tx, h, w]` of latents `[B, 16, Tx, h, w]` at times `[B]` under a condition
        `[B, 16, Tc, h, w]`.
        """
        frames, height, width = cond_latents.shape[2] + latents.shape[2], *latents.shape[3:]
        key = (frames, height // 2, width // 2)
        if key not in self._tables:
            self._tables[key] = rotary_tables(*key, self.config.head_size, self.device)
            for table in self._tables[key] if self.compiles else ():
                torch._dynamo.mark_static_address(table)  # a graph's input that need not be copied in
        length = math.prod(key)
        if length not in self.attention:
            heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
            shape = (len(latents), length, heads, kv_heads, self.config.head_size)
            self.attention[length] = fastest_attention(*shape, self.device, self.dtype)
        choice = self.attention[length]
        with choice.chosen():
            return self._run(latents, t, cond_latents, *self._tables[key], choice.grouped)

    @torch.no_grad()
    def sample(self, cond_latents: torch.Tensor, noise: torch.Tensor, query_frames: int = 1) -> torch.Tensor:
        """Target latents, float32 like `noise` `[B, 16, Tx, h, w]`, of a condition `[B, 16, Tc, h, w]`."""
        query = cond_latents[:, :, -query_frames:]
        null = torch.cat([torch.zeros_like(query[:, :, :1]), query], dim=2)
        # The same strides in every step, size-1 dimensions included, or the network would be compiled twice.
        latents = noise.to(torch.float32, copy=True).contiguous()
        times = self.knots.to(self.device)
        for index, width in enumerate(self.knots.diff().tolist()):
            if self.compiles and self.mode:
                torch.compiler.cudagraph_mark_step_begin()
            t = times[index].repeat(len(latents))
            velocity = self.velocity(latents, t, cond_latents).float()
            if self.guidance != 1.0:
                of_null = self.velocity(latents, t, null).float()
                velocity = of_null + self.guidance * (velocity - of_null)
            latents = torch.add(latents, velocity, alpha=width, out=torch.empty_like(latents))
        return latents

    @torch.no_grad()
    def answer(
        self, context_pixels: torch.Tensor, query_pixels: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One query from pixels to pixels, everything computed anew.

        Args:
            context_pixels: `[2 * pairs, 3, H, W]` float32 in [-1, 1]: input 1, target 1, input 2, ...
            query_pixels: `[1, 3, H, W]`, likewise.
            noise: `[1, 16, 1, H / 8, W / 8]` float32.

        Returns:
            latents `[1, 16, 1, H / 8, W / 8]` float32, and pixels `[1, 3, H, W]` float32 in [-1, 1] but for overshoot.
        """
        vae = self.vae.in_form("plain")
        frames = torch.cat([context_pixels, query_pixels]).to(self.device)
        encoded = [vae.encode(frame[None, :, None]).mean.float() for frame in frames]
        cond = (torch.cat(encoded, dim=2) - LATENT_SHIFT) * LATENT_SCALE
        latents = self.sample(cond, noise.to(self.device))
        pixels = vae.decode(latents / LATENT_SCALE + LATENT_SHIFT)
        return latents, pixels[:, :, 0].float()


def useful_flops(config: Any, frame_tokens: int, condition_frames: tuple[int, ...], target_frames: int = 1) -> int:
    """FLOPs of one step: of the unpruned model, with unpadded heads, linears and attention of the blocks.

    Args:
        config: the transformer's.
        frame_tokens: tokens of a frame, `h/2 * w/2` of its latents.
        condition_frames: of every branch of the step: `(2 * pairs + 1, 2)` for one guided query.
        target_frames: of every branch.
    """
    hidden, kv, mlp = config.hidden_size, config.kv_size, config.mlp_size
    weights = hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * mlp  # q, k, v; proj; gate, up, down
    lengths = [(frames + target_frames) * frame_tokens for frames in condition_frames]
    return config.depth * sum(2 * weights * length + 4 * length * length * hidden for length in lengths)
