"""Tasks of clips: `(frames, rng)` of the ten moments of a clip to `(input, target)`, uint8 `[5, S, S, 3]`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lavin_rt.mini.world.encodings import as_picture, encode_depth, encode_flow, encode_normals
from lavin_rt.mini.world.scenes import ScenePicture

Pair = tuple[np.ndarray, np.ndarray]
FRAMES = 5


def _colours(frames: Sequence[ScenePicture]) -> np.ndarray:
    return np.stack([frame.colour for frame in frames])


def frame_prediction(frames: Sequence[ScenePicture], rng: np.random.Generator) -> Pair:
    """Five frames and the five that follow."""
    return _colours(frames[:FRAMES]), _colours(frames[FRAMES : 2 * FRAMES])


def frame_interpolation(frames: Sequence[ScenePicture], rng: np.random.Generator) -> Pair:
    """The second and the fourth frame are black."""
    target = _colours(frames[:FRAMES])
    shown = target.copy()
    shown[1::2] = 0
    return shown, target


def video_depth(frames: Sequence[ScenePicture], rng: np.random.Generator) -> Pair:
    return _colours(frames[:FRAMES]), np.stack([encode_depth(f.depth) for f in frames[:FRAMES]])


def video_normals(frames: Sequence[ScenePicture], rng: np.random.Generator) -> Pair:
    return _colours(frames[:FRAMES]), np.stack([encode_normals(f.normals) for f in frames[:FRAMES]])


def video_segmentation(frames: Sequence[ScenePicture], rng: np.random.Generator) -> Pair:
    return _colours(frames[:FRAMES]), np.stack([as_picture(f.mask) for f in frames[:FRAMES]])


def optical_flow(frames: Sequence[ScenePicture], rng: np.random.Generator) -> Pair:
    """Where everything will be in the next frame; everything moves as it has moved."""
    return _colours(frames[:FRAMES]), encode_flow(np.stack([f.flow for f in frames[:FRAMES]]))
