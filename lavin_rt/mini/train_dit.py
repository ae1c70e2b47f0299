"""Training of the small J-DiT: conditional flow matching on random contexts (LaVin-DiT, arXiv 2411.11505, 3.3)."""

from __future__ import annotations

import collections
import copy
import dataclasses
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from lavin_rt.checkpoint import save_dit
from lavin_rt.config import DiTConfig
from lavin_rt.mini.latents import LatentPool
from lavin_rt.mini.start import PATCH
from lavin_rt.mini.tasks import TASKS
from lavin_rt.mini.training import Rate, Trainer
from lavin_rt.model import GATE_MLP, GATE_MSA, JDiT
from lavin_rt.sampler import null_condition

NULL_SHARE = 0.1
# Times are sigmoid(N(mean, deviation)): rather early ones, where the result must come from the condition. Nine of
# the sampler's twenty knots lie below 0.05, where a mean of 0 and a deviation of 1 would put 0.2 % of the samples.
TIME_MEAN, TIME_DEVIATION = -0.8, 1.2
GATE_START = 0.3  # before tanh: all layers learn from the first step on
COMPILED_FROM = 700  # steps to come of one shape, below which its compilation takes longer than it saves


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run of the transformer's training does.

    Attributes:
        steps: optimiser steps.
        batch: samples of one pair a step; of more pairs as many fewer as keeps the tokens about the same.
        peak: learning rate.
        pairs: probabilities of 1, 2, 3, ... pairs.
        clips: share of steps that train clips.
        seed: of everything.
    """

    steps: int
    batch: int = 32
    peak: float = 1e-3
    pairs: tuple[float, ...] = (0.5, 0.25, 0.1, 0.15)
    clips: float = 0.08
    seed: int = 0


@torch.no_grad()
def initialise_(dit: JDiT, seed: int) -> JDiT:
    """Weights to start training from: unit-preserving linears, open gates, a velocity of zero. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in dit.named_parameters():
        if name.endswith(("_norm", "embedder.1.weight")):
            parameter.fill_(1)
        elif name.endswith("_embed"):
            parameter.normal_(0, 0.02, generator=generator)
        elif name.endswith("bias") or "modulation" in name or name == "head.linear.weight":
            parameter.zero_()
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    for block in dit.blocks:
        gates = block.modulation.bias.view(2, 4, -1)
        gates[:, [GATE_MSA, GATE_MLP]] = GATE_START
    return dit


def draw_batch(
    pool: LatentPool, pairs: int, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random contexts of random tasks by their weights: conditions `[batch, 16, (2 pairs + 1) t, h, w]` and targets
    `[batch, 16, t, h, w]`, float32.
    """
    weights = torch.tensor([TASKS[task.name].weight for task in pool.tasks])
    chosen = torch.multinomial(weights, batch, replacement=True, generator=generator)
    rows = []
    for index in chosen.tolist():
        variants = pool.tasks[index].rows
        of_task = variants[int(torch.randint(len(variants), (), generator=generator))]
        # With the preset `mini` repeats are rarer than one in a hundred contexts; they are harmless.
        picked = torch.randint(len(of_task), (pairs + 1,), generator=generator)
        rows.append(of_task[picked].flatten())
    latents = pool.latents[torch.stack(rows)].float()  # [batch, 2 pairs + 2, 16, t, h, w]
    frames = latents.transpose(1, 2)
    return frames[:, :, :-1].flatten(2, 3), frames[:, :, -1]


def flow_loss(dit: JDiT, cond: torch.Tensor, data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The mean squared error of the velocity at random times, a scalar; `dit` may be compiled."""
    noise = torch.randn(data.shape, generator=generator).to(data.device)
    t = torch.sigmoid(torch.randn(len(data), generator=generator) * TIME_DEVIATION + TIME_MEAN).to(data.device)
    at = t[:, None, None, None, None]
    velocity = dit(at * data + (1 - at) * noise, t, cond)
    return F.mse_loss(velocity, data - noise)


def train_dit(
    pictures: LatentPool,
    clips: LatentPool | None,
    config: DiTConfig,
    output: str | os.PathLike,
    plan: Plan,
    device: torch.device | str = "cpu",
    compile: bool = True,
    warm_start: JDiT | None = None,
) -> JDiT:
    """Trains in `output`, going on from the state there if any, and writes `lavin_dit.safetensors` (float16) there.

    Returns:
        The network with averaged weights, for inference.
    """
    output = Path(output)
    dit = initialise_(JDiT(config), plan.seed) if warm_start is None else warm_start.requires_grad_()
    dit.train().to(device)
    trainer = Trainer(dit, Rate(plan.peak, plan.steps, warmup=min(200, plan.steps // 10 + 1)), output, "dit")
    trainer.resume()
    compiled, seen, worth_it = torch.compile(dit, dynamic=False), collections.Counter(), set()
    finished = copy.deepcopy(dit)

    def write() -> None:
        trainer.averaged.copy_to(finished)
        size = PATCH * pictures.latents.shape[-1]
        save_dit(copy.deepcopy(finished).half(), output / "lavin_dit.safetensors", size)

    trainer.on_save = write
    chances = torch.tensor(plan.pairs)
    weights = {task.name: TASKS[task.name].weight for pool in (pictures, clips) if pool for task in pool.tasks}
    trainer.log({"network": "dit", "from": trainer.step, "plan": dataclasses.asdict(plan), "weights": weights})
    for step in trainer.steps():
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        kind = float(torch.rand((), generator=generator))
        null = float(torch.rand((), generator=generator)) < NULL_SHARE
        pairs = int(torch.multinomial(chances, 1, generator=generator)) + 1
        pool = clips if clips is not None and kind < plan.clips else pictures
        frames = pool.latents.shape[2]
        if null:
            pairs = 1
        batch = max(1, plan.batch * 4 // (frames * (3 if null else 2 * pairs + 2)))
        cond, data = (part.to(device) for part in draw_batch(pool, pairs, batch, generator))
        if null:
            cond = null_condition(cond, query_frames=frames)
        seen[cond.shape] += 1
        if compile and seen[cond.shape] / seen.total() * (plan.steps - step) > COMPILED_FROM and seen.total() > 50:
            worth_it.add(cond.shape)
        loss = flow_loss(compiled if cond.shape in worth_it else dit, cond, data, generator)
        trainer.update(loss)
    trainer.averaged.copy_to(finished)
    return finished.requires_grad_(False).eval()
