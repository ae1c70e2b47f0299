"""Euler sampling of the flow, with classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from lavin_rt.errors import InputError, NonFiniteError
from lavin_rt.knots import schedule
from lavin_rt.layout import Layout, Shape
from lavin_rt.model import JDiT
from lavin_rt.modulation import ModulationTable, modulation_table
from lavin_rt.packed import PackedStep, resolve_impl

Denoiser = Callable[[torch.Tensor, int], torch.Tensor]
"""`(latents [B, 16, T, h, w] float32, evaluation) -> guided velocity`, of whatever runs the network."""

Callback = Callable[[int, int, torch.Tensor], None]
"""`(evaluations done, evaluations in all, latents)`, after every step; an exception raised in it ends the run."""


def euler(
    denoise: Denoiser, noise: torch.Tensor, knots: torch.Tensor, callback: Callback | None = None
) -> torch.Tensor:
    """Integrates the flow from noise (t = 0) to data (t = 1): `z += (t[i+1] - t[i]) * velocity(z, t[i])`.

    Args:
        denoise: the guided velocity at evaluation i, that is at time `knots[i]`.
        noise: `[B, 16, T, h, w]`.
        knots: `[n]` float32 of `schedule(n)`.
        callback: called after every step.

    Returns:
        latents `[B, 16, T, h, w]` float32.

    Raises:
        NonFiniteError: naming the first step after which a latent is NaN or infinite.
    """
    # The same strides in every step, size-1 dimensions included, or a compiled network would be compiled twice.
    latents = torch.empty(noise.shape, dtype=torch.float32, device=noise.device).copy_(noise)
    widths = knots.diff().tolist()
    for index, width in enumerate(widths):
        velocity = denoise(latents, index).float()
        latents = torch.add(latents, velocity, alpha=width, out=torch.empty_like(latents))
        if not torch.isfinite(latents).all():
            raise NonFiniteError(index + 1, len(widths))
        if callback is not None:
            callback(index + 1, len(widths), latents)
    return latents


def guide(velocities: torch.Tensor, guidance: float) -> torch.Tensor:
    """`null + guidance * (cond - null)` in float32 of velocities `[2 B, ...]`, the conditional half first."""
    cond, null = velocities.float().chunk(2)
    return null + guidance * (cond - null)


def null_condition(cond_latents: torch.Tensor, query_frames: int = 1) -> torch.Tensor:
    """The condition without its context: one zero frame and the query's frames, `[B, 16, 1 + query_frames, h, w]`."""
    query = cond_latents[:, :, -query_frames:]
    return torch.cat([torch.zeros_like(query[:, :, :1]), query], dim=2)


def plain_denoiser(
    dit: JDiT,
    cond_latents: torch.Tensor,
    knots: torch.Tensor,
    guidance: float,
    query_frames: int = 1,
    compile: bool = False,
) -> Denoiser:
    """Two passes of the plain model a step, as the published sampler runs it; one pass at guidance 1.0."""
    network = torch.compile(dit, dynamic=False) if compile else dit
    null = null_condition(cond_latents, query_frames)
    times = knots.to(cond_latents.device)

    def denoise(latents: torch.Tensor, evaluation: int) -> torch.Tensor:
        t = times[evaluation].expand(len(latents))
        velocity = network(latents, t, cond_latents)
        if guidance == 1.0:
            return velocity
        return guide(torch.cat([velocity, network(latents, t, null)]), guidance)

    return denoise


def packed_denoiser(
    network: Callable[..., torch.Tensor],
    step: PackedStep,
    cond_rows: torch.Tensor,
    table: ModulationTable,
    guidance: float,
) -> Denoiser:
    """One packed pass a step; `network` is `step`, or what `step.compiled()` made of it."""

    def denoise(latents: torch.Tensor, evaluation: int) -> torch.Tensor:
        velocities = network(latents, cond_rows, table.blocks[evaluation], table.head_scale[evaluation])
        return guide(velocities, guidance) if step.layout.shape.guided else velocities

    return denoise


@torch.no_grad()
def sample(
    dit: JDiT,
    cond_latents: torch.Tensor,
    noise: torch.Tensor,
    steps: int = 20,
    guidance: float = 1.5,
    impl: str = "auto",
    query_frames: int = 1,
    compile: bool = False,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Generates target latents for clean condition latents.

    Args:
        dit: the model.
        cond_latents: `[B, 16, Tc, h, w]`, scaled latents `in1, target1, in2, target2, ..., query`.
        noise: `[B, 16, Tx, h, w]`; both guidance branches start from it.
        steps: knots of the schedule, even, 4 to 136; the network is evaluated `steps - 1` times.
        guidance: classifier-free guidance scale; at 1.0 the null branch cancels and does not run.
        impl: `"plain"`, `"torch"`, `"triton"` or `"auto"`.
        query_frames: how many of the last condition frames are the query (more than one for clips).
        compile: run the network through `torch.compile`.
        callback: `(step, evaluations, latents)` after every step; raise `Cancelled`, or anything, in it to end the run.

    Returns:
        latents `[B, 16, Tx, h, w]` float32.

    Raises:
        InputError: shapes that do not belong together, a bad number of steps, an unknown `impl`.
        NonFiniteError: naming the step at which the latents stopped being finite.
    """
    shape = check_inputs(dit, cond_latents, noise, query_frames, guidance)
    impl = resolve_impl(impl, dit.device, dit.config)
    knots = schedule(steps)
    cond_latents, noise = cond_latents.to(dit.device), noise.to(dit.device)
    with current_device(dit.device):
        if impl == "plain":
            with dit.resident_modulation():
                denoise = plain_denoiser(dit, cond_latents, knots, guidance, query_frames, compile)
                return euler(denoise, noise, knots, callback)
        step = PackedStep(dit, Layout.make(dit.config, shape, dit.device), impl)
        network = step.compiled() if compile else step
        cond_rows, table = step.embed_condition(cond_latents), modulation_table(dit, knots[:-1])
        return euler(packed_denoiser(network, step, cond_rows, table, guidance), noise, knots, callback)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one, on which Triton launches whatever the tensors' device is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_inputs(
    dit: JDiT, cond_latents: torch.Tensor, noise: torch.Tensor, query_frames: int, guidance: float
) -> Shape:
    """The shape of a run, or an `InputError` that says which input does not fit."""
    channels = dit.config.in_channels
    for name, latents in (("cond_latents", cond_latents), ("noise", noise)):
        if latents.dim() != 5 or latents.shape[1] != channels or not latents.is_floating_point():
            raise InputError(
                f"{name} is {latents.dtype} {list(latents.shape)}; expected floating point [B, {channels}, T, h, w]"
            )
    batch, _, frames, height, width = cond_latents.shape
    if noise.shape[0] != batch or noise.shape[3:] != (height, width):
        raise InputError(
            f"noise is {list(noise.shape)}; expected [{batch}, {channels}, T, {height}, {width}], as cond_latents has"
        )
    if not math.isfinite(guidance):
        raise InputError(f"guidance is {guidance}; expected a finite number, such as 1.5")
    return Shape(batch, frames, query_frames, noise.shape[2], height, width, guided=guidance != 1.0)
