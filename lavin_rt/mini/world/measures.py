"""How results are measured, as in LaVin-DiT (arXiv 2411.11505, section 4): result and target pictures to figures.

All take uint8 `[S, S, 3]`, or clips of them, `[T, S, S, 3]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from lavin_rt.mini.world.encodings import (
    PALETTE,
    decode_box,
    decode_depth,
    decode_flow,
    decode_normals,
    decode_segments,
    grey,
)
from lavin_rt.mini.world.figures import decode_joints
from lavin_rt.mini.world.tasks import WorldTask

Value = TypeVar("Value", float, np.ndarray)

DELTA = 1.25
NEAR_ANGLE = 11.25  # degrees
NEAR_JOINT = 1 / 16  # of the picture's side


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure's name, what says whether it is better, and in the first place of a task the one that decides."""

    name: str
    higher_is_better: bool

    def better(self, a: Value, b: Value) -> Value:
        """By how much a is better than b, or every a than its b."""
        return a - b if self.higher_is_better else b - a


MEASURES: dict[str, tuple[Measure, ...]] = {
    "depth": (Measure("AbsRel", False), Measure("delta1", True)),
    "normals": (Measure("mean angle", False), Measure("share below 11.25", True)),
    "segments": (Measure("mIoU", True),),
    "mask": (Measure("mIoU", True),),
    "box": (Measure("box IoU", True),),
    "contours": (Measure("F1", True),),
    "joints": (Measure("joints found", True), Measure("joint error", False)),
    "flow": (Measure("flow error", False), Measure("PSNR", True)),
    "colour": (Measure("MSE", False),),
    "restoration": (Measure("PSNR", True), Measure("SSIM", True)),
}


def depth(result: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Mean `|d - d*| / d*` and the share with `max(d / d*, d* / d) < 1.25`, where the target is not black."""
    known = target.any(-1)
    if not known.any():
        return 0.0, 1.0
    found, true = decode_depth(result)[known], decode_depth(target)[known]
    return float((np.abs(found - true) / true).mean()), float((np.maximum(found / true, true / found) < DELTA).mean())


def normals(result: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Mean angle in degrees, and the share of pixels below 11.25, where the target has a normal (is not mid-grey)."""
    known = (np.abs(target.astype(int) - 128) > 1).any(-1)
    if not known.any():
        return 0.0, 1.0
    cosine = (decode_normals(result)[known] * decode_normals(target)[known]).sum(-1)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return float(angle.mean()), float((angle < NEAR_ANGLE).mean())


def segments(result: np.ndarray, target: np.ndarray) -> tuple[float]:
    """Mean intersection over union of the labels that the target has."""
    return (_mean_iou(decode_segments(result), decode_segments(target), len(PALETTE)),)


def mask(result: np.ndarray, target: np.ndarray) -> tuple[float]:
    """Mean intersection over union of foreground and background, divided at mid-grey."""
    found, true = ((grey(picture) > 0.5).astype(np.uint8) for picture in (result, target))
    return (_mean_iou(found, true, 2),)


def box(result: np.ndarray, target: np.ndarray) -> tuple[float]:
    """Intersection over union of the drawn boxes; 0 where the result has none."""
    found, true = decode_box(result), decode_box(target)
    if found is None or true is None:
        return (float(found is true),)
    height, width = (max(0, min(found[i + 2], true[i + 2]) - max(found[i], true[i])) for i in range(2))
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (found, true)]
    return (height * width / (sum(areas) - height * width),)


def contours(result: np.ndarray, target: np.ndarray) -> tuple[float]:
    """The harmonic mean of precision and recall of what is brighter than mid-grey, one pixel off allowed."""
    from scipy.ndimage import binary_dilation

    found, true = grey(result) > 0.5, grey(target) > 0.5
    if not found.any() or not true.any():
        return (float(found.any() == true.any()),)
    square = np.ones((3, 3), bool)
    precision = binary_dilation(true, square)[found].mean()
    recall = binary_dilation(found, square)[true].mean()
    return (float(2 * precision * recall / max(precision + recall, 1e-9)),)


def joints(result: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """The share of joints within a sixteenth of the picture's side of where they are, and the mean error as a share of
    the side, half a side for a joint that is missing.
    """
    apart = np.linalg.norm(decode_joints(result) - decode_joints(target), axis=1)
    apart = np.minimum(np.nan_to_num(apart, nan=0.5), 0.5)
    return float((apart <= NEAR_JOINT).mean()), float(apart.mean())


def flow(result: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Mean distance of flow vectors in hundredths of the picture's side, and PSNR."""
    apart = np.linalg.norm(decode_flow(result) - decode_flow(target), axis=-1)
    return float(100 * apart.mean()), restoration(result, target)[0]


def colour(result: np.ndarray, target: np.ndarray) -> tuple[float]:
    """Mean squared error of values in [0, 1]."""
    return (float(np.square(result / 255 - target / 255).mean()),)


def restoration(result: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """PSNR in dB, of a clip that of all its frames together, and SSIM (Gaussian window, of the luma), the mean of a
    clip's frames.
    """
    psnr = -10 * np.log10(max(colour(result, target)[0], 1e-10))
    frames = zip(*(grey(part).reshape(-1, *part.shape[-3:-1]) for part in (result, target)), strict=True)
    return float(psnr), float(np.mean([_structural_similarity(*pair) for pair in frames]))


def _structural_similarity(a: np.ndarray, b: np.ndarray, sigma: float = 1.5) -> float:
    """Wang et al. 2004, values in [0, 1]."""
    from scipy.ndimage import gaussian_filter

    def smooth(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, sigma, truncate=3.5)

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def _mean_iou(found: np.ndarray, true: np.ndarray, labels: int) -> float:
    scores = [
        np.count_nonzero((found == label) & (true == label)) / np.count_nonzero((found == label) | (true == label))
        for label in range(labels)
        if (true == label).any()
    ]
    return float(np.mean(scores))


_FUNCTIONS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[float, ...]]] = {
    "depth": depth,
    "normals": normals,
    "segments": segments,
    "mask": mask,
    "box": box,
    "contours": contours,
    "joints": joints,
    "flow": flow,
    "colour": colour,
    "restoration": restoration,
}


def measure(task: WorldTask, result: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The figures of a result by their names, the deciding one first."""
    values = _FUNCTIONS[task.measure](result, target)
    return {m.name: value for m, value in zip(MEASURES[task.measure], values, strict=True)}
