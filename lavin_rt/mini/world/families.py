"""Families: tasks of one kind of mapping that only the pairs tell apart (as SegGPT's in-context coloring, arXiv
2304.03284, section 3.1).

A family makes one input of a picture for all its members, each of which has a target of its own for it. Half of the
inputs have been through a mapping of the same kind before, so that neither input nor target tells the member.
"""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from lavin_rt.mini.world.encodings import grey
from lavin_rt.mini.world.scenes import BOX, CYLINDER, GROUND, SKY, SPHERE, Picture, ScenePicture

Pair = tuple[np.ndarray, np.ndarray]
CLASSES = {"sky": SKY, "ground": GROUND, "sphere": SPHERE, "box": BOX, "cylinder": CYLINDER}
ALREADY = 0.5  # share of inputs that have been through such a mapping


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One mapping of a family.

    Attributes:
        name: of the mapping.
        change: `(picture, input, target) -> target`, of the picture and what the task's function made of it.
    """

    name: str
    change: Callable[[Any, np.ndarray, np.ndarray], np.ndarray]

    def __call__(self, picture: Picture, shown: np.ndarray, target: np.ndarray) -> np.ndarray:
        return self.change(picture, shown, target)


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """The members that are trained, of which the first stands for the family in templates, and those that never are."""

    members: tuple[Member, ...]
    held_out: tuple[Member, ...] = ()

    @classmethod
    def of(cls, members: list[Member], held_out: set[str]) -> Family:
        kept_back = tuple(member for member in members if member.name in held_out)
        if len(kept_back) != len(held_out):
            raise ValueError(f"no members of these names: {held_out - {member.name for member in members}}")
        return cls(tuple(member for member in members if member.name not in held_out), kept_back)


AS_IT_IS = Member("", lambda picture, shown, target: target)


def of_target(name: str, mapping: Callable[[np.ndarray], np.ndarray]) -> Member:
    """A member that needs nothing but the target of the task's function."""
    return Member(name, lambda picture, shown, target: mapping(target))


# Polarity: channels inverted or not.


def _inverted(channels: tuple[bool, ...]) -> Callable[[np.ndarray], np.ndarray]:
    flips = np.array(channels, np.uint8) * np.uint8(255)
    return lambda colour: colour ^ flips  # 255 - colour where 255


_POLARITIES = list(itertools.product((True, False), repeat=3))
POLARITY = Family.of(
    [of_target("inverted " + ("".join(itertools.compress("RGB", c)) or "nothing"), _inverted(c)) for c in _POLARITIES],
    held_out={"inverted RB", "inverted G"},
)


def negative(picture: Picture, rng: np.random.Generator) -> Pair:
    colour = picture.colour
    if rng.random() < ALREADY:
        colour = _inverted(_POLARITIES[rng.integers(len(_POLARITIES))])(colour)
    return colour, colour


# Hue: colours turned about the axis of greys.


def turned_hue(colour: np.ndarray, degrees: float) -> np.ndarray:
    """uint8 `[..., 3]` with every colour turned about the axis of greys in RGB, clipped."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    third, root = (1 - cosine) / 3, sine / np.sqrt(3)
    matrix = np.array(
        [
            [third + cosine, third - root, third + root],
            [third + root, third + cosine, third - root],
            [third - root, third + root, third + cosine],
        ],
        np.float32,
    )
    return np.clip(colour.astype(np.float32) @ matrix.T + 0.5, 0, 255).astype(np.uint8)


def _turn(degrees: float) -> Member:
    return of_target(f"{degrees:g} degrees", lambda colour: turned_hue(colour, degrees))


HUE = Family(
    tuple(_turn(degrees % 360) for degrees in range(180, 540, 15)),
    tuple(_turn(degrees) for degrees in (52.5, 97.5, 142.5, 202.5, 262.5, 307.5)),
)


def colourful(picture: Picture, rng: np.random.Generator) -> np.ndarray:
    """The picture's colours, uint8; where they are dull, further from grey, and where there are none, the luma between
    a dark and a light colour of other hues. Without colours nothing would tell a hue, or an order of channels.
    """
    colour = picture.colour
    apart = float(np.mean(colour.max(-1) - colour.min(-1)))
    if apart > 60:
        return colour
    if apart > 20:
        middle = colour.mean(-1, keepdims=True, dtype=np.float32)
        return np.clip(middle + (colour - middle) * np.float32(60 / apart) + 0.5, 0, 255).astype(np.uint8)
    first = rng.random()
    dark = colorsys.hsv_to_rgb(first, 0.9, rng.uniform(0.2, 0.5))
    light = colorsys.hsv_to_rgb((first + rng.uniform(0.25, 0.75)) % 1, 0.6, rng.uniform(0.8, 1))
    ends = 255 * np.array([dark, light], np.float32)
    return (ends[0] + grey(colour).astype(np.float32)[..., None] * (ends[1] - ends[0]) + 0.5).astype(np.uint8)


def hue(picture: Picture, rng: np.random.Generator) -> Pair:
    colour = colourful(picture, rng)
    if rng.random() < ALREADY:
        colour = turned_hue(colour, rng.uniform(0, 360))
    return colour, colour


# Channels: each of the result's is one of the input's.


def _channels(order: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda colour: colour[..., list(order)]


_ORDERS = [(2, 1, 0)] + [order for order in itertools.product(range(3), repeat=3) if order != (2, 1, 0)]
CHANNELS = Family.of(
    [of_target("".join("RGB"[i] for i in order), _channels(order)) for order in _ORDERS],
    held_out={"RBG", "BBR", "GRR", "RGG"},
)


def channel_order(picture: Picture, rng: np.random.Generator) -> Pair:
    colour = colourful(picture, rng)
    if rng.random() < ALREADY:
        colour = colour[..., rng.permutation(3)]
    return colour, colour


# Orientation: mirrored and turned.


def oriented(colour: np.ndarray, quarters: int, mirrored: bool) -> np.ndarray:
    """uint8 `[S, S, 3]` mirrored left to right if asked for, then turned left by quarters."""
    return np.ascontiguousarray(np.rot90(colour[:, ::-1] if mirrored else colour, quarters))


def _orient(quarters: int, mirrored: bool) -> Member:
    name = f"turned by {90 * quarters}" if not mirrored else f"mirrored, turned by {90 * quarters}"
    return of_target(name, lambda colour: oriented(colour, quarters, mirrored))


ORIENTATION = Family.of(
    [_orient(quarters, mirrored) for quarters, mirrored in itertools.product((2, 0, 1, 3), (False, True))],
    held_out={"mirrored, turned by 90"},
)


def orientation(picture: Picture, rng: np.random.Generator) -> Pair:
    colour = picture.colour
    if rng.random() < ALREADY:
        colour = oriented(colour, int(rng.integers(4)), bool(rng.integers(2)))
    return colour, colour


# Classes: which are white, or which colours they and the foreground get.


def _classes_white(names: tuple[str, ...]) -> Member:
    white = np.zeros((len(CLASSES), 3), np.uint8)
    white[[CLASSES[name] for name in names]] = 255

    def mask(picture: ScenePicture, shown: np.ndarray, target: np.ndarray) -> np.ndarray:
        return white.take(picture.classes, axis=0)

    return Member(" and ".join(names), mask)


CLASS_MASK = Family.of(
    [_classes_white((name,)) for name in ("sphere", "box", "cylinder", "ground", "sky")]
    + [_classes_white(names) for names in itertools.combinations(CLASSES, 2)],
    held_out={"ground and sphere", "sky and box", "sphere and cylinder"},
)


def class_mask(picture: Picture, rng: np.random.Generator) -> Pair:
    return picture.colour, picture.colour


def _palettes(count: int, colours: int, seed: int) -> list[np.ndarray]:
    """Random colours uint8 `[colours, 3]`, any two of a palette at least 130 apart."""
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while len(found) < count:
        palette = rng.integers(0, 256, (colours, 3))
        apart = [np.linalg.norm(a - b) for a, b in itertools.combinations(palette, 2)]
        if min(apart) >= 130:
            found.append(palette.astype(np.uint8))
    return found


def _in_colours(number: int, palette: np.ndarray) -> Member:
    """Five colours of the classes, or two of what is behind and of the objects."""

    def coloured(picture: ScenePicture, shown: np.ndarray, target: np.ndarray) -> np.ndarray:
        return palette.take(picture.classes if len(palette) == len(CLASSES) else picture.mask, axis=0)

    return Member(f"palette {number}", coloured)


def _coloured(colours: int, seed: int, trained: int = 32, held_out: int = 6) -> Family:
    members = [_in_colours(i, palette) for i, palette in enumerate(_palettes(trained + held_out, colours, seed))]
    return Family(tuple(members[:trained]), tuple(members[trained:]))


CLASS_COLOURS, MASK_COLOURS = _coloured(5, seed=5), _coloured(2, seed=2)
