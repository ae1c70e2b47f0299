"""Tasks whose target is a picture that the input was made worse from: `(picture, rng)` to `(input, target)`, uint8
`[S, S, 3]`. Sizes in pixels are those of pictures of 64, and grow with the picture.
"""

from __future__ import annotations

import numpy as np

from lavin_rt.mini.world.encodings import FAR, NEAR, as_picture, grey
from lavin_rt.mini.world.scenes import Picture, ScenePicture

Pair = tuple[np.ndarray, np.ndarray]
SHADE = np.array([0.6, 0.57, 0.52], np.float32)  # what a shadow takes away: it is cooler than the light
HAZE = np.array([0.8, 0.82, 0.85])


def inpainting(picture: Picture, rng: np.random.Generator) -> Pair:
    """Three black rectangles, each side a quarter to a half of the picture's."""
    spoilt, size = picture.colour.copy(), len(picture.colour)
    for _ in range(3):
        height, width = rng.integers(size // 4, size // 2 + 1, 2)
        top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
        spoilt[top : top + height, left : left + width] = 0
    return spoilt, picture.colour


def colorization(picture: Picture, rng: np.random.Generator) -> Pair:
    """Grey, but for hints: 6 x 6 squares of 3 pixels that have kept their colour, each a little off its place in a
    grid. Without them the colours of things would be left to chance.
    """
    size = len(picture.colour)
    shown, side = as_picture(grey(picture.colour)), max(2, round(3 * size / 64))
    places = (np.arange(6) + 0.5) * size / 6 - side / 2
    for row in places:
        for column in places:
            place = np.clip(np.array([row, column]) + rng.uniform(-2, 2, 2), 0, size - side)
            top, left = (int(v + 0.5) for v in place)
            here = np.s_[top : top + side, left : left + side]
            shown[here] = picture.colour[here]
    return shown, picture.colour


def deblurring(picture: Picture, rng: np.random.Generator) -> Pair:
    """Blurred by a camera that moves on by 13 pixels to the left, from where it took the target."""
    from scipy import ndimage

    length = round(13 * len(picture.colour) / 64)
    smeared = ndimage.uniform_filter1d(
        picture.colour.astype(np.float32), length, axis=1, mode="nearest", origin=(length - 1) // 2
    )
    return (np.clip(smeared, 0, 255) + 0.5).astype(np.uint8), picture.colour


def super_resolution(picture: Picture, rng: np.random.Generator) -> Pair:
    """Four by four pixels each of their mean colour."""
    size = len(picture.colour)
    small = picture.colour.reshape(size // 4, 4, size // 4, 4, 3).mean((1, 3))
    return (small + 0.5).astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1), picture.colour


def deraining(picture: Picture, rng: np.random.Generator) -> Pair:
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


def desnowing(picture: Picture, rng: np.random.Generator) -> Pair:
    """White flakes, large and small, over a thin haze."""
    from scipy import ndimage

    size = len(picture.colour)
    snow = np.zeros((size, size), np.float32)
    for share, radius, strength in ((0.012, 1.3, 9.0), (0.04, 0.6, 2.5)):
        flakes = (rng.random((size, size)) < share).astype(np.float32)
        snow += strength * ndimage.gaussian_filter(flakes, radius * size / 64)
    cover = np.minimum(snow, 1)[..., None] * 0.95
    return as_picture((picture.colour / 255 * 0.9 + 0.08) * (1 - cover) + cover), picture.colour


def denoising(picture: Picture, rng: np.random.Generator) -> Pair:
    """Gaussian noise of 0.2 to 0.35 of the range."""
    noise = rng.standard_normal(picture.colour.shape, np.float32) * np.float32(rng.uniform(0.2, 0.35))
    return as_picture(picture.colour / np.float32(255) + noise), picture.colour


def low_light(picture: Picture, rng: np.random.Generator) -> Pair:
    """A fifth of the light, on a sensor that shows it darker still, with a little noise."""
    dark = 0.2 * (picture.colour / np.float32(255)) ** 1.4
    return as_picture(dark + rng.standard_normal(dark.shape, np.float32) * np.float32(0.01)), picture.colour


def dehazing(picture: ScenePicture, rng: np.random.Generator) -> Pair:
    """Haze that grows with the distance."""
    through = np.exp(-rng.uniform(0.2, 0.4) * (np.minimum(picture.depth, FAR * 0.75) - NEAR))[..., None]
    return as_picture(picture.colour / 255 * through + HAZE * (1 - through)), picture.colour


def shadow_removal(picture: ScenePicture, rng: np.random.Generator) -> Pair:
    """Cast shadows, and those of two poles out of sight across the picture; the target has none."""
    size = len(picture.colour)
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    shade = np.zeros((size, size), np.float32)
    for _ in range(2):
        turn, place, width = rng.uniform(0, np.pi), rng.uniform(-0.4, 0.4), rng.uniform(0.05, 0.15)
        away = (at - 0.5) * np.float32(np.cos(turn)) + (at[:, None] - 0.5) * np.float32(np.sin(turn)) - place
        shade = np.maximum(shade, np.clip(0.5 + (width - np.abs(away)) * size, 0, 1))
    return (picture.colour * (1 - shade[..., None] * SHADE) + 0.5).astype(np.uint8), picture.unshadowed
