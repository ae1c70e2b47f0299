"""Which files an ONNX file asks for, read without running or even loading it.

An ONNX file is a protocol buffer; its tensors may name other files to read their values from. Only the few messages on
the way to such names are walked here, so that the runtime needs no other package to refuse a file that asks for more
than it is given.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from lavin_rt.errors import InputError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_DEPTH = 32
MAX_BYTES = 256 * 2**20

# Of onnx.proto: field number to the message in it, for the fields that lead to a TensorProto.
MESSAGES: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {},
}
LOCATION, KEY, VALUE = b"location", 1, 2


def check_external_files(path: str | os.PathLike, weights: Collection[str]) -> None:
    """Raises an `InputError` where an ONNX file of an artifact names other files than its own weights."""
    strangers = external_files(path) - set(weights)
    if strangers:
        raise InputError(
            f"{path} takes weights from {sorted(strangers)[0]!r}, which is not a file of the artifact; "
            "it was refused: fetch the artifact from whom you trust"
        )


def external_files(path: str | os.PathLike) -> set[str]:
    """The files that an ONNX file's tensors name as places of their values, as it spells them.

    Raises:
        InputError: the file is damaged, or no ONNX file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes, and no graph without its weights is larger than {MAX_BYTES:,}")
        found: set[str] = set()
        if not _walk(memoryview(path.read_bytes()), "Model", found, 0):
            raise ValueError("it has no graph")
        return found
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} is damaged or no ONNX file ({error}); export or fetch the artifact again") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; export or fetch the artifact again") from None


def _walk(view: memoryview, message: str, found: set[str], depth: int) -> bool:
    """Collects the locations below one message; returns whether it held any message that leads on."""
    if depth > MAX_DEPTH:
        raise ValueError("its graphs are nested too deeply")
    within, entry = MESSAGES[message], {}
    led_on = False
    for number, value in _fields(view):
        if message == "Entry" and number in (KEY, VALUE):
            entry[number] = bytes(value)
        elif number in within:
            led_on = True
            _walk(value, within[number], found, depth + 1)
    if entry.get(KEY) == LOCATION:
        found.add(entry.get(VALUE, b"").decode("utf-8", "backslashreplace"))
    return led_on


def _fields(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of a message's length-delimited fields."""
    position, end = 0, len(view)
    while position < end:
        tag, position = _varint(view, position)
        if tag >= 2**32:  # readers drop what is above, so that it is another field to them
            raise ValueError("a tag of more than 32 bits")
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            _, position = _varint(view, position)
        elif kind in (FIXED64, FIXED32):
            position += 8 if kind == FIXED64 else 4
        elif kind == BYTES:
            length, position = _varint(view, position)
            if length > end - position:
                raise ValueError("it ends early")
            yield number, view[position : position + length]
            position += length
        else:
            raise ValueError(f"a field of kind {kind}")
    if position > end:
        raise ValueError("it ends early")


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
