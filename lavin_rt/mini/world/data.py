"""Rendered scenes in arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lavin_rt.mini.world.scenes import Scene, ScenePicture

CLIP_MOMENTS = 10  # a clip of five frames, and the five that follow


@dataclasses.dataclass(frozen=True, eq=False)
class SceneArrays:
    """Many pictures of scenes in arrays: `colour` uint8 `[N, T, S, S, 3]`, `depth` float16, `normals` int8 (times 127),
    `classes`, `instances` and `unshadowed` uint8, `flow` int8 (times 1024), all `[N, T, S, S, ...]`; T is 1, or the
    moments of a clip.
    """

    colour: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    classes: np.ndarray
    instances: np.ndarray
    unshadowed: np.ndarray
    flow: np.ndarray

    def __len__(self) -> int:
        return len(self.colour)

    def picture(self, index: int, moment: int = 0) -> ScenePicture:
        at = (index, moment)
        return ScenePicture(
            self.colour[at],
            self.depth[at].astype(np.float32),
            self.normals[at].astype(np.float32) / 127,
            self.classes[at],
            self.instances[at],
            self.unshadowed[at],
            self.flow[at].astype(np.float32) / 1024,
        )


def render_arrays(seeds: Sequence[int], size: int, moments: int = 1) -> SceneArrays:
    """Renders scenes at moments 0 to `moments - 1`, in this process."""
    clips = []
    for seed in seeds:
        scene = Scene.from_seed(seed, moving=moments > 1)
        clips.append([scene.render(size, moment) for moment in range(moments)])

    def gathered(name: str, dtype: type) -> np.ndarray:
        return np.array([[getattr(picture, name) for picture in clip] for clip in clips], dtype)

    return SceneArrays(
        gathered("colour", np.uint8),
        gathered("depth", np.float16),
        np.array([[np.round(picture.normals * 127) for picture in clip] for clip in clips], np.int8),
        gathered("classes", np.uint8),
        gathered("instances", np.uint8),
        gathered("unshadowed", np.uint8),
        np.array([[np.clip(np.round(picture.flow * 1024), -127, 127) for picture in clip] for clip in clips], np.int8),
    )
