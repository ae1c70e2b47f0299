"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lavin_rt.errors import InputError

Progress = Callable[[int, int], None]
"""`(bytes done, bytes in all)`, called while files are read or unpacked."""


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A free name beside `path` for a file or folder to write: renamed when the block ends, removed if it fails.

    Replaces a file of that name, or an empty folder. An `OSError` in the block becomes an `InputError`.
    """
    target = Path(os.path.realpath(path))  # writing through a link keeps the link
    partial = target.parent / f".lavin-rt-{secrets.token_hex(6)}.part"
    try:
        try:
            yield partial
            os.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); choose a place you can write to"
        ) from error
