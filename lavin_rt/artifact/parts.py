"""The types of what a manifest holds as JSON; `lavin_rt.artifact.manifest` checks that it does."""

from __future__ import annotations

from typing import TypedDict

Ranges = dict[str, list[int]]  # the least and the most of every named size
Record = dict[str, object]  # what an export notes down and nothing relies on


class TensorSpec(TypedDict):
    """An input or an output; its shape's items are numbers, names of sizes such as "batch", or multiples of one
    ("8*rows").
    """

    name: str
    dtype: str
    shape: list[int | str]


class _Compiled(TypedDict):
    file: str
    weights: list[str]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    ranges: Ranges | list[Ranges]


class Part(_Compiled, total=False):
    """A compiled network: its file, the files of its weights, and what it takes and gives; of several ranges one has to
    fit. What AOTInductor compiled says for which processor; `quantized` is "int8" where weights are; `needs` and
    `build` are for the record.
    """

    machine: str
    cpu_level: str | None
    impl: str
    quantized: str
    needs: Record
    build: Record


class FileEntry(TypedDict):
    """A file's SHA-256, 64 hexadecimal digits, and its size."""

    sha256: str
    bytes: int


class _ForDevice(TypedDict):
    device: str


class Target(_ForDevice, total=False):
    """What an artifact was made for: "any", "cpu" or "cuda", and of a GPU [major, minor]."""

    compute_capability: list[int] | None
