"""What several test processes share: made by the first that asks for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(temporary: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` that `make(folder)` fills; the processes of one `pytest -n` make it once."""
    folder = temporary.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder, done = folder / name, folder / f"{name}.done"
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            folder.mkdir()
            try:
                make(folder)
            except BaseException:  # a test that is skipped, too; the next one shall meet the same
                shutil.rmtree(folder)
                raise
            done.touch()
    return folder
