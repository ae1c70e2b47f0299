"""The command line on a small checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavin_rt.cli.main import main
from support.golden import GOLDEN


def write_picture(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def write_template(folder: Path, pairs: int = 2) -> Path:
    for i in range(pairs):
        write_picture(folder / f"{i}_input.png", 2 * i)
        write_picture(folder / f"{i}_target.png", 2 * i + 1)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The golden model in the official layout, with a template beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shutil.copy(GOLDEN / "dit_c.safetensors", folder / "lavin_dit.safetensors")
    shutil.copy(GOLDEN / "stvae.pt", folder)
    write_template(folder / "template" / "depth_estimation")
    return folder


@pytest.fixture
def setup(checkpoint, tmp_path):
    """Arguments of a run that works, to change one thing of."""
    query = write_picture(tmp_path / "query.png", 9)
    return {
        "--checkpoint": str(checkpoint),
        "--task": "depth",
        "--query": str(query),
        "-o": str(tmp_path / "out.png"),
        "--pairs": "2",
        "--size": "32x48",
        "--steps": "4",
    }


def run(arguments: dict[str, str | list[str] | None], *flags: str, command: str = "run") -> int:
    words = [command]
    for name, value in arguments.items():
        if value is not None:
            words += [name, *([value] if isinstance(value, str) else value)]
    return exit_code([*words, *flags])


def exit_code(words: list[str]) -> int:
    """Of a command line, refused by its parser or not."""
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code
