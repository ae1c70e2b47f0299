"""Jointed figures: seen from the front, limbs of capsules, drawn before a picture; their joints as pictures and back.

Positions are shares of the picture's side, (right, down). Left and right are the beholder's.
"""

from __future__ import annotations

import numpy as np

JOINTS = (
    "head",
    "hip",
    "left elbow",
    "left hand",
    "right elbow",
    "right hand",
    "left knee",
    "left foot",
    "right knee",
    "right foot",
)
JOINT_COLOURS = np.array(
    [
        [255, 255, 255],
        [255, 255, 0],
        [255, 0, 0],
        [255, 140, 0],
        [0, 0, 255],
        [0, 190, 255],
        [255, 0, 255],
        [140, 0, 255],
        [0, 255, 0],
        [140, 255, 140],
    ],
    np.uint8,
)
BONE_GREY = 80
DISC, BONE = 0.055, 0.012  # radii of joints and bones in pictures of joints
MANNEQUIN = np.array([[0.9, 0.75, 0.6], [0.25, 0.45, 0.8], [0.3, 0.3, 0.35]])  # skin, shirt, trousers
MANNEQUIN_BEHIND = 0.55
_NECK = 0.3  # of the way from the head to the hip
_SPINE = 0.42  # from head to hip, as a share of the figure's height, as all that follows
_LIMBS = ((0.17, 0.16), (0.22, 0.22))  # upper and lower arm, thigh and shin
_SHOULDER, _HIP = 0.085, 0.05  # halves of widths
# Of the capsules by `_capsules`: radius as a share of the height, and which of skin, shirt and trousers.
_RADII = np.array([0.045, 0.045, 0.036, 0.036, 0.075, 0.085, 0.036, 0.03, 0.036, 0.03, 0.075], np.float32)
_PARTS = np.array([2, 2, 2, 2, 2, 1, 1, 0, 1, 0, 0])


def random_joints(rng: np.random.Generator) -> np.ndarray:
    """Joints `[10, 2]` of a figure that fits into the picture."""
    while True:
        height = rng.uniform(0.72, 1.0)
        tilt = rng.normal(0, 0.12)
        down, right = np.array([np.sin(tilt), np.cos(tilt)]), np.array([np.cos(tilt), -np.sin(tilt)])
        head = np.array([rng.uniform(0.35, 0.65), rng.uniform(0.12, 0.25)])
        hip = head + _SPINE * height * down
        joints = [head, hip]
        for arm, (upper, lower) in zip((True, False), _LIMBS, strict=True):
            start = head + _NECK * (hip - head) if arm else hip
            for side in (-1, 1):
                root = start + side * height * (_SHOULDER if arm else _HIP) * right
                first = rng.uniform(0.1, 2.7) if arm else rng.uniform(-0.05, 0.8)  # from hanging, outwards
                second = first + (rng.uniform(-0.5, 1.7) if arm else rng.uniform(-0.7, 0.35))
                for angle, length in ((first, upper), (second, lower)):
                    root = root + height * length * (np.cos(angle) * down + side * np.sin(angle) * right)
                    joints.append(root)
        found = np.array(joints)
        if found.min() > 0.05 and found.max() < 0.95:
            return found


def _capsules(joints: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Starts and ends `[11, 2]` of a figure's capsules, those in front last, and the figure's height."""
    head, hip = joints[0], joints[1]
    height = float(np.linalg.norm(hip - head)) / _SPINE
    down = (hip - head) / (_SPINE * height)
    right = np.array([down[1], -down[0]])
    neck = head + _NECK * (hip - head)
    shoulders = [neck + side * height * _SHOULDER * right for side in (-1, 1)]
    hips = [hip + side * height * _HIP * right for side in (-1, 1)]
    ends = [(hips[0], joints[6]), (hips[1], joints[8]), (joints[6], joints[7]), (joints[8], joints[9])]
    ends += [(hip, hip), (neck + 0.05 * height * down, hip - 0.03 * height * down)]
    ends += [(shoulders[0], joints[2]), (joints[2], joints[3]), (shoulders[1], joints[4]), (joints[4], joints[5])]
    ends += [(head, head)]
    starts, stops = zip(*ends, strict=True)
    return np.array(starts), np.array(stops), height


def _distances(starts: np.ndarray, stops: np.ndarray, size: int) -> np.ndarray:
    """From every pixel's centre to segments `[N, 2]` each: float32 `[N, size, size]`."""
    at = ((np.arange(size) + 0.5) / size).astype(np.float32)
    starts, along = starts.astype(np.float32), (stops - starts).astype(np.float32)
    x, y = at[None, None, :] - starts[:, 0, None, None], at[None, :, None] - starts[:, 1, None, None]
    ax, ay = along[:, 0, None, None], along[:, 1, None, None]
    share = np.clip((x * ax + y * ay) / np.maximum(ax * ax + ay * ay, 1e-9), 0, 1)
    x, y = x - share * ax, y - share * ay
    return np.sqrt(x * x + y * y)


def draw_figure(joints: np.ndarray, colours: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """A figure before a picture.

    Args:
        joints: `[10, 2]`.
        colours: of skin, shirt and trousers, float `[3, 3]` in [0, 1].
        behind: float `[S, S, 3]` in [0, 1].

    Returns:
        float32 `[S, S, 3]` in [0, 1].
    """
    size = len(behind)
    starts, stops, height = _capsules(joints)
    away = _distances(starts, stops, size)
    radii = (_RADII * np.float32(height))[:, None, None]
    cover = np.clip(0.5 + (radii - away) * size, 0, 1)
    shade = 0.55 + 0.45 * np.sqrt(np.maximum(1 - (away / radii) ** 2, 0))
    picture = behind.astype(np.float32)
    for part, covered, shaded in zip(_PARTS, cover, shade, strict=True):
        picture += covered[..., None] * (shaded[..., None] * colours[part].astype(np.float32) - picture)
    return picture


def encode_joints(joints: np.ndarray, size: int) -> np.ndarray:
    """Joints as discs of `JOINT_COLOURS` on grey bones on black, uint8 `[size, size, 3]`."""
    head, hip = joints[0], joints[1]
    neck = head + _NECK * (hip - head)
    bones = [(head, hip)]
    for first, second, root in ((2, 3, neck), (4, 5, neck), (6, 7, hip), (8, 9, hip)):
        bones += [(root, joints[first]), (joints[first], joints[second])]
    starts, stops = (np.array(ends) for ends in zip(*bones, strict=True))
    bone = np.clip(0.5 + (BONE - _distances(starts, stops, size).min(0)) * size, 0, 1)
    picture = np.repeat(np.float32(BONE_GREY) * bone[..., None], 3, axis=-1)
    for colour, covered in zip(
        JOINT_COLOURS, np.clip(0.5 + (DISC - _distances(joints, joints, size)) * size, 0, 1), strict=True
    ):
        picture += covered[..., None] * (colour.astype(np.float32) - picture)
    return (picture + 0.5).astype(np.uint8)


def decode_joints(picture: np.ndarray) -> np.ndarray:
    """Joints `[10, 2]` of such a picture, the middle of what is nearest to each colour; NaN where nothing is."""
    size = len(picture)
    known = np.concatenate([JOINT_COLOURS, [[0] * 3, [BONE_GREY] * 3]]).astype(int)
    apart = np.square(picture[..., None, :].astype(int) - known).sum(-1)
    nearest = np.where(apart.min(-1) < 125**2, apart.argmin(-1), -1)
    joints = np.full((len(JOINTS), 2), np.nan)
    for joint in range(len(JOINTS)):
        rows, columns = np.nonzero(nearest == joint)
        if len(rows) > 2e-4 * size * size:
            # The median: a few stray pixels, of the edges of other discs, do not count.
            joints[joint] = (np.median(columns) + 0.5) / size, (np.median(rows) + 0.5) / size
    return joints
