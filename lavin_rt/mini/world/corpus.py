"""Random pairs of a task, from kept scenes and from photographs of one split."""

from __future__ import annotations

import dataclasses
import functools
import os

import numpy as np
import torch

from lavin_rt.mini.world.data import CLIP_MOMENTS, SceneArrays, cached_scenes, render_arrays
from lavin_rt.mini.world.scenes import CYLINDER, Picture, ScenePicture
from lavin_rt.mini.world.sources import SCENE_SEEDS, photograph_crop
from lavin_rt.mini.world.tasks import CLASS_SEEN, WorldTask

PHOTOGRAPHS_SHARE = 0.4  # of the pictures of a task that photographs serve for as well
CLIPS_FROM = 500_000  # clips' scenes begin here within their split


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """What pairs are drawn from.

    Attributes:
        split: "train", "template" or "evaluation".
        size: of pictures, pixels a side.
        scenes, clips: rendered; of clips ten moments each.
    """

    split: str
    size: int
    scenes: SceneArrays
    clips: SceneArrays

    @classmethod
    def make(
        cls, split: str, size: int, scenes: int, clips: int, cache: str | os.PathLike | None = None, workers: int = 1
    ) -> Corpus:
        """Renders the first `scenes` and `clips` of a split, or reads them from the folder `cache`."""
        first = SCENE_SEEDS[split].start
        stills, moving = range(first, first + scenes), range(first + CLIPS_FROM, first + CLIPS_FROM + clips)
        if cache is None:
            return cls(split, size, render_arrays(stills, size), render_arrays(moving, size, CLIP_MOMENTS))
        return cls(
            split,
            size,
            cached_scenes(cache, stills, size, workers=workers),
            cached_scenes(cache, moving, size, CLIP_MOMENTS, workers),
        )

    @functools.cached_property
    def single(self) -> np.ndarray:
        """Indices of the scenes with one object that is seen whole enough to be boxed."""
        largest = self.scenes.instances.max((1, 2, 3))
        seen = (self.scenes.instances > 0).mean((1, 2, 3))
        return np.nonzero((largest == 1) & (seen > CLASS_SEEN))[0]

    @functools.cached_property
    def varied(self) -> np.ndarray:
        """Indices of the scenes in which every class is seen."""
        seen = [(self.scenes.classes == kind).mean((1, 2, 3)) > CLASS_SEEN for kind in range(CYLINDER + 1)]
        return np.nonzero(np.all(seen, axis=0))[0]

    def still(self, index: int, mirrored: bool) -> ScenePicture:
        picture = self.scenes.picture(index)
        return picture.mirrored() if mirrored else picture

    def clip(self, index: int, mirrored: bool) -> list[ScenePicture]:
        frames = [self.clips.picture(index, moment) for moment in range(CLIP_MOMENTS)]
        return [frame.mirrored() for frame in frames] if mirrored else frames

    def draw(self, task: WorldTask, rng: np.random.Generator) -> np.ndarray:
        """A random pair of the task: input and target, uint8 `[2, T, S, S, 3]`."""
        mirrored = bool(rng.random() < 0.5)
        if task.is_clip:
            return np.stack(task.apply(self.clip(int(rng.integers(len(self.clips))), mirrored), rng))
        if task.source == "any" and rng.random() < PHOTOGRAPHS_SHARE:
            picture: Picture = Picture(photograph_crop(self.split, rng, self.size))
        elif task.source in ("single", "varied"):
            suitable = self.single if task.source == "single" else self.varied
            picture = self.still(int(suitable[rng.integers(len(suitable))]), mirrored)
        else:
            picture = self.still(int(rng.integers(len(self.scenes))), mirrored)
        return np.stack(task.apply(picture, rng))[:, None]


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 `[N, T, S, S, 3]` to float32 `[N, 3, T, S, S]` in [-1, 1], as `lavin_rt.pictures.images` scales."""
    pixels = torch.from_numpy(frames).permute(0, 4, 1, 2, 3)
    # The same strides always, those of size-1 dimensions included, or a compiled network would be compiled again.
    return torch.empty(pixels.shape).copy_(pixels).div_(127.5).sub_(1)
