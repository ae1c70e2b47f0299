"""What training, templates and evaluation draw from: disjoint ranges of scene seeds and sets of photographs.

The photographs are those that ship inside scikit-image and scikit-learn; nothing is fetched.
"""

from __future__ import annotations

import functools

import numpy as np

from lavin_rt.errors import InputError, missing_extra

SPLITS = ("train", "template", "evaluation")
CLIPS_FROM = 500_000  # clips' scenes begin here within their split
PHOTOGRAPHS_SHARE = 0.4  # of the pictures of a task that photographs serve for as well
SCENE_SEEDS = {
    "train": range(0, 1_000_000),
    "template": range(1_000_000, 2_000_000),
    "evaluation": range(2_000_000, 3_000_000),
}
# Names are functions of skimage.data, those with "sklearn:" files of sklearn.datasets.
PHOTOGRAPHS = {
    "train": (
        "astronaut",
        "rocket",
        "immunohistochemistry",
        "hubble_deep_field",
        "retina",
        "stereo_motorcycle",
        "sklearn:flower.jpg",
        "brick",
        "gravel",
        "camera",
        "coins",
        "moon",
        "page",
        "clock",
        "cell",
    ),
    "template": ("coffee", "text"),
    "evaluation": ("chelsea", "sklearn:china.jpg", "grass"),
}


def split_of(seed: int) -> str:
    """The split that a scene's seed belongs to.

    Raises:
        InputError: a seed of none.
    """
    for split, seeds in SCENE_SEEDS.items():
        if seed in seeds:
            return split
    raise InputError(f"scene seed {seed}: expected 0 to {max(s.stop for s in SCENE_SEEDS.values()) - 1}")


@functools.cache
def photograph(name: str) -> np.ndarray:
    """A photograph as uint8 `[H, W, 3]`; greyscale ones are repeated."""
    if name.startswith("sklearn:"):
        try:
            from sklearn.datasets import load_sample_image
        except ImportError:
            raise missing_extra("scikit-learn", "train", "training photographs") from None
        picture = load_sample_image(name.removeprefix("sklearn:"))
    else:
        try:
            from skimage import data
        except ImportError:
            raise missing_extra("scikit-image", "train", "training photographs") from None
        picture = getattr(data, name)()
        picture = picture[0] if isinstance(picture, tuple) else picture
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=2)
    return np.ascontiguousarray(picture[..., :3], dtype=np.uint8)


def photograph_crop(split: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """A square of a random photograph of the split, as `square_crop` gives it.

    In training half of them have their channels scaled a little, as under light of another colour.
    """
    names = PHOTOGRAPHS[split]
    crop = square_crop(photograph(names[rng.integers(len(names))]), rng, size)
    if split == "train" and rng.random() < 0.5:
        crop = np.minimum(crop * rng.uniform(0.7, 1.2, 3).astype(np.float32) + 0.5, 255).astype(np.uint8)
    return crop


def square_crop(picture: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """A random square of a picture uint8 `[H, W, 3]`, perhaps mirrored, resized to uint8 `[size, size, 3]`."""
    from PIL import Image

    shorter = min(picture.shape[:2])
    side = int(rng.integers(min(max(96, size), shorter), min(shorter, 448) + 1))
    top, left = (int(rng.integers(length - side + 1)) for length in picture.shape[:2])
    square = Image.fromarray(picture[top : top + side, left : left + side])
    crop = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=1.5))
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)
