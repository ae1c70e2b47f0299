"""Sizes of an artifact's networks: names in the manifest's shapes, numbers in a call, and the ranges between."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lavin_rt.artifact.parts import Part, Ranges
from lavin_rt.errors import InputError

_SIZE = re.compile(r"(?:([1-9][0-9]{0,3})\*)?([a-z][a-z_]{0,63})")


def bind_sizes(part: Part, shapes: Sequence[Sequence[int]], name: str = "network") -> dict[str, int]:
    """The named sizes that inputs of these shapes give a part of an artifact.

    Args:
        part: of `Manifest.parts`.
        shapes: of the inputs, in the part's order.
        name: of the part, for messages.

    Raises:
        InputError: shapes that do not fit the part's inputs, or sizes outside of its ranges; names what it takes.
    """
    sizes: dict[str, int] = {}
    if len(shapes) != len(part["inputs"]):
        raise InputError(f"{name}: {len(shapes)} inputs given; expected {len(part['inputs'])}")
    for tensor, shape in zip(part["inputs"], shapes, strict=True):
        expected = tensor["shape"]
        fits = len(shape) == len(expected)
        for item, found in zip(expected, shape, strict=False):
            if isinstance(item, int):
                fits &= item == found
                continue
            multiple, size = parse_size(item)
            fits &= found % multiple == 0 and sizes.setdefault(size, found // multiple) == found // multiple
        if not fits:
            raise InputError(f"{name}: {tensor['name']} is {list(shape)}; the artifact takes {_listed(expected)}")
    check_ranges(part, sizes, name)
    return sizes


def ranges_of(part: Part) -> list[Ranges]:
    """The ranges of a part's sizes, of which one has to fit."""
    return part["ranges"] if isinstance(part["ranges"], list) else [part["ranges"]]


def check_ranges(part: Part, sizes: Mapping[str, int], name: str = "network") -> None:
    """Raises an `InputError` for sizes that a part was not exported for; sizes that it does not name are free."""
    alternatives = ranges_of(part)
    for one in alternatives:
        if all(least <= sizes.get(size, least) <= most for size, (least, most) in one.items()):
            return
    found = ", ".join(f"{size} {value}" for size, value in sizes.items())
    taken = " or ".join(
        ", ".join(f"{size} {least} to {most}" for size, (least, most) in one.items()) for one in alternatives
    )
    raise InputError(f"{name}: asked for {found} (in latents); the artifact takes {taken}; export it for these sizes")


def sized(shape: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A part's shape in numbers, given the sizes of `bind_sizes`."""
    numbers = []
    for item in shape:
        if not isinstance(item, int):
            multiple, size = parse_size(item)
            item = multiple * sizes[size]
        numbers.append(item)
    return tuple(numbers)


def token_grid(height: int, width: int) -> dict[str, int]:
    """The sizes "rows" and "columns" of tokens that latents of a height and width give."""
    return {"rows": height // 2, "columns": width // 2}


def parse_size(item: str) -> tuple[int, str]:
    """`"rows"` and `"8*rows"` as (multiple, name)."""
    match = _SIZE.fullmatch(item) if isinstance(item, str) else None
    if match is None:
        raise InputError(f"a shape has {shown(item)}; expected a number, a name such as batch, or 8*rows")
    return int(match[1] or 1), match[2]


def shown(value: object) -> str:
    """A value of a manifest in a message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
