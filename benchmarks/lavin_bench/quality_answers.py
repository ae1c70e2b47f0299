"""A pipeline's answers to held-out queries: pictures encoded once, queries in batches, each with its own context."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from lavin_bench.quality_queries import TaskQueries
from lavin_rt.errors import InputError
from lavin_rt.knots import schedule
from lavin_rt.layout import Shape
from lavin_rt.mini.corpus import to_pixels
from lavin_rt.pipeline import Pipeline
from lavin_rt.task import draw_noise, task_shape


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How every query is answered.

    Attributes:
        steps: knots of the schedule.
        guidance: scale of classifier-free guidance.
        seed: of the noise; query i has that of `seed + i`, whatever the context and the pipeline.
        batch: queries at once, fewer where that does not fit.
    """

    steps: int = 20
    guidance: float = 1.5
    seed: int = 0
    batch: int = 8


class Answers:
    """One pipeline's answers to one task's queries.

    Args:
        pipe: what answers.
        asked: queries and pairs.
        sampling: how.
    """

    def __init__(self, pipe: Pipeline, asked: TaskQueries, sampling: Sampling):
        self.pipe, self.asked, self.sampling = pipe, asked, sampling
        pool = asked.pool.reshape(-1, *asked.pool.shape[2:])
        places: dict[bytes, int] = {}  # members of a family share their inputs
        rows = [places.setdefault(frames.tobytes(), len(places)) for frames in pool]
        first = [rows.index(place) for place in range(len(places))]
        self._pool = self._encoded(pool[first])[torch.tensor(rows)].unflatten(0, asked.pool.shape[:2])
        self._queries = self._encoded(asked.queries)

    def ceilings(self) -> np.ndarray:
        """The targets encoded and decoded, uint8 `[N, T, S, S, 3]`."""
        return self._decoded(self._encoded(self.asked.targets))

    def results(
        self, pairs: int, shuffled: bool = False, progress: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """The answers, uint8 `[N, T, S, S, 3]`.

        Args:
            pairs: of each context.
            shuffled: every input of a context stands beside another pair's target (`TaskQueries.partner`).
            progress: called with the number of queries answered, batch by batch.

        Raises:
            InputError: a shape that the pipeline cannot run.
            NonFiniteError: naming the step at which latents stopped being finite.
        """
        executor, sampling, found = self.pipe.executor, self.sampling, []
        knots = schedule(sampling.steps)
        count, frames = len(self.asked), self._queries.shape[2]
        size = self.asked.queries.shape[2:4]
        guided = sampling.guidance != 1.0
        batch = self._batch(task_shape(1, pairs, frames, size, guided), knots)
        for start in range(0, count, batch):
            part = slice(start, min(start + batch, count))
            rows = torch.from_numpy(self.asked.picks[part, :pairs])
            context = self._pool[rows]  # [n, pairs, 2, 16, t, h, w]
            if shuffled:
                context[:, :, 1] = self._pool[self.asked.partner(rows), 1]
            context = context.flatten(1, 2).transpose(1, 2).flatten(2, 3)  # [n, 16, 2 pairs t, h, w]
            queries = self._queries[part]
            latents = executor.sample(
                task_shape(len(queries), pairs, frames, size, guided),
                executor.embed(context),
                executor.embed(queries),
                draw_noise([sampling.seed + i for i in range(part.start, part.stop)], frames, size),
                knots,
                sampling.guidance,
            )
            found.append(self._decoded(latents))
            if progress is not None:
                progress(len(queries))
        return np.concatenate(found)

    def _batch(self, shape: Shape, knots: torch.Tensor) -> int:
        """The most queries at once, of those asked for, 4 (what artifacts take by default) and 1, that can be run."""
        asked = min(self.sampling.batch, len(self.asked))
        for queries in sorted({asked, min(4, asked), 1}, reverse=True):
            try:
                self.pipe.executor.prepare(dataclasses.replace(shape, queries=queries), knots)
                return queries
            except InputError:
                if queries == 1:
                    raise
        raise AssertionError

    def _encoded(self, frames: np.ndarray) -> torch.Tensor:
        """Scaled latents `[N, 16, t, h, w]` of uint8 `[N, T, S, S, 3]`."""
        return torch.cat(self.pipe.encode(to_pixels(frames).split(1)))

    def _decoded(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 `[N, T, S, S, 3]` of scaled latents `[N, 16, t, h, w]`."""
        return np.stack([self.pipe.decode(one).permute(0, 2, 3, 1).numpy() for one in latents.split(1)])
