"""Sampling from latents to latents, for one condition at a time."""

from __future__ import annotations

import dataclasses
import math

import torch

from lavin_rt.dit.layout import Shape
from lavin_rt.dit.model import JDiT
from lavin_rt.errors import InputError
from lavin_rt.host_state import own_state
from lavin_rt.sampling.denoisers import Denoiser, make_network
from lavin_rt.sampling.executor import Callback, Executor
from lavin_rt.sampling.speeds import TASK, Speed, speed_of
from lavin_rt.scalars import real, whole


@own_state()
def sample(
    dit: JDiT,
    cond_latents: torch.Tensor,
    noise: torch.Tensor,
    steps: int | None = None,
    guidance: float = 1.5,
    impl: str = "auto",
    query_frames: int = 1,
    compile: bool = False,
    callback: Callback | None = None,
    speed: str | Speed = "exact",
) -> torch.Tensor:
    """Generates target latents for clean condition latents.

    Args:
        dit: the model.
        cond_latents: `[B, 16, Tc, h, w]`, scaled latents `in1, target1, in2, target2, ..., query`.
        noise: `[B, 16, Tx, h, w]`; both guidance branches start from it.
        steps: knots of the published schedule, even, 4 to 136, 20 by default; the network is evaluated `steps - 1`
            times. Not beside a speed that has a grid of its own.
        guidance: classifier-free guidance scale; at 1.0 the null branch cancels and does not run.
        impl: `"plain"`, `"torch"`, `"triton"` or `"auto"`.
        query_frames: how many of the last condition frames are the query (more than one for clips).
        compile: run the network through `torch.compile`.
        callback: `(step, evaluations, latents)` after every step; raise `Cancelled`, or anything, in it to end the run.
        speed: a name in `SPEEDS`, or a `Speed`; all but `exact` change the result by more than rounding.

    Returns:
        latents `[B, 16, Tx, h, w]` float32.

    Raises:
        InputError: shapes that do not belong together, a bad number of steps, an unknown `impl` or speed.
        NonFiniteError: naming the step at which the latents stopped being finite.
    """
    cond_latents, noise = torch.as_tensor(cond_latents), torch.as_tensor(noise)
    network = make_network(dit, impl, compile)
    return sampled(network, cond_latents, noise, speed_of(speed), steps, guidance, query_frames, callback)


def sampled(
    network: Denoiser,
    cond_latents: torch.Tensor,
    noise: torch.Tensor,
    speed: Speed,
    steps: int | None = None,
    guidance: float = 1.5,
    query_frames: int = 1,
    callback: Callback | None = None,
) -> torch.Tensor:
    """What `sample` does, with a network: a model's, or an artifact's."""
    knots = speed.knots(steps)
    network.check_speed(speed)
    shape = dataclasses.replace(check_inputs(network, cond_latents, noise, query_frames, guidance), kept=speed.keeps)
    # For a single run a capture would cost more than it saves.
    executor = Executor(network, graphs=False)
    frames = executor.embed(cond_latents)
    context_rows = frames.shape[1] // shape.cond_frames * (shape.cond_frames - shape.query_frames)
    context, query = frames[:, :context_rows], frames[:, context_rows:]
    keys = None
    if speed.refresh == TASK:
        keys = executor.context_keys(dataclasses.replace(shape, guided=False), context)
    return executor.sample(shape, context, query, noise, knots, float(guidance), callback, speed, keys)


def null_condition(cond_latents: torch.Tensor, query_frames: int = 1) -> torch.Tensor:
    """The condition without its context: one zero frame and the query's frames, `[B, 16, 1 + query_frames, h, w]`."""
    query = cond_latents[:, :, -query_frames:]
    return torch.cat([torch.zeros_like(query[:, :, :1]), query], dim=2)


def check_inputs(
    network: Denoiser, cond_latents: torch.Tensor, noise: torch.Tensor, query_frames: int, guidance: float
) -> Shape:
    """The shape of a run, or an `InputError` that says which input does not fit."""
    channels = network.config.in_channels
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
    count, scale = whole(query_frames), real(guidance)
    if count is None:
        raise InputError(f"query_frames is {query_frames!r}; expected a whole number")
    if scale is None or not math.isfinite(scale):
        raise InputError(f"guidance is {guidance!r}; expected a finite number, such as 1.5")
    return Shape(batch, frames, count, noise.shape[2], height, width, guided=scale != 1.0)
