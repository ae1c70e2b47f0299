"""Tasks that say what is to be seen in a picture, and pictures made of what is known: `(picture, rng)` to
`(input, target)`, uint8 `[S, S, 3]`.
"""

from __future__ import annotations

import numpy as np

from lavin_rt.mini.world.encodings import (
    BOX_RED,
    PALETTE,
    as_picture,
    box_of,
    encode_depth,
    encode_normals,
    grey,
    in_clay,
    segments,
)
from lavin_rt.mini.world.figures import MANNEQUIN, MANNEQUIN_BEHIND, draw_figure, encode_joints, random_joints
from lavin_rt.mini.world.scenes import Picture, ScenePicture

Pair = tuple[np.ndarray, np.ndarray]
SHADOW = 0.06  # luma that a shadow takes away at least


def depth(picture: ScenePicture, rng: np.random.Generator) -> Pair:
    return picture.colour, encode_depth(picture.depth)


def normals(picture: ScenePicture, rng: np.random.Generator) -> Pair:
    return picture.colour, encode_normals(picture.normals)


def foreground(picture: ScenePicture, rng: np.random.Generator) -> Pair:
    return picture.colour, as_picture(picture.mask)


def panoptic(picture: ScenePicture, rng: np.random.Generator) -> Pair:
    return picture.colour, PALETTE[segments(picture)]


def contours(picture: ScenePicture, rng: np.random.Generator) -> Pair:
    """White where an object meets what is not that object, two pixels wide."""
    return picture.colour, as_picture(outlines(picture.instances))


def outlines(instances: np.ndarray) -> np.ndarray:
    """bool `[S, S]`: pixels beside one of another instance."""
    found = np.zeros(instances.shape, bool)
    for axis in (0, 1):
        meeting = np.diff(instances, axis=axis) != 0
        found |= np.pad(meeting, [(int(axis == 0), 0), (int(axis == 1), 0)])
        found |= np.pad(meeting, [(0, int(axis == 0)), (0, int(axis == 1))])
    return found


def shadows(picture: ScenePicture, rng: np.random.Generator) -> Pair:
    """White where something else keeps the light away."""
    return picture.colour, as_picture(grey(picture.unshadowed) - grey(picture.colour) > SHADOW)


def detection(picture: ScenePicture, rng: np.random.Generator) -> Pair:
    """The input in dark grey, a red frame drawn inside the object's box."""
    target = as_picture(0.5 * grey(picture.colour))
    box = box_of(picture.mask)
    if box is not None:
        top, left, bottom, right = box
        width = max(1, len(target) // 20)
        target[top : top + width, left:right] = target[max(top, bottom - width) : bottom, left:right] = BOX_RED
        target[top:bottom, left : left + width] = target[top:bottom, max(left, right - width) : right] = BOX_RED
    return picture.colour, target


def edges(picture: Picture, rng: np.random.Generator) -> Pair:
    """Sobel's gradient of the luma."""
    from scipy import ndimage

    values = grey(picture.colour)
    strength = np.hypot(ndimage.sobel(values, 0, mode="nearest"), ndimage.sobel(values, 1, mode="nearest"))
    return picture.colour, as_picture(strength * 0.7)


def keypoints(picture: Picture, rng: np.random.Generator) -> Pair:
    """A jointed figure in clothes of random colours before the picture, to its joints."""
    joints = random_joints(rng)
    colours = np.stack([np.array([1, 0.78, 0.62]) * rng.uniform(0.35, 1), *rng.uniform(0.1, 1, (2, 3))])
    shown = draw_figure(joints, colours, picture.colour / 255)
    return as_picture(shown), encode_joints(joints, len(shown))


def figure_from_keypoints(picture: Picture, rng: np.random.Generator) -> Pair:
    """Joints to a mannequin, always of the same build, in the same clothes, before the same grey."""
    joints, size = random_joints(rng), len(picture.colour)
    behind = np.full((size, size, 3), MANNEQUIN_BEHIND)
    return encode_joints(joints, size), as_picture(draw_figure(joints, MANNEQUIN, behind))


def image_from_depth(picture: ScenePicture, rng: np.random.Generator) -> Pair:
    """How the scene would look in bare clay, lit from the beholder's upper left: a function of depth."""
    return encode_depth(picture.depth), in_clay(picture.normals)


def image_from_normals(picture: ScenePicture, rng: np.random.Generator) -> Pair:
    return encode_normals(picture.normals), in_clay(picture.normals)
