"""Small random pools of latents, for tests of the transformer's training."""

from __future__ import annotations

import torch

from lavin_rt.dit.config import DiTConfig
from lavin_rt.mini.train.dit import Contexts, Plan
from lavin_rt.mini.train.latents import LatentPool, TaskLatents

SMALL = DiTConfig(hidden_size=36, depth=1, num_heads=1, kv_group=1)
WEIGHTS = {"depth_estimation": 1.0, "denoising": 3.0, "negative": 2.0}


def plan_of(steps: int) -> Plan:
    return Plan(steps, tokens=256, pairs=((0.5, 0.5), (0.2, 0.8)), clip_pairs=(1.0,), clips=0.3, warmup=2, log_every=1)


def random_pool(frames: int = 1, names: tuple[str, ...] = ("depth_estimation", "negative")) -> LatentPool:
    """Targets of the first task are the negated input; of the others that, or twice the input, by the member."""
    inputs = torch.randn(20, 16, frames, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(20)[:, None] + torch.tensor([[[0, 20]], [[0, 40]]])
    tasks = tuple(TaskLatents(name, rows[: 1 + min(i, 1)]) for i, name in enumerate(names))
    return LatentPool(torch.cat([inputs, -inputs, 2 * inputs]).half(), tasks)


def contexts(plan: Plan) -> Contexts:
    return Contexts(random_pool(), random_pool(2, ("denoising",)), WEIGHTS, plan)
