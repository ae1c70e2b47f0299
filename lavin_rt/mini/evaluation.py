"""Held-out queries and contexts, and what a model's results are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from lavin_rt.mini.corpus import Corpus, to_pixels
from lavin_rt.mini.tasks import TASKS, Task
from lavin_rt.model import JDiT
from lavin_rt.sampler import sample
from lavin_rt.vae import STVAE, scale_latents, unscale_latents


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """Queries of a task with a context each; all of scenes and photographs that training never saw.

    Attributes:
        task: the task.
        contexts: uint8 `[N, pairs, 2, T, S, S, 3]`.
        queries, targets: uint8 `[N, T, S, S, 3]`.
    """

    task: Task
    contexts: np.ndarray
    queries: np.ndarray
    targets: np.ndarray

    @classmethod
    def draw(cls, corpus: Corpus, task: Task, count: int, pairs: int, seed: int = 0) -> HeldOut:
        """The same queries for any number of pairs, and fewer pairs are the beginning of more."""
        queries, contexts = [], []
        single = corpus.single
        for item in range(count):
            rng = np.random.default_rng([seed, list(TASKS).index(task.name), item])
            queries.append(corpus.draw(task, rng, single))
            contexts.append([corpus.draw(task, rng, single) for _ in range(pairs)])
        both = np.stack(queries)
        return cls(task, np.array(contexts), both[:, 0], both[:, 1])

    def copies(self) -> np.ndarray:
        """The first yardstick: every query for its own result."""
        return self.queries

    def context_means(self) -> np.ndarray:
        """The second: the mean of the context's targets."""
        return np.uint8(self.contexts[:, :, 1].mean(1) + 0.5)


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """float `[N, 3, T, S, S]` in [-1, 1] to uint8 `[N, T, S, S, 3]`, as the pipeline writes pictures."""
    values = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
    return values.to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()


@torch.no_grad()
def encode(vae: STVAE, frames: np.ndarray) -> torch.Tensor:
    """uint8 `[N, T, S, S, 3]` to scaled latents `[N, 16, t, h, w]`."""
    return scale_latents(vae.encode(to_pixels(frames).to(next(vae.parameters()).device), batch=16).mode())


@torch.no_grad()
def decode(vae: STVAE, latents: torch.Tensor) -> np.ndarray:
    """Scaled latents `[N, 16, t, h, w]` to uint8 `[N, T, S, S, 3]`."""
    return to_frames(vae.decode(unscale_latents(latents), batch=16))


def ceilings(vae: STVAE, held_out: HeldOut) -> np.ndarray:
    """The third yardstick, from above: the targets encoded and decoded."""
    return decode(vae, encode(vae, held_out.targets))


def results(
    dit: JDiT, vae: STVAE, held_out: HeldOut, steps: int = 20, guidance: float = 1.5, seed: int = 0, batch: int = 16
) -> np.ndarray:
    """The model's results, uint8 `[N, T, S, S, 3]`; item i has the noise of `seed + i`."""
    found = []
    for start in range(0, len(held_out.queries), batch):
        part = slice(start, start + batch)
        condition = condition_latents(vae, held_out.contexts[part], held_out.queries[part])
        frames = encode(vae, held_out.queries[:1]).shape[2]
        noise = [
            torch.randn(1, 16, frames, *condition.shape[3:], generator=torch.Generator().manual_seed(seed + i))
            for i in range(start, start + len(condition))
        ]
        latents = sample(dit, condition, torch.cat(noise), steps, guidance, query_frames=frames)
        found.append(decode(vae, latents))
    return np.concatenate(found)


def condition_latents(vae: STVAE, contexts: np.ndarray, queries: np.ndarray) -> torch.Tensor:
    """uint8 contexts `[N, pairs, 2, T, S, S, 3]` and queries `[N, T, S, S, 3]` to conditions
    `[N, 16, (2 pairs + 1) t, h, w]`.
    """
    count, pairs = contexts.shape[:2]
    context = encode(vae, contexts.reshape(-1, *contexts.shape[3:]))  # [N * 2 pairs, 16, t, h, w]
    context = context.unflatten(0, (count, 2 * pairs)).transpose(1, 2).flatten(2, 3)
    return torch.cat([context, encode(vae, queries)], dim=2)


def confidence(differences: Sequence[float]) -> tuple[float, float]:
    """The mean of paired differences and the half-width of its 95 % interval (normal)."""
    values = np.asarray(differences, float)
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))
