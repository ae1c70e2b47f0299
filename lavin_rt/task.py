"""A task: a context encoded once, and the queries it answers."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lavin_rt.dit.layout import Shape
from lavin_rt.engine import Engine
from lavin_rt.errors import InputError
from lavin_rt.host_state import own_state
from lavin_rt.kept_keys import kept_tensors, keys_to_keep, transformer_of
from lavin_rt.pictures import context as contexts
from lavin_rt.pictures import images
from lavin_rt.pictures.encoded import EncodedContext
from lavin_rt.sampling.denoisers import Tensors
from lavin_rt.sampling.executor import Callback
from lavin_rt.sampling.speeds import SPEEDS, TASK, Speed
from lavin_rt.scalars import floats, real, whole

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

BATCH = 4


def check_seed(seed: int, count: int = 1) -> int:
    """The seed as Python's number; an `InputError` unless `count` seeds from it on are what a generator takes."""
    number = whole(seed)
    if number is None or not -(2**63) <= number <= 2**64 - count:
        raise InputError(f"seed is {seed!r}; expected a whole number from -2**63 to 2**64 - {count}")
    return number


def check_guidance(guidance: float) -> float:
    """The guidance scale as Python's number; an `InputError` unless it is a finite one."""
    number = real(guidance)
    if number is None or not math.isfinite(number):
        raise InputError(f"guidance is {guidance!r}; expected a finite number, such as 1.5")
    return number


def check_batch_size(batch_size: int) -> int:
    """The number of queries that run together as Python's; an `InputError` unless it is a positive one."""
    number = whole(batch_size)
    if number is None or number < 1:
        raise InputError(f"batch_size is {batch_size!r}; expected a positive whole number")
    return number


def draw_noise(
    seeds: Sequence[int], frames: int, size: tuple[int, int], channels: int = 16, factor: int = 8
) -> torch.Tensor:
    """Noise of every query, drawn on the CPU in float32 so that a seed means the same on every device.

    Returns:
        `[len(seeds), channels, frames, height / factor, width / factor]` float32, item i from `seeds[i]` alone.
    """
    shape = (1, channels, frames, size[0] // factor, size[1] // factor)
    generators = (torch.Generator().manual_seed(check_seed(seed)) for seed in seeds)
    return torch.cat([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators])


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What one query gave.

    Attributes:
        frames: `[T, 3, H, W]` uint8.
        latents: `[1, 16, t, h, w]` float32, scaled, before decoding.
        seed: of the noise; None where the caller gave the noise.
    """

    frames: torch.Tensor
    latents: torch.Tensor
    seed: int | None

    @property
    def image(self) -> Image.Image | list[Image.Image]:
        """The picture, or the list of a clip's frames."""
        pictures = [images.to_pil(frame) for frame in self.frames]
        return pictures[0] if len(pictures) == 1 else pictures


def task_shape(
    queries: int, pairs: int, clip_frames: int, size: tuple[int, int], guided: bool, kept: bool = False
) -> Shape:
    """The sampler's shape for pairs and queries of `clip_frames` latent frames at (height, width) in pixels."""
    grid = (size[0] // 8, size[1] // 8)
    return Shape(queries, (2 * pairs + 1) * clip_frames, clip_frames, clip_frames, *grid, guided, kept)


class Task:
    """A context encoded for an engine; call it with queries.

    Attributes:
        context: the encoded pairs, which `context.save(path)` keeps for later.
        frames: the pairs' pictures at the task's size, None where the context came encoded.
        cut: frames that longer queries are cut to; None takes them as they are.
    """

    def __init__(
        self,
        engine: Engine,
        context: EncodedContext,
        frames: contexts.ContextFrames | None = None,
        cut: int | None = None,
    ):
        self.engine = engine
        self.cut = cut
        self.context = context
        self.frames = frames
        self._embedded: torch.Tensor | None = None
        self._keys: tuple[object, Tensors] | None = None
        self._kept_for: object = engine.network  # whose the keys and values that came with the context are, if any did

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew from the pairs."""
        return {**self.__dict__, "_embedded": None, "_keys": None, "_kept_for": None}

    def __repr__(self) -> str:
        clips = f" of clips of {self.context.frames_per_clip} frames" if self.context.frames_per_clip > 1 else ""
        plural = "s" * (self.context.pairs != 1)
        return f"<Task: {self.context.pairs} pair{plural}{clips} at {self.size[0]}x{self.size[1]}, {self.engine!r}>"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures that the network works on."""
        return self.context.size

    @property
    def kept_bytes(self) -> int:
        """Memory that it holds on the network's device between runs."""
        tensors = () if self._keys is None else self._keys[1]
        return sum(part.nbytes for part in (self._embedded, *tensors) if part is not None)

    def __call__(self, query: Any, **options) -> Image.Image | list[Image.Image]:
        """Answers one query; the options are those of `run`, and `noise` `[1, 16, T, h, w]`."""
        return self.run([query], **options)[0].image

    def batch(self, queries: Sequence[Any], **options) -> list[Image.Image | list[Image.Image]]:
        """Answers several queries, `batch_size` at a time in one packed run; item i uses `seed + i`."""
        return [result.image for result in self.run(queries, **options)]

    @own_state()
    def run(
        self,
        queries: Sequence[Any],
        steps: int | None = None,
        guidance: float = 1.5,
        seed: int = 0,
        noise: torch.Tensor | np.ndarray | None = None,
        batch_size: int | None = None,
        keep_size: bool = False,
        callback: Callback | None = None,
        speed: str | Speed = "exact",
    ) -> list[Result]:
        """Answers queries.

        Args:
            queries: pictures or clips: paths, PIL images, uint8 arrays `[H, W, 3]` or `[T, H, W, 3]`; all of one
                frame count.
            steps: knots of the published schedule, 20 by default; the network runs `steps - 1` times. Not beside a
                speed that has a grid of its own.
            guidance: classifier-free guidance scale; 1.0 runs the conditional branch alone.
            seed: of the noise; query i uses `seed + i`.
            noise: `[queries, 16, T, h, w]` instead of a seed, a tensor or an array.
            batch_size: queries that run together; None takes up to 4, as many as memory allows.
            keep_size: return pictures at each query's own size instead of the task's.
            callback: `(step, evaluations, latents)` after every step; an exception raised in it ends the run.
            speed: a name in `SPEEDS`, or a `Speed`; all but `exact` change answers by more than rounding.

        Returns:
            one `Result` per query, in order.

        Raises:
            InputError: a query that cannot be read or does not fit the context, a bad option, or too little memory.
            NonFiniteError: naming the step at which the latents stopped being finite; or the decoder's pixels are not.
        """
        clips = [self._read(query) for query in queries]
        if not clips:
            raise InputError("no queries; expected at least one picture")
        for clip in clips:
            images.check_clip_frames(len(clip), "query")
            contexts.check_query_frames(len(clip), self.context.frames_per_clip)
        seed, guidance = check_seed(seed, len(clips)), check_guidance(guidance)
        speed = self.engine.speed(speed)
        knots = speed.knots(steps)
        batch_size = self.batch_size(len(clips), batch_size, guidance, speed)
        if noise is None:
            noise = draw_noise([seed + i for i in range(len(clips))], self._clip_frames, self.size)
            seeds: list[int | None] = [seed + i for i in range(len(clips))]
        else:
            noise = floats(noise, "noise")
            expected = [len(clips), 16, self._clip_frames, self.size[0] // 8, self.size[1] // 8]
            if list(noise.shape) != expected:
                raise InputError(f"noise is {list(noise.shape)}; expected {expected}")
            seeds = [None] * len(clips)
        executor, results = self.engine.executor, []
        keys = self._kept_keys() if speed.refresh == TASK else None
        for first in range(0, len(clips), batch_size):
            chunk = slice(first, first + batch_size)
            query, start = self._encode(clips[chunk], seed + first), noise[chunk]
            count, together = len(query), self._together(len(query), batch_size, guidance, speed)
            if together > count:
                query, start = (
                    torch.cat([part, part[-1:].expand(together - count, *part[0].shape)]) for part in (query, start)
                )
            self.engine.ready_decoder((1, *start.shape[1:]))
            latents = executor.sample(
                self._shape(together, guidance, speed),
                self._embedded_context(),
                executor.embed(query),
                start,
                knots,
                guidance,
                callback and partial(_of_first, callback, count),
                speed,
                keys,
            )[:count]
            decoded = self.engine.decode(latents).split(self.context.frames_per_clip)
            for clip, one, frames, used in zip(clips[chunk], latents.split(1), decoded, seeds[chunk], strict=True):
                if keep_size:
                    frames = images.resize(frames, (clip.shape[-2], clip.shape[-1]))
                results.append(Result(frames, one.cpu(), used))
        return results

    def batch_size(
        self, queries: int, asked: int | None = None, guidance: float = 1.5, speed: str | Speed = "exact"
    ) -> int:
        """How many of so many queries run together: what is asked, or up to 4, as many as memory allows.

        Raises:
            InputError: no positive number, or more than memory allows, naming what would fit.
        """
        executor, speed = self.engine.executor, self.engine.speed(speed)
        if asked is None:
            asked = executor.most_queries(self._shape(min(queries, BATCH), guidance, speed)) or 1
        together = min(check_batch_size(asked), queries)
        executor.check_memory(self._shape(together, guidance, speed))
        return together

    def _together(self, count: int, batch_size: int, guidance: float, speed: Speed) -> int:
        """How many queries run where `count` of a batch are left: the batch filled up with the last of them, where they
        would need a shape of their own to be captured or compiled.
        """
        executor = self.engine.executor
        filled = executor.settles_shapes and not executor.holds(self._shape(count, guidance, speed))
        return batch_size if filled else count

    def prepare(
        self, queries: int = 1, steps: int | None = None, guidance: float = 1.5, speed: str | Speed = "exact"
    ) -> None:
        """Makes the sampler ready for so many queries at once: the schedule's table, buffers, compilation, capture, and
        what the speed keeps with the task.

        Raises:
            InputError: too little memory, naming what would fit, or a bad option.
        """
        speed = self.engine.speed(speed)
        knots = speed.knots(steps)
        if speed.refresh == TASK:
            self._kept_keys()
        shape = self._shape(queries, guidance, speed)
        self.engine.ready_decoder((1, 16, shape.target_frames, shape.height, shape.width))
        self.engine.executor.prepare(shape, knots, speed)

    @own_state()
    def warmup(
        self, steps: int | None = None, guidance: float = 1.5, queries: int = 1, speed: str | Speed = "exact"
    ) -> float:
        """Puts compilation, capture and caches behind, so that the next run of this shape is as fast as any.

        Encodes and decodes a black picture and prepares the sampler; no picture is sampled. Returns the seconds taken.
        """
        began = time.perf_counter()
        self._embedded_context()
        black = torch.zeros(self.context.frames_per_clip, 3, *self.size, dtype=torch.uint8)
        self.engine.decode(self._encode([black], 0))
        self.prepare(queries, steps, guidance, speed)
        return time.perf_counter() - began

    def _read(self, query: Any) -> torch.Tensor:
        """A query's frames, uint8 `[T, 3, H, W]`; where pictures are asked for, an animation's first."""
        file = isinstance(query, str | os.PathLike)
        if file and self.context.frames_per_clip == 1 and not os.path.isdir(query):
            return images.load_picture(query)[None]
        return images.load_clip(query, self.cut)

    @property
    def _clip_frames(self) -> int:
        """Latent frames of the query and of its target."""
        return images.latent_frames(self.context.frames_per_clip)

    def _shape(self, queries: int, guidance: float, speed: Speed = SPEEDS["exact"]) -> Shape:
        queries, guided = check_batch_size(queries), check_guidance(guidance) != 1.0
        return task_shape(queries, self.context.pairs, self._clip_frames, self.size, guided, speed.keeps)

    def _embedded_context(self) -> torch.Tensor:
        """The context as the network reads it, made once and kept on its device."""
        if self._embedded is None:
            self._embedded = self.engine.executor.embed(self.context.latents)
        return self._embedded

    def _kept_keys(self) -> Tensors:
        """The pairs' keys and values for speeds that make them once a task, kept on the network's device."""
        network = self.engine.network
        if self._keys is None or self._keys[0] is not network:
            self._keys = network, self._make_keys()
        return self._keys[1]

    def _make_keys(self) -> Tensors:
        network, kept = self.engine.network, self.context.kept
        if kept is not None and network is self._kept_for:
            return kept_tensors(kept, network)
        shape = task_shape(1, self.context.pairs, self._clip_frames, self.size, guided=False, kept=True)
        return self.engine.executor.context_keys(shape, self._embedded_context())

    def with_keys(self) -> EncodedContext:
        """The context with what speeds such as `fastest` make once a task, to be saved.

        Raises:
            InputError: an artifact's, or too little memory.
        """
        network = self.engine.network
        transformer_of(network)  # refuses an artifact's before work is done
        return dataclasses.replace(
            self.context, kept=keys_to_keep(network, self.engine.dit_fingerprint, self._kept_keys())
        )

    def _encode(self, clips: Sequence[torch.Tensor], seed: int) -> torch.Tensor:
        """Scaled latents of queries, `[queries, 16, t, h, w]`."""
        encoded = []
        for i, clip in enumerate(clips):
            pixels = images.to_pixels(images.resize(clip, self.size)).transpose(0, 1)[None]
            generator = None
            if self.context.posterior == "sample":
                generator = torch.Generator().manual_seed(seed + i)
                # The posterior's draw comes behind the noise's.
                torch.randn(
                    *(16, self._clip_frames, *(edge // 8 for edge in self.size)),
                    generator=generator,
                    dtype=torch.float32,
                )
            encoded += self.engine.encode([pixels], generator)
        return torch.cat(encoded)


def _of_first(callback: Callback, count: int, done: int, evaluations: int, state: torch.Tensor) -> None:
    """Shows a callback the latents of so many queries, which others fill the batch up behind."""
    callback(done, evaluations, state[:count])
