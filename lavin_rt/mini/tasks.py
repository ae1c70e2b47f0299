"""The tasks as functions: a picture (or a clip) to an input and a target, and targets back to what they stand for.

Fourteen tasks of pictures and two of clips, all but `negative` after those of LaVin-DiT (arXiv 2411.11505, section
4.1). Every target is decided by its input, the task and, of a task with several `variants`, the pairs of the context,
never by chance. The names let `depth` and `normal` be short for one task each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lavin_rt.errors import InputError
from lavin_rt.mini.scenes import BOX, CYLINDER, GROUND, SPHERE, Picture

NEAR, FAR = 1.5, 12.0  # depth, world units; logarithmic between, white to black
GREY_WEIGHTS = np.array([0.299, 0.587, 0.114])
BOX_RED = np.array([255, 0, 0])
# Segments: sky, ground, then spheres, boxes and cylinders, each left of the middle and right of it.
PALETTE = np.array(
    [
        [0, 0, 0],
        [128, 128, 128],
        [255, 0, 0],
        [255, 128, 128],
        [0, 255, 0],
        [128, 255, 128],
        [0, 0, 255],
        [128, 128, 255],
    ],
    np.uint8,
)


def as_it_is(picture: np.ndarray) -> np.ndarray:
    return picture


def inverted(picture: np.ndarray) -> np.ndarray:
    """The negative of uint8 pictures."""
    return 255 - picture


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A task.

    Attributes:
        name: also of its template folder.
        make: `(picture, rng) -> (input, target)`, uint8 `[S, S, 3]`; for clips `(frames, rng) -> (input, target)`,
            uint8 `[5, S, S, 3]`, of the ten pictures of a clip. The target is not yet any of `variants`.
        source: "scene", "single" (scenes with one object), "any" (photographs too) or "clip".
        measure: how results are measured: "depth", "normals", "segments", "mask", "box", "colour" or "restoration".
        weight: share among the transformer's training samples of its kind, pictures or clips; 0 for the tasks that are
            never trained.
        variants: of the target, one for a whole context: any in training, the first in templates and evaluation. With
            several, the mapping itself is to be read off the pairs (as SegGPT's in-context coloring, arXiv 2304.03284,
            section 3.1).
    """

    name: str
    make: Callable[[Any, np.random.Generator], tuple[np.ndarray, np.ndarray]]
    source: str
    measure: str
    weight: float
    variants: tuple[Callable[[np.ndarray], np.ndarray], ...] = (as_it_is,)

    @property
    def trained(self) -> bool:
        return self.weight > 0

    def apply(self, picture: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Input and target as `make`'s, the target by the first of `variants`."""
        shown, target = self.make(picture, rng)
        return shown, self.variants[0](target)

    @property
    def is_clip(self) -> bool:
        return self.source == "clip"


def grey(colour: np.ndarray) -> np.ndarray:
    """uint8 `[..., 3]` to its luma, float `[...]` in [0, 1]."""
    return colour @ GREY_WEIGHTS / 255


def as_picture(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1], `[..., S, S]` or `[..., S, S, 3]`, clipped, to uint8 RGB."""
    values = values if values.shape[-1] == 3 else np.repeat(values[..., None], 3, axis=-1)
    return np.uint8(np.clip(values, 0, 1) * 255 + 0.5)


def encode_depth(depth: np.ndarray) -> np.ndarray:
    """Depth `[S, S]` in world units to a picture, logarithmic, white at `NEAR`, black at `FAR` and beyond."""
    return as_picture(1 - np.log(np.maximum(depth, NEAR) / NEAR) / np.log(FAR / NEAR))


def decode_depth(picture: np.ndarray) -> np.ndarray:
    """The inverse of `encode_depth`: float64 in [`NEAR`, `FAR`]."""
    return NEAR * (FAR / NEAR) ** (1 - grey(picture))


def encode_normals(normals: np.ndarray) -> np.ndarray:
    """Unit normals in camera axes to a picture, `(n + 1) / 2`; the sky is mid-grey."""
    return as_picture((normals + 1) / 2)


def decode_normals(picture: np.ndarray) -> np.ndarray:
    """The inverse of `encode_normals`, of unit length."""
    normals = picture / 127.5 - 1
    return normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-6)


def segments(picture: Picture) -> np.ndarray:
    """The label `[S, S]` of every pixel, an index into `PALETTE`; an object is left or right by its mean column."""
    labels = (picture.classes == GROUND).astype(np.uint8)
    middle = (picture.classes.shape[1] - 1) / 2
    for instance in range(1, int(picture.instances.max()) + 1):
        here = picture.instances == instance
        if here.any():
            first = {SPHERE: 2, BOX: 4, CYLINDER: 6}[int(picture.classes[here][0])]
            labels[here] = first + int(np.nonzero(here)[1].mean() > middle)
    return labels


def decode_segments(picture: np.ndarray) -> np.ndarray:
    """The label `[S, S]` of the nearest colour in `PALETTE`."""
    apart = picture[..., None, :].astype(int) - PALETTE.astype(int)
    return (apart**2).sum(-1).argmin(-1).astype(np.uint8)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) of a mask, the last two exclusive; None of an empty one."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    if not len(rows):
        return None
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def decode_box(picture: np.ndarray) -> tuple[int, int, int, int] | None:
    """The red frame drawn in a picture, from its longest rows and columns of red; None where nothing is red."""
    values = picture.astype(int)
    red = values[..., 0] - values[..., 1:].max(-1) > 80
    rows, columns = red.sum(1), red.sum(0)
    return box_of((rows > 0.4 * rows.max())[:, None] & (columns > 0.4 * columns.max())[None])


def depth(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return picture.colour, encode_depth(picture.depth)


def normals(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return picture.colour, encode_normals(picture.normals)


def foreground(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return picture.colour, as_picture(picture.mask.astype(float))


def panoptic(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return picture.colour, PALETTE[segments(picture)]


def detection(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The input in dark grey, a red frame drawn inside the object's box."""
    target = as_picture(0.5 * grey(picture.colour))
    box = box_of(picture.mask)
    if box is not None:
        top, left, bottom, right = box
        width = max(1, len(target) // 24)
        target[top : top + width, left:right] = target[max(top, bottom - width) : bottom, left:right] = BOX_RED
        target[top:bottom, left : left + width] = target[top:bottom, max(left, right - width) : right] = BOX_RED
    return picture.colour, target


def edges(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sobel's gradient of the luma."""
    from scipy import ndimage

    values = grey(picture.colour)
    strength = np.hypot(ndimage.sobel(values, 0, mode="nearest"), ndimage.sobel(values, 1, mode="nearest"))
    return picture.colour, as_picture(strength * 0.7)


def inpainting(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Three black rectangles, each side a quarter to a half of the picture's."""
    spoilt, size = picture.colour.copy(), len(picture.colour)
    for _ in range(3):
        height, width = rng.integers(size // 4, size // 2 + 1, 2)
        top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
        spoilt[top : top + height, left : left + width] = 0
    return spoilt, picture.colour


def colorization(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return as_picture(grey(picture.colour)), picture.colour


def deblurring(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A Gaussian of 3.2 to 4.2 pixels at 64."""
    from scipy import ndimage

    sigma = rng.uniform(3.2, 4.2) * len(picture.colour) / 64
    return as_picture(ndimage.gaussian_filter(picture.colour / 255, (sigma, sigma, 0), mode="nearest")), picture.colour


def deraining(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Slanted bright streaks over a thin haze."""
    from scipy import ndimage

    size = len(picture.colour)
    drops = (rng.random((size, size)) < 0.022).astype(float)
    length, slant = max(5, size // 6), rng.uniform(-0.5, 0.5)
    streak = np.zeros((2 * length + 1, 2 * length + 1))
    for step in range(length):
        streak[length - length // 2 + step, round(length + slant * (step - length / 2))] = 1
    rain = np.clip(ndimage.convolve(drops, streak, mode="nearest"), 0, 1)[..., None] * 0.8
    hazy = picture.colour / 255 * 0.85 + 0.1
    return as_picture(hazy * (1 - rain) + rain), picture.colour


def denoising(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian noise of 0.2 to 0.35 of the range."""
    noise = rng.normal(0, rng.uniform(0.2, 0.35), picture.colour.shape)
    return as_picture(picture.colour / 255 + noise), picture.colour


def negative(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The picture itself, or by the task's first variant its negative.

    Four in ten inputs are negatives to begin with, so that a target by itself does not tell much of the variant: only
    the pairs do.
    """
    colour = inverted(picture.colour) if rng.random() < 0.4 else picture.colour
    return colour, colour


def image_from_depth(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return encode_depth(picture.depth), picture.colour


def image_from_normals(picture: Picture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return encode_normals(picture.normals), picture.colour


def frame_prediction(frames: Sequence[Picture], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Five frames and the five that follow."""
    colours = np.stack([frame.colour for frame in frames])
    return colours[:5], colours[5:10]


def video_depth(frames: Sequence[Picture], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([f.colour for f in frames[:5]]), np.stack([encode_depth(f.depth) for f in frames[:5]])


TASKS = {
    task.name: task
    for task in (
        Task("depth_estimation", depth, "scene", "depth", 1.2),
        Task("normal_estimation", normals, "scene", "normals", 1.2),
        Task("foreground_segmentation", foreground, "scene", "mask", 1.6),
        Task("panoptic_segmentation", panoptic, "scene", "segments", 2.0),
        Task("object_detection", detection, "single", "box", 1.6),
        Task("edge_detection", edges, "any", "restoration", 1.0),
        Task("inpainting", inpainting, "any", "restoration", 1.0),
        Task("colorization", colorization, "any", "colour", 0.5),
        Task("deblurring", deblurring, "any", "restoration", 0.6),
        Task("deraining", deraining, "any", "restoration", 0.0),
        Task("denoising", denoising, "any", "restoration", 1.0),
        Task("image_from_depth", image_from_depth, "scene", "restoration", 0.3),
        Task("image_from_normals", image_from_normals, "scene", "restoration", 0.0),
        Task("frame_prediction", frame_prediction, "clip", "restoration", 0.5),
        Task("video_depth_estimation", video_depth, "clip", "depth", 0.5),
        Task("negative", negative, "any", "restoration", 2.0, (inverted, as_it_is)),
    )
}
PICTURE_TASKS = tuple(task for task in TASKS.values() if not task.is_clip)
CLIP_TASKS = tuple(task for task in TASKS.values() if task.is_clip)


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        InputError: no such task.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]
