"""Writing OpenVINO's networks, and one file of weights for two of them, where it writes one for each."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

from lavin_rt.errors import one_line

ALIGNMENT = 64
SMALL = 4096  # bytes up to which constants are told by what they hold, as names of small numbers are made up


def save_network(openvino: ModuleType, model: Any, path: Path) -> None:
    """Writes a network's XML file and its weights beside it; an `OSError` where they cannot be."""
    try:
        # Its own default rounds weights to float16.
        openvino.save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as error:  # of a full disk "iostream error"
        raise OSError(0, f"OpenVINO: {one_line(error, 200)}: is the disk full?", str(path)) from error


def share_weights(network: Path, of: Path) -> None:
    """Has a network take its constants from another one's file of weights; its own file goes.

    What the other does not hold, small numbers of its graph, is added to that file.

    Args:
        network, of: XML files, each with its `.bin` beside it.
    """
    tree, own, shared = ElementTree.parse(network), network.with_suffix(".bin"), of.with_suffix(".bin")
    missing: dict[bytes, list[ElementTree.Element]] = {}
    with _mapped(own) as content, _mapped(shared) as known:
        there = [(name, *_place(data)) for name, data in _constants(ElementTree.parse(of).getroot())]
        named = {name: (first, size) for name, first, size in there}
        small = {known[first : first + size]: first for _, first, size in there if size <= SMALL}
        for name, data in _constants(tree.getroot()):
            first, size = _place(data)
            place, length = named.get(name, (0, -1))
            if length == size and _same(known, place, content, first, size):
                data.set("offset", str(place))
                continue
            wanted = content[first : first + size]
            if wanted in small:
                data.set("offset", str(small[wanted]))
            else:
                missing.setdefault(wanted, []).append(data)
    with open(shared, "r+b") as file:
        for wanted, places in missing.items():
            end = file.seek(0, 2)
            file.write(b"\0" * (-end % ALIGNMENT) + wanted)
            for data in places:
                data.set("offset", str(end + -end % ALIGNMENT))
    tree.write(network, encoding="utf-8", xml_declaration=True)
    own.unlink()


def _constants(root: ElementTree.Element) -> list[tuple[str, ElementTree.Element]]:
    """Names and places of a network's constants, those of networks inside of it included."""
    layers = [layer for layer in root.iter("layer") if layer.get("type") == "Const"]
    return [(layer.get("name", ""), data) for layer in layers if (data := layer.find("data")) is not None]


def _place(data: ElementTree.Element) -> tuple[int, int]:
    """Offset and bytes."""
    return int(data.get("offset", 0)), int(data.get("size", 0))


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _same(one: mmap.mmap, first: int, other: mmap.mmap, second: int, size: int) -> bool:
    with memoryview(one) as left, memoryview(other) as right:
        return left[first : first + size] == right[second : second + size]
