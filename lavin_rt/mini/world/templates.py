"""The example pairs shipped with lavin-mini, in the official folders' layout."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from lavin_rt.files import written_whole
from lavin_rt.mini.world.corpus import Corpus
from lavin_rt.mini.world.tasks import TASKS, WorldTask

PAIRS = 8
TEMPLATE_SCENES, TEMPLATE_CLIPS = 64, PAIRS


def template_pairs(corpus: Corpus, task: WorldTask, count: int = PAIRS, seed: int = 0) -> list[np.ndarray]:
    """Pairs of a task, uint8 `[2, T, S, S, 3]`, no two equal; of pictures two may show one scene."""
    rng = np.random.default_rng([seed, list(TASKS).index(task.name), 5])
    if task.is_clip:
        return [np.stack(task.apply(corpus.clip(i % len(corpus.clips), False), rng)) for i in range(count)]
    pairs: list[np.ndarray] = []
    while len(pairs) < count:
        pair = corpus.draw(task, rng)
        if not any(np.array_equal(pair, other) for other in pairs):
            pairs.append(pair)
    return pairs


def write_templates(folder: str | os.PathLike, corpus: Corpus) -> None:
    """Writes `<task>/<n>_input.png`, `<task>/<n>_target.png` (of clips, folders of frames) for every task.

    Raises:
        InputError: a task's folder is there already and not empty.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for task in TASKS.values():
        with written_whole(Path(folder) / task.name, folder=True) as partial:
            for number, pair in enumerate(template_pairs(corpus, task)):
                for role, frames in zip(("input", "target"), pair, strict=True):
                    _write(partial / f"{number}_{role}", frames)


def _write(path: Path, frames: np.ndarray) -> None:
    from PIL import Image

    if len(frames) == 1:
        Image.fromarray(frames[0]).save(path.with_name(path.name + ".png"), optimize=True)
        return
    path.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{i}.png", optimize=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lavin_rt.mini.world.templates", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the tasks' folders")
    parser.add_argument("--size", type=int, default=64, help="of the pictures, pixels a side (default: 64)")
    given = parser.parse_args(arguments)
    write_templates(given.output, Corpus.make("template", given.size, TEMPLATE_SCENES, TEMPLATE_CLIPS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
