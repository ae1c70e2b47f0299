"""The files of an artifact, compared with what its manifest says of them."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lavin_rt.artifact.parts import FileEntry
from lavin_rt.errors import InputError
from lavin_rt.files import Progress, Stamp, stamp_of

BLOCK = 4 * 2**20
REAL_FILES = "copy the file itself (cp -rL), or of a hub's cache give the hub's id"


def check_hashes(folder: Path, entries: Mapping[str, FileEntry], progress: Progress | None = None) -> dict[str, Stamp]:
    """Compares files with their sizes and hashes; returns by name what tells whether one is still the same.

    Args:
        folder: where they lie.
        entries: by name, what they were when they were exported.
        progress: called with (bytes read, bytes in all), from one thread at a time.

    Raises:
        InputError: a file that is missing, no plain file, or not the one that was exported.
    """
    stamps = {name: _stamp(folder / name, entry["bytes"]) for name, entry in entries.items()}
    total, done, lock = sum(entry["bytes"] for entry in entries.values()), 0, threading.Lock()

    def add(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)

    with ThreadPoolExecutor(max_workers=2) as pool:  # hashing releases the interpreter
        digests = pool.map(lambda name: file_sha256(folder / name, add), entries)
        for (name, entry), digest in zip(entries.items(), digests, strict=True):
            if digest != entry["sha256"]:
                raise InputError(
                    f"{folder / name} is not the file that was exported (SHA-256 {digest[:12]}..., the "
                    f"manifest has {entry['sha256'][:12]}...); export or fetch the artifact again"
                )
    return stamps


def file_sha256(path: str | os.PathLike, add: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, 64 hexadecimal digits, read 4 MiB at a time; `add` is told the bytes of each time."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if add is not None:
                add(len(block))
    return digest.hexdigest()


def _stamp(path: Path, size: int) -> Stamp:
    try:
        status = os.lstat(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: {reason}; the artifact is not complete, export or fetch it again") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is no plain file; an artifact holds neither links nor devices: {REAL_FILES}")
    if status.st_size != size:
        raise InputError(
            f"{path} has {status.st_size:,} bytes, the manifest says {size:,}; export or fetch the artifact again"
        )
    return stamp_of(status)
