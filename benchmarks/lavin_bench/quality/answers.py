"""A pipeline's answers to held-out queries: pictures encoded once, queries in batches, each with its own context."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lavin_bench.quality.queries import TaskQueries
from lavin_bench.timing import header
from lavin_rt.dit.layout import Shape
from lavin_rt.errors import InputError
from lavin_rt.mini.world.corpus import to_pixels
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.speeds import SPEEDS, TASK, Speed
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

    Attributes:
        seconds: that the sampling of the latest results took.
    """

    def __init__(self, pipe: Pipeline, asked: TaskQueries, sampling: Sampling):
        self.pipe, self.asked, self.sampling, self.seconds = pipe, asked, sampling, 0.0
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
        self,
        pairs: int,
        shuffled: bool = False,
        progress: Callable[[int], object] | None = None,
        speed: Speed = SPEEDS["exact"],
    ) -> np.ndarray:
        """The answers, uint8 `[N, T, S, S, 3]`.

        Args:
            pairs: of each context.
            shuffled: every input of a context stands beside another pair's target (`TaskQueries.partner`).
            progress: called with the number of queries answered, batch by batch.
            speed: of the sampling; one with a grid of its own has no use for the sampling's steps. Keys and values that
                it makes once a task are made of every query's own context.

        Raises:
            InputError: a shape that the pipeline cannot run.
            NonFiniteError: naming the step at which latents stopped being finite; or the decoder's pixels are not.
        """
        executor, sampling, found = self.pipe.executor, self.sampling, []
        knots = speed.knots(None if speed.owns_grid else sampling.steps)
        count, frames = len(self.asked), self._queries.shape[2]
        size = self.asked.queries.shape[2:4]
        guided = sampling.guidance != 1.0
        shape = task_shape(1, pairs, frames, size, guided, speed.keeps)
        batch, self.seconds = self._batch(shape, knots, speed), 0.0
        for start in range(0, count, batch):
            part = slice(start, min(start + batch, count))
            rows = torch.from_numpy(self.asked.picks[part, :pairs])
            context = self._pool[rows]  # [n, pairs, 2, 16, t, h, w]
            if shuffled:
                context[:, :, 1] = self._pool[self.asked.partner(rows), 1]
            context = context.flatten(1, 2).transpose(1, 2).flatten(2, 3)  # [n, 16, 2 pairs t, h, w]
            queries = self._queries[part]
            of_batch = dataclasses.replace(shape, queries=len(queries))
            embedded, keys = executor.embed(context), None
            if speed.refresh == TASK:
                keys = executor.context_keys(dataclasses.replace(of_batch, guided=False), embedded)
            noise = draw_noise([sampling.seed + i for i in range(part.start, part.stop)], frames, size)
            began = time.perf_counter()
            latents = executor.sample(
                of_batch, embedded, executor.embed(queries), noise, knots, sampling.guidance, None, speed, keys
            ).cpu()
            self.seconds += time.perf_counter() - began
            found.append(self._decoded(latents))
            if progress is not None:
                progress(len(queries))
        return np.concatenate(found)

    def _batch(self, shape: Shape, knots: torch.Tensor, speed: Speed) -> int:
        """The most queries at once, of those asked for, 4 (what artifacts take by default) and 1, that can be run."""
        asked = min(self.sampling.batch, len(self.asked))
        for queries in sorted({asked, min(4, asked), 1}, reverse=True):
            try:
                self.pipe.executor.prepare(dataclasses.replace(shape, queries=queries), knots, speed)
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


def new_record(kind: str, pipe: Pipeline) -> dict[str, Any]:
    """The beginning of a record: where and with which model it was made."""
    of = {"checkpoint": pipe.source, "impl": pipe.impl}
    return {"kind": kind, "header": {**header(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch.")}, **of}


@dataclasses.dataclass(frozen=True, eq=False)
class Answered:
    """What one pipeline made of one task.

    Attributes:
        asked: queries and contexts.
        results: by number of pairs, uint8 `[N, T, S, S, 3]`.
        shuffled: with shuffled targets, of the most pairs; None of clips.
        ceilings: targets encoded and decoded.
    """

    asked: TaskQueries
    results: dict[int, np.ndarray]
    shuffled: np.ndarray | None
    ceilings: np.ndarray
