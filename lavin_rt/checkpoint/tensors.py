"""Reading safetensors files into memory that exists already, and writing them one tensor at a time.

The format: 8 bytes with the header's length (little-endian), the header (JSON: names to dtype, shape and offsets), the
tensors' bytes without gaps. The files are read, not mapped: pages of a mapped file count as resident memory, on top of
the model that is made from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lavin_rt.errors import InputError
from lavin_rt.files import Stamp, cannot_reread, check_stamp, stamp_of, written_whole

FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
BITS = {
    **dict.fromkeys(["F4"], 4),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 16),
    **dict.fromkeys(["U32", "I32", "F32"], 32),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 64),
}
MAX_HEADER = 100_000_000  # the limit of the format's reference implementation
INDEX_SUFFIX = ".safetensors.index.json"
STAGING_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its dtype as the header spells it, its shape, its first byte in the file and its bytes, and
    which of several files it is in.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    file: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class SafetensorsFile:
    """The header of a safetensors file, or those of all that an index names.

    Attributes:
        path: the file, or the index.
        entries: tensors by name.
        metadata: the header's `__metadata__`.
        files: each with what tells a later read that it is still the same file.
    """

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    files: tuple[tuple[Path, Stamp], ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(stamp[0] for _, stamp in self.files)

    @classmethod
    def open(cls, path: str | os.PathLike) -> SafetensorsFile:
        """Reads and checks a file's header, or those of the files that an index (`*.safetensors.index.json`) names.

        Raises:
            InputError: no such file, not a safetensors file, or a truncated one; says what was found instead. An index
                that does not fit its files.
        """
        path = Path(path)
        if path.name.endswith(INDEX_SUFFIX):
            return cls._open_index(path)
        try:
            with open(path, "rb") as file:
                stamp = stamp_of(os.fstat(file.fileno()))
                start = file.read(8)
                length = int.from_bytes(start, "little")
                if len(start) < 8 or length > MAX_HEADER:
                    raise InputError(f"{path} is not a safetensors file: {_sniff(path)}")
                if 8 + length > stamp[0]:
                    sniffed = _sniff(path, unknown="")
                    raise InputError(
                        f"{path} is not a safetensors file: {sniffed}"
                        if sniffed
                        else _truncated(path, stamp[0], 8 + length)
                    )
                header = file.read(length)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; expected a safetensors file") from None
        entries, metadata = _parse(path, header, stamp[0])
        return cls(path, entries, metadata, ((path, stamp),))

    @classmethod
    def _open_index(cls, path: Path) -> SafetensorsFile:
        try:
            places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(places.values()))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; expected an index of safetensors files") from None
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            names = []
        # No index among them: one that names itself, or two each other, would never end.
        if not names or not all(
            isinstance(name, str) and os.path.basename(name) == name and not name.endswith(".json") for name in names
        ):
            raise InputError(f"{path} is no index of safetensors files beside it; download or write it again")
        parts = {name: cls.open(path.with_name(name)) for name in names}
        strays = [tensor for tensor, name in places.items() if tensor not in parts[name].entries]
        found = [tensor for part in parts.values() for tensor in part.entries]
        if strays or len(found) != len(set(found)):
            reason = f"{reprlib.repr(strays[0])} is not where it says" if strays else "a tensor is in two of them"
            raise InputError(f"{path} does not fit its files: {reason}; download them again")
        entries = {
            tensor: dataclasses.replace(entry, file=index)
            for index, part in enumerate(parts.values())
            for tensor, entry in part.entries.items()
        }
        metadata = {key: value for part in parts.values() for key, value in part.metadata.items()}
        return cls(path, entries, metadata, tuple(file for part in parts.values() for file in part.files))

    def reader(self) -> Reader:
        """Opens the file again to read tensors (a context manager); an `InputError` if it is gone or has changed."""
        return Reader(self)


class Reader:
    """Reads tensors of a `SafetensorsFile` into given memory, with at most `STAGING_BYTES` of its own; twice that for a
    GPU, to which one half is copied while the other is read.
    """

    def __init__(self, file: SafetensorsFile):
        self._entries = file.entries
        self._staging: _Staging | None = None
        self._open = contextlib.ExitStack()
        self._files: list[Any] = []
        with self._open:
            for path, stamp in file.files:
                try:
                    self._files.append(self._open.enter_context(open(path, "rb", buffering=0)))  # noqa: SIM115
                except OSError as error:
                    raise cannot_reread(path, error) from None
                check_stamp(path, stamp, self._files[-1].fileno())
            self._open = self._open.pop_all()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        if self._staging is not None:
            self._staging.wait()

    @torch.no_grad()
    def read_into(self, name: str, destination: torch.Tensor) -> None:
        """Fills `destination`, contiguous and of the tensor's shape, converting where its dtype or device differ.

        On a GPU it is filled in the current stream's order, and to the host's knowledge when the reader is closed.

        Raises:
            InputError: the file ended early.
        """
        entry = self._entries[name]
        if (
            entry.dtype not in FLOAT_DTYPES
            or tuple(destination.shape) != entry.shape
            or not destination.is_contiguous()
        ):
            raise ValueError(f"{name} {entry} cannot be read into {destination.dtype} {tuple(destination.shape)}")
        dtype = FLOAT_DTYPES[entry.dtype]
        self._file = self._files[entry.file]
        self._file.seek(entry.start)
        if entry.size == 0:
            return
        if destination.device.type == "cpu" and destination.dtype == dtype:
            self._fill(name, destination.view(-1).view(torch.uint8))
            return
        if self._staging is None:
            self._staging = _Staging(destination.device)
        flat = destination.view(-1)
        for part in flat.split(STAGING_BYTES // dtype.itemsize):
            staged = self._staging.free()[: part.numel() * dtype.itemsize]
            self._fill(name, staged)
            self._staging.copy(staged.view(dtype), part)

    def _fill(self, name: str, buffer: torch.Tensor) -> None:
        """Reads the file's next bytes into `buffer`, `[bytes]` uint8."""
        view = buffer.numpy().data
        while view:
            count = self._file.readinto(view)
            if not count:
                raise InputError(
                    f"{self._file.name} ended while reading {name}; it was truncated while in use, fetch it again"
                )
            view = view[count:]


class _Staging:
    """Memory between a file and a tensor of another dtype or device: for a GPU two pinned buffers used in turns."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._buffers = [
            torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(1 + self._cuda)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        self._turn = 0

    def free(self) -> torch.Tensor:
        """A buffer `[STAGING_BYTES]` uint8 of which no copy is under way."""
        self._turn = (self._turn + 1) % len(self._buffers)
        self._wait_for(self._turn)
        return self._buffers[self._turn]

    def copy(self, staged: torch.Tensor, destination: torch.Tensor) -> None:
        """Copies from the buffer that `free` gave last, on a GPU without waiting for it."""
        # A conversion on the way would be the host's.
        if self._cuda and staged.dtype != destination.dtype:
            staged = staged.to(destination.device, non_blocking=True)
        destination.copy_(staged, non_blocking=True)
        if self._cuda:
            self._copied[self._turn] = torch.cuda.current_stream(destination.device).record_event()

    def wait(self) -> None:
        """Until no copy is under way."""
        for turn in range(len(self._buffers)):
            self._wait_for(turn)

    def _wait_for(self, turn: int) -> None:
        event, self._copied[turn] = self._copied[turn], None
        if event is not None:
            event.synchronize()


def write_safetensors(
    path: str | os.PathLike,
    layout: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    tensors: Iterable[torch.Tensor],
    metadata: dict[str, str],
) -> None:
    """Writes a safetensors file one tensor at a time; it appears at `path` when it is complete.

    Args:
        path: the file to write.
        layout: (name, dtype, shape) of every tensor, floating point.
        tensors: the tensors in the same order, for instance a generator, on any device.
        metadata: strings for the header.

    Raises:
        InputError: the file cannot be written.
    """
    layout = list(layout)
    names = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in layout:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # tensors in a mapped file start at a cache line
    with written_whole(path) as partial, open(partial, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for (name, dtype, shape), tensor in zip(layout, tensors, strict=True):
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {dtype} {tuple(shape)}")
            flat = tensor.detach().cpu().contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # on disk before the rename, which may replace a sound checkpoint


def _truncated(path: Path, size: int, expected: int) -> str:
    return f"{path} is truncated: it has {size:,} bytes, its header speaks of {expected:,}; download or copy it again"


def _sniff(path: Path, unknown: str = "its first bytes are no header; expected lavin_dit.safetensors") -> str:
    """What a file that is no safetensors file looks like."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty; download or copy it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, a text that stands for the file; fetch the file itself with `git lfs pull`"
    if start.startswith(b"PK\x03\x04") or start.startswith(b"\x80\x02"):
        return "it is a zip file or a pickle, as torch.save writes them; expected the safetensors form"
    if start.startswith(b"\x1f\x8b"):
        return "it is a gzip archive; give an archive's own name ending in .tar.gz, or unpack it first"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page, probably a failed download; download the file again"
    return unknown


def _parse(path: Path, encoded: bytes, file_size: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Checks a header against the format and the file's size."""

    def broken(reason: str) -> InputError:
        return InputError(f"{path} is not a valid safetensors file: {reason}; download or write it again")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a name appears twice")
        return values

    if not encoded.startswith(b"{"):
        raise InputError(f"{path} is not a safetensors file: {_sniff(path)}")
    try:
        header = json.loads(encoded.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise broken(f"its header is no JSON ({type(error).__name__})") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken("its metadata is not a map of strings")
    entries = {}
    for name, value in header.items():
        problem = _entry_problem(value)
        if problem:
            raise broken(f"tensor {reprlib.repr(name)} {problem}")
        start, end = value["data_offsets"]
        entries[name] = TensorEntry(value["dtype"], tuple(value["shape"]), 8 + len(encoded) + start, end - start)
    position = 8 + len(encoded)
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != position:
            raise broken(f"tensor {reprlib.repr(name)} starts at byte {entry.start:,}, expected {position:,}")
        position += entry.size
    if position > file_size:
        raise InputError(_truncated(path, file_size, position))
    if position < file_size:
        raise broken(f"{file_size - position:,} bytes follow its last tensor")
    return entries, metadata


def _entry_problem(value: Any) -> str:
    """What is wrong with one tensor's entry in a header, or an empty string."""

    def counts(values: Any) -> bool:
        return isinstance(values, list) and all(type(item) is int and item >= 0 for item in values)

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        return "has no dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"has the unknown dtype {reprlib.repr(dtype)}"
    if not counts(shape):
        return f"has the shape {reprlib.repr(shape)}"
    if not counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the offsets {reprlib.repr(offsets)}"
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * BITS[dtype]:
        return f"has {offsets[1] - offsets[0]:,} bytes, which do not make {dtype} {reprlib.repr(shape)}"
    return ""
