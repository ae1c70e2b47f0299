"""All training pictures in pieces: worker processes render scenes and make every task's pairs of them.

A piece is a file `<kind>-<number>.npz` of uint8 frames, each stored once, and of every task's pairs as rows of them. It
is a function of its number, so that a run that was stopped goes on with the pieces that are there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import multiprocessing
import os
import sys
import time
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lavin_rt.files import written_whole
from lavin_rt.mini.world.data import CLIP_MOMENTS, render_arrays
from lavin_rt.mini.world.scenes import Picture
from lavin_rt.mini.world.sources import (
    CLIPS_FROM,
    PHOTOGRAPHS,
    PHOTOGRAPHS_SHARE,
    SCENE_SEEDS,
    photograph,
    photograph_crop,
)

PIECES_VERSION = 1  # bumped when a piece of the same name comes out otherwise
PICTURES, CLIPS = "pictures", "clips"


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How much to train on.

    Attributes:
        scenes, clips: rendered scenes, and those rendered at ten moments.
        ordinary: pictures of a task whose context tells which task it is.
        family: pictures of a family of mappings; each gives a target per member.
        photographs: crops of photographs for the VAE alone.
        scenes_a_piece, clips_a_piece: the size of the pieces.
    """

    scenes: int
    clips: int
    ordinary: int
    family: int
    photographs: int
    scenes_a_piece: int = 100
    clips_a_piece: int = 10

    def pieces(self) -> list[tuple[str, int]]:
        """Kind and number of every piece, the clips' between the pictures', so that any beginning has both."""
        counts = {PICTURES: -(-self.scenes // self.scenes_a_piece), CLIPS: -(-self.clips // self.clips_a_piece)}
        places = [((i + 0.5) / count, kind, i) for kind, count in counts.items() for i in range(count)]
        return [(kind, number) for _, kind, number in sorted(places)]


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """Attributes:
    frames: uint8 `[N, T, S, S, 3]`.
    rows: by task, int32 `[members, pairs, 2]`: input and target among the frames.
    photographs: uint8 `[M, S, S, 3]`.
    """

    frames: np.ndarray
    rows: dict[str, np.ndarray]
    photographs: np.ndarray

    def save(self, path: Path) -> None:
        content = io.BytesIO()
        rows: dict[str, Any] = {f"rows:{name}": rows for name, rows in self.rows.items()}
        np.savez(content, frames=self.frames, photographs=self.photographs, **rows)
        with written_whole(path) as partial:
            partial.write_bytes(content.getbuffer())

    @classmethod
    def load(cls, path: Path) -> Piece | None:
        """None where the file is damaged, which is then removed."""
        try:
            with np.load(path) as content:
                rows = {name[5:]: content[name] for name in content.files if name.startswith("rows:")}
                return cls(content["frames"], rows, content["photographs"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)
            return None


class _Frames:
    """Frames, each once."""

    def __init__(self):
        self.rows: dict[bytes, int] = {}
        self.frames: list[np.ndarray] = []

    def add(self, frames: np.ndarray) -> int:
        frames = np.ascontiguousarray(frames)
        row = self.rows.setdefault(frames.tobytes(), len(self.frames))
        if row == len(self.frames):
            self.frames.append(frames)
        return row

    def add_task(self, task: Any, sources: Sequence[Any], rng: np.random.Generator) -> np.ndarray:
        """Rows int32 `[members, pairs, 2]` of a task's pairs of pictures, or of clips."""
        pairs = []
        for source in sources:
            shown, targets = task.targets(source, rng)
            frames = [part if task.is_clip else part[None] for part in (shown, *targets)]
            row, *others = [self.add(part) for part in frames]
            pairs.append([[row, other] for other in others])
        return np.array(pairs, np.int32).transpose(1, 0, 2)


def make_piece(kind: str, number: int, size: int, amounts: Amounts, seed: int) -> Piece:
    """Renders and makes one piece, in this process."""
    from lavin_rt.mini.world.tasks import CLIP_TASKS, PICTURE_TASKS

    rng = np.random.default_rng([seed, number, len(kind), 11])
    start, frames = SCENE_SEEDS["train"].start, _Frames()
    if kind == CLIPS:
        first = number * amounts.clips_a_piece
        seeds = range(first, min(first + amounts.clips_a_piece, amounts.clips))
        arrays = render_arrays([start + CLIPS_FROM + index for index in seeds], size, CLIP_MOMENTS)
        clips = [[arrays.picture(i, moment) for moment in range(CLIP_MOMENTS)] for i in range(len(arrays))]
        clips += [[picture.mirrored() for picture in clip] for clip in clips]
        tasks = [task for task in CLIP_TASKS if task.trained]
        rows = {task.name: frames.add_task(task, clips, rng) for task in tasks}
        return Piece(np.stack(frames.frames), rows, np.zeros((0, size, size, 3), np.uint8))
    first = number * amounts.scenes_a_piece
    seeds = range(first, min(first + amounts.scenes_a_piece, amounts.scenes))
    arrays = render_arrays([start + index for index in seeds], size)
    scenes = [arrays.picture(i) for i in range(len(arrays))]
    scenes = [scene.mirrored() if rng.random() < 0.5 else scene for scene in scenes]
    share, rows = len(scenes) / amounts.scenes, {}
    for task in PICTURE_TASKS:
        if not task.trained:
            continue
        among = [scene for scene in scenes if task.suits(scene)]
        count = max(1, round(share * (amounts.ordinary if task.family is None else amounts.family)))
        photographs = round(count * PHOTOGRAPHS_SHARE) if task.source == "any" else 0
        chosen = [among[i] for i in rng.permutation(len(among))[: count - photographs]]
        chosen += [Picture(photograph_crop("train", rng, size)) for _ in range(photographs)]
        if chosen:
            rows[task.name] = frames.add_task(task, chosen, rng)
    crops = [photograph_crop("train", rng, size) for _ in range(max(1, round(share * amounts.photographs)))]
    return Piece(np.stack(frames.frames), rows, np.stack(crops))


class PieceMaker:
    """Makes pieces in the background, in processes of their own.

    Nothing here waits for ever: a worker that dies is replaced, a piece that fails is reported and left out.

    Args:
        folder: for the pieces.
        workers: processes.
    """

    def __init__(self, folder: Path, size: int, amounts: Amounts, seed: int, workers: int):
        self.folder, self.workers, self.restarts = folder, max(workers, 1), 3
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"v{PIECES_VERSION}-{size}px-{amounts.scenes}-{amounts.clips}-{amounts.ordinary}-{amounts.family}-{seed}"
        self.work = {
            folder / f"{stem}-{kind}-{number}.npz": (kind, number, size, amounts, seed)
            for kind, number in amounts.pieces()
        }
        self.failed: set[Path] = set()
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._running: dict[Path, concurrent.futures.Future] = {}
        self._start()

    @staticmethod
    def kind(path: Path) -> str:
        return path.stem.split("-")[-2]

    def _start(self) -> None:
        todo = {path: work for path, work in self.work.items() if path not in self.failed and not path.is_file()}
        if not todo:
            return
        # A fresh interpreter each: embree and torch hold threads that do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(self.workers, context, initializer=_be_modest)
        self._running = {path: self._pool.submit(_write_piece, path, *work) for path, work in todo.items()}

    def poll(self) -> None:
        """Notes what failed, and starts workers again where they died."""
        broken = False
        for path, future in list(self._running.items()):
            if not future.done():
                continue
            del self._running[path]
            error = None if future.cancelled() else future.exception()
            if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                broken = True
            elif error is not None:
                print(f"warning: {path.name} failed: {error}", file=sys.stderr, flush=True)
                self.failed.add(path)
        if broken and self.restarts:
            self.restarts -= 1
            print("warning: a rendering process died; starting others", file=sys.stderr, flush=True)
            assert self._pool is not None  # what died
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._start()

    @property
    def done(self) -> bool:
        self.poll()
        return not self._running

    def ready(self, kind: str | None = None) -> list[Path]:
        """The pieces that are there, in order."""
        return [path for path in self.work if (kind is None or self.kind(path) == kind) and path.is_file()]

    def arriving(self, patience: float) -> Arrivals:
        """Every piece, those that are there first; it stops waiting for more after `patience` seconds without one."""
        return Arrivals(self, patience)

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in list((getattr(self._pool, "_processes", None) or {}).values()):
                process.terminate()


class Arrivals:
    """The pieces of a `PieceMaker` as they come, each once."""

    def __init__(self, maker: PieceMaker, patience: float):
        self.maker, self.patience = maker, patience
        self.seen: set[Path] = set()
        self.fresh: list[Path] = []

    def __iter__(self) -> Iterator[Path]:
        while (path := self.next()) is not None:
            yield path

    def next(self, wait: bool = True) -> Path | None:
        """The next piece; None where no more will come or, without `wait`, where none is there yet."""
        last = time.monotonic()
        while not self.fresh:
            finished = self.maker.done  # before looking, so that none can appear unseen
            self.fresh = [path for path in self.maker.ready() if path not in self.seen]
            if self.fresh:
                break
            if finished or not wait:
                return None
            if time.monotonic() - last > self.patience:
                message = f"going on with {len(self.seen)} of {len(self.maker.work)} pieces"
                print(f"warning: {message}", file=sys.stderr, flush=True)
                return None
            time.sleep(0.2)
        path = self.fresh.pop(0)
        self.seen.add(path)
        return path


def _be_modest() -> None:
    """Workers leave the processor to what feeds the GPU, and do without photographs that are not there."""
    os.nice(5)
    there = []
    for name in PHOTOGRAPHS["train"]:
        try:
            photograph(name)
            there.append(name)
        except Exception as error:  # another version of the library may lack the file
            print(f"warning: no photograph {name}: {error}", file=sys.stderr, flush=True)
    PHOTOGRAPHS["train"] = tuple(there)


def _write_piece(path: Path, kind: str, number: int, size: int, amounts: Amounts, seed: int) -> None:
    try:
        make_piece(kind, number, size, amounts, seed).save(path)
    except Exception as error:
        raise RuntimeError("".join(traceback.format_exception_only(error)) + traceback.format_exc()[-800:]) from None
