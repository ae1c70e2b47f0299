"""What targets stand for, as pictures and back: depth, normals, segments, boxes, flow. Pictures are uint8 RGB."""

from __future__ import annotations

import numpy as np

from lavin_rt.mini.world.scenes import BOX, CYLINDER, GROUND, SPHERE, ScenePicture

NEAR, FAR = 1.5, 12.0  # depth, world units; logarithmic between, white to black
FASTEST = 1 / 16  # flow a moment, as a share of the picture's side, of the strongest colour
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
CLAY, CLAY_SKY = np.array([0.95, 0.84, 0.72]), np.array([0.55, 0.7, 0.9])
CLAY_LIGHT = np.array([-0.45, 0.65, 0.61])  # in camera axes, unit


def grey(colour: np.ndarray) -> np.ndarray:
    """uint8 `[..., 3]` to its luma, float `[...]` in [0, 1]."""
    return colour @ GREY_WEIGHTS / 255


def as_picture(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1], `[..., S, S]` or `[..., S, S, 3]`, clipped, to uint8 RGB."""
    values = (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)
    return values if values.shape[-1] == 3 else np.repeat(values[..., None], 3, axis=-1)


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


def in_clay(normals: np.ndarray) -> np.ndarray:
    """How surfaces of those normals, float `[S, S, 3]` in camera axes, look in bare clay; 0 is sky."""
    light = 0.25 + 0.75 * np.maximum(normals @ CLAY_LIGHT, 0)
    sky: np.ndarray = np.logical_not(normals.any(-1))
    return as_picture(np.where(sky[..., None], CLAY_SKY, CLAY * light[..., None]))


def segments(picture: ScenePicture) -> np.ndarray:
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


def encode_flow(flow: np.ndarray) -> np.ndarray:
    """Flow `[..., S, S, 2]` in shares of the side to a picture: hue the direction, saturation the root of the speed,
    white at rest, full at `FASTEST` and beyond.
    """
    from skimage.color import hsv2rgb

    flow = flow.astype(np.float32)
    speed = np.hypot(flow[..., 0], flow[..., 1])
    hue = np.arctan2(flow[..., 1], flow[..., 0]) / np.float32(2 * np.pi) % 1
    return as_picture(hsv2rgb(np.stack([hue, np.sqrt(np.minimum(speed / FASTEST, 1)), np.ones_like(hue)], axis=-1)))


def decode_flow(picture: np.ndarray) -> np.ndarray:
    """The inverse of `encode_flow`, float `[..., S, S, 2]`."""
    from skimage.color import rgb2hsv

    hue, saturation, _ = np.moveaxis(rgb2hsv(picture), -1, 0)
    direction = np.stack([np.cos(2 * np.pi * hue), np.sin(2 * np.pi * hue)], axis=-1)
    return FASTEST * (saturation**2)[..., None] * direction
