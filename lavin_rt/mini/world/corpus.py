"""Random pairs of a task, from scenes and photographs of one split."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from lavin_rt.mini.world.data import CLIP_MOMENTS, SceneArrays, render_arrays
from lavin_rt.mini.world.scenes import Picture, ScenePicture
from lavin_rt.mini.world.sources import CLIPS_FROM, PHOTOGRAPHS_SHARE, SCENE_SEEDS, photograph_crop
from lavin_rt.mini.world.tasks import WorldTask


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
    def make(cls, split: str, size: int, scenes: int, clips: int) -> Corpus:
        """Renders the first `scenes` and `clips` of a split."""
        first = SCENE_SEEDS[split].start
        stills, moving = range(first, first + scenes), range(first + CLIPS_FROM, first + CLIPS_FROM + clips)
        return cls(split, size, render_arrays(stills, size), render_arrays(moving, size, CLIP_MOMENTS))

    def suitable(self, task: WorldTask) -> list[int]:
        """Indices of the scenes that suit a task."""
        return [index for index in range(len(self.scenes)) if task.suits(self.scenes.picture(index))]

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
        else:
            suitable = self.suitable(task)
            picture = self.still(suitable[rng.integers(len(suitable))], mirrored)
        return np.stack(task.apply(picture, rng))[:, None]


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 `[N, T, S, S, 3]` to float32 `[N, 3, T, S, S]` in [-1, 1], as `lavin_rt.pictures.images` scales."""
    pixels = torch.from_numpy(frames).permute(0, 4, 1, 2, 3)
    # The same strides always, those of size-1 dimensions included, or a compiled network would be compiled again.
    return torch.empty(pixels.shape).copy_(pixels).div_(127.5).sub_(1)
