"""How much GPU memory a pipeline takes, stage by stage, predicted without a GPU: its own code on meta tensors, under a
model of the allocator.

What libraries take for themselves is not in it: the CUDA context, and cuDNN's workspaces, of which the convolutions of
pictures want little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.layout import Form, Shape
from lavin_rt.dit.model import JDiT
from lavin_rt.pictures.images import flagged_frames
from lavin_rt.sampling.allocator import MIB, Allocator, Modelled
from lavin_rt.sampling.denoisers import PackedNetwork
from lavin_rt.sampling.executor import EVALUATIONS
from lavin_rt.sampling.guided_step import Schedule, guided_step
from lavin_rt.sampling.schedule import schedule
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.model import STVAE, scale_latents, unscale_latents

META = torch.device("meta")
WORKSPACE = 32 * MIB  # of cuBLAS for a stream, on compute capability 9.0; less before
PARTS = 64  # into which the group norms' kernels cut a group's sums, at most
POOL = "graphs"
PAIRS = 4  # of the context that is told of


@dataclasses.dataclass(frozen=True)
class Stage:
    """Bytes when a stage is over, and the most since the beginning."""

    name: str
    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int


@torch.no_grad()
def predict(
    config: DiTConfig, vae_config: VAEConfig, shape: Shape, dtype: torch.dtype = torch.bfloat16, steps: int = 20
) -> list[Stage]:
    """The stages of a first query and a second: weights, context, schedule, capture, sampling, decoding.

    Args:
        config, vae_config: of the networks.
        shape: of the sampler; clips of one latent frame, pictures.
        dtype: of the weights.
        steps: knots of the schedule.
    """
    allocator, stages = Allocator(), []
    model = Modelled(allocator)
    with META:
        dit, vae = JDiT(config).to(dtype), STVAE(vae_config).to(dtype)
    for block in dit.blocks:
        block.modulation.drop()
    dit.modulation_source = lambda index, device, dtype: (
        torch.empty(2, 4 * config.hidden_size, config.hidden_size, dtype=dtype, device=device),
        torch.empty(2, 4 * config.hidden_size, dtype=dtype, device=device),
    )
    dit, vae = dit.requires_grad_(False), vae.requires_grad_(False)

    def stage(name: str) -> None:
        now, most = (allocator.allocated, allocator.reserved), (allocator.peak_allocated, allocator.peak_reserved)
        stages.append(Stage(name, *now, *most))

    def captured(function: Callable[[], Any], runs: int) -> None:
        """Run, then captured: torch empties the cache before, and the capture's stream has a workspace of its own."""
        for _ in range(runs):
            function()
        allocator.empty_cache()
        with model.in_pool(POOL):
            kept.setdefault("workspace of the captures", _bytes(WORKSPACE))
            function()

    kept: dict[str, Any] = {}
    with model:
        dit.to_empty(device=META)
        stage("transformer")
        vae.to_empty(device=META)
        vae.form.plain, vae.form.group_norm_silu, vae.form.spatial_norm_silu = False, _norm, _norm
        stage("VAE")
        height, width = 8 * shape.height, 8 * shape.width
        pixels = torch.empty(1, 3, 1, height, width, device=META)
        latents = torch.empty(1, config.in_channels, 1, shape.height, shape.width, device=META)
        encode = lambda: scale_latents(vae.encode(pixels).mode().float())  # noqa: E731
        decode = lambda: flagged_frames(vae.decode(unscale_latents(latents)))  # noqa: E731
        encode()
        kept["workspace"] = _bytes(WORKSPACE)
        decode()
        stage("context encoded, decoder ready")
        network = PackedNetwork(dit, "triton")
        tables = network.table(schedule(steps))
        buffers = Schedule.make(tables, max(steps - 1, EVALUATIONS), META)
        kept["tables"] = tables
        stage("schedule")
        step = network.step(shape)
        step.step.ops = KERNELS
        state = torch.empty(
            shape.queries, config.in_channels, shape.target_frames, shape.height, shape.width, device=META
        )
        condition, difference = step.buffers(), torch.empty_like(state)
        allocator.empty_cache()
        captured(partial(guided_step, buffers, step, state, condition, difference, Form.exact(shape), shape.guided), 2)
        stage("step captured")
        captured(decode, 0)
        captured(encode, 0)
        stage("pictures encoded and decoded")
    return stages


def _bytes(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device=META)


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, *_: object) -> torch.Tensor:
    """What the kernels of the VAE's norms take: the result, and sums of parts of the groups."""
    result = torch.empty_like(x)
    torch.empty(2 * x.shape[0] * groups * PARTS, device=META)
    return result


def _qk_norm_rope(cond, x, branches, positions, cos, sin, q_weight, k_weight, head_size, eps, padded):
    rows, heads, kv_heads = cond.shape[0] + x.shape[0], *(part.shape[1] // head_size for part in (q_weight, k_weight))
    queries = rows if cond.shape[1] == x.shape[1] else x.shape[0]
    return x.new_empty(queries, heads, padded), *(x.new_empty(rows, kv_heads, padded) for _ in range(2))


def _stream_linear(rows: torch.Tensor, split: int, weight: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


# The memory of the kernels' results, with the operators' signatures.
KERNELS = SimpleNamespace(
    ada_rms_norm=lambda rows, *_: torch.empty_like(rows),
    gated_residual_ada_rms_norm=lambda residual, *_: (torch.empty_like(residual), torch.empty_like(residual)),
    swiglu=lambda rows: rows.new_empty(rows.shape[0], rows.shape[1] // 2),
    qk_norm_rope=_qk_norm_rope,
    joint_attention=lambda q, k, v, branches, head_size: q.new_empty(q.shape[0], q.shape[1] * head_size),
    stream_linear=_stream_linear,
)
