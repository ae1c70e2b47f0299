"""The tasks of a service: the checkpoint's templates, files given at the start, and those that clients make."""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lavin_rt.errors import InputError, one_line
from lavin_rt.packs import TaskPack, check_name, first_pairs
from lavin_rt.pictures import context as contexts
from lavin_rt.pictures import images
from lavin_rt.pictures.encoded import EncodedContext
from lavin_rt.serve.limits import Limits, Refused

if TYPE_CHECKING:
    from lavin_rt.pipeline import Pipeline
    from lavin_rt.task import Task

ENCODED = 32
"""Contexts that are kept encoded; those unused for longest are encoded again when they are asked for."""
ENCODED_BYTES = 2 * 2**30
"""What they hold together at most: keys and values of speeds that keep them are 0.1 GB of a task of the released size.
"""
THUMBNAIL = 96


@dataclasses.dataclass(eq=False)
class LibraryEntry:
    """A task that can be asked for.

    Attributes:
        name: of the task.
        origin: `checkpoint`, `file` or `own` (made by a client).
        pairs: that there are.
        frames: of a clip; 1 are pictures.
        size: (height, width) that it is encoded at, None where pairs are at hand and any size will do.
        source: a template's folder, or an encoded context.
        words: for people.
        thumbnails: uint8 `[2 * pairs, 3, h, w]`, or None.
        version: tells a task from an earlier one of the same name.
        used: when last, seconds of the monotonic clock.
    """

    name: str
    origin: str
    pairs: int
    frames: int
    size: tuple[int, int] | None
    source: Path | EncodedContext
    words: str = ""
    thumbnails: torch.Tensor | None = None
    version: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    used: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def label(self) -> str:
        """Its name in figures, where clients' names would make a new series each."""
        return "own" if self.origin == "own" else self.name


class Library:
    """All tasks, and the contexts that are encoded at the moment.

    Args:
        pipeline: its templates are read now, its VAE encodes when a task is first asked for.
        limits: `pairs`, `tasks`, `task_seconds`.
        files: packs, encoded contexts or template folders, beside the pipeline's own.

    Raises:
        InputError: a file that is none of these, or two of one name.
    """

    def __init__(self, pipeline: Pipeline, limits: Limits, files: Iterable[str] = ()):
        self._pipeline, self._limits = pipeline, limits
        self._entries: OrderedDict[str, LibraryEntry] = OrderedDict()
        self._tasks: OrderedDict[tuple, Task] = OrderedDict()
        self._lock = threading.RLock()
        for root in pipeline.template_roots:
            for folder in contexts.task_folders(root):
                entry = template_entry(folder, "checkpoint")
                if entry is not None:
                    self._entries.setdefault(entry.name, entry)
        for file in files:
            entry = self._given(file)
            if entry.name in self._entries and self._entries[entry.name].origin == "file":
                raise InputError(f"{file}: there are two tasks named {entry.name}; give one of them another name")
            self._entries[entry.name] = entry

    def _given(self, file: str) -> LibraryEntry:
        if Path(file).is_dir():
            entry = template_entry(Path(file), "file")
            if entry is None:
                contexts.read_template(file)  # says what is wrong with it
                raise InputError(f"{file}: its name cannot be a task's; rename it to small letters, digits, - and _")
            return entry
        if not file.endswith(".safetensors"):
            raise InputError(f"{file}: expected a task pack (.safetensors) or a folder of pairs")
        pack = TaskPack.load(file)
        self._pipeline.check_context(pack.context)
        return packed_entry(pack, "file")

    def all(self) -> list[LibraryEntry]:
        with self._lock:
            self._expire()
            return list(self._entries.values())

    def find(self, name: str) -> LibraryEntry:
        """A task by its name; its time begins anew.

        Raises:
            Refused: 404.
        """
        with self._lock:
            self._expire()
            entry = self._entries.get(name)
            if entry is None:
                shown = one_line(name, 80)
                raise Refused(404, f"no task {shown!r} here; GET /v1/tasks names those there are", "input")
            entry.used = time.monotonic()
            return entry

    def check_new(self, name: str) -> None:
        """Refuses a name that cannot be a new task's: 422, 409, or 429 where there are too many.

        Raises:
            Refused, InputError: which of these.
        """
        check_name(name)
        with self._lock:
            self._expire()
            if name in self._entries:
                raise Refused(409, f"there is a task {name!r} already; give another name or delete that one", "input")
            own = [entry for entry in self._entries.values() if entry.origin == "own"]
            if len(own) >= self._limits.tasks:
                oldest = min(entry.used for entry in own)
                seconds = max(1, round(self._limits.task_seconds - (time.monotonic() - oldest)))
                raise Refused(429, f"{len(own)} tasks are kept already; delete one, or wait", "tasks", seconds)

    def encode(self, clips: Sequence[tuple[torch.Tensor, torch.Tensor]], size: tuple[int, int] | None) -> Task:
        """Encodes pairs of clips, each uint8 `[T, 3, H, W]`; on the engine's thread."""
        pairs = [tuple(clip.permute(0, 2, 3, 1).numpy() for clip in pair) for pair in clips]
        return self._pipeline.task(pairs, size=size)

    def add(self, pack: TaskPack) -> LibraryEntry:
        """Takes a task of a client's.

        Raises:
            Refused, InputError: as `check_new`, or 422 for another VAE's.
        """
        self.check_new(pack.name)
        self._pipeline.check_context(pack.context)
        if pack.context.pairs > self._limits.pairs:
            raise Refused(413, f"{pack.context.pairs} pairs; expected {self._limits.pairs} at most", "size")
        with self._lock:
            self.check_new(pack.name)
            entry = self._entries[pack.name] = packed_entry(pack, "own")
        return entry

    def remove(self, name: str) -> None:
        """Deletes a client's task.

        Raises:
            Refused: 404, or 403 for one that came with the service.
        """
        with self._lock:
            entry = self.find(name)
            if entry.origin != "own":
                raise Refused(
                    403, f"task {name!r} came with the service; only tasks of clients can be deleted", "input"
                )
            self._drop(entry)

    def task(self, entry: LibraryEntry, pairs: int, size: tuple[int, int]) -> Task:
        """An entry's encoded task, kept for the next request; on the engine's thread."""
        key = (entry.name, entry.version, pairs, size)
        with self._lock:
            if key in self._tasks:
                self._tasks.move_to_end(key)
                self._trim()
                return self._tasks[key]
        if isinstance(entry.source, EncodedContext):
            source = entry.source
            task = self._pipeline.task(first_pairs(source, pairs), size=size, posterior=source.posterior)
        else:
            task = self._pipeline.task(entry.source, pairs=pairs, size=size)
            task.frames = None  # only its latents are needed from now on
        with self._lock:
            if self._entries.get(entry.name) is entry:  # else it went meanwhile, and nobody would ask for it again
                self._tasks[key] = task
                self._trim()
        return task

    def _trim(self) -> None:
        """Lets go of what was not used for longest; what tasks hold grows when they are first run, so at every use."""
        held = sum(task.kept_bytes for task in self._tasks.values())
        while len(self._tasks) > 1 and (len(self._tasks) > ENCODED or held > ENCODED_BYTES):
            held -= self._tasks.popitem(last=False)[1].kept_bytes

    def thumbnails(self, entry: LibraryEntry, most: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Small pictures of the first pairs, uint8 `[3, h, w]` each."""
        if entry.thumbnails is None and isinstance(entry.source, Path):
            pairs = contexts.choose_pairs(contexts.read_template(entry.source), min(most, entry.pairs), 0)
            frames = []
            for source in (side for pair in pairs for side in (pair.input, pair.target)):
                picture = images.load_clip(source)[:1]
                scale = min(1.0, THUMBNAIL / max(picture.shape[-2:]))
                height, width = (max(1, round(edge * scale)) for edge in picture.shape[-2:])
                frames.append(images.resize(picture, (height, width))[0])
            return list(zip(frames[0::2], frames[1::2], strict=True))
        if entry.thumbnails is None:
            return []
        return list(zip(entry.thumbnails[0 : 2 * most : 2], entry.thumbnails[1 : 2 * most : 2], strict=True))

    def _expire(self) -> None:
        oldest = time.monotonic() - self._limits.task_seconds
        for entry in [entry for entry in self._entries.values() if entry.origin == "own" and entry.used < oldest]:
            self._drop(entry)

    def _drop(self, entry: LibraryEntry) -> None:
        del self._entries[entry.name]
        for key in [key for key in self._tasks if key[:2] == (entry.name, entry.version)]:
            del self._tasks[key]


def template_entry(folder: Path, origin: str) -> LibraryEntry | None:
    """A template folder as a task; None where it is not one or its name cannot be a task's."""
    try:
        name = check_name(folder.name.lower())
        pairs = contexts.read_template(folder)
        first = Path(pairs[0].input)
        frames = len(images.frame_files(first)) if first.is_dir() else len(images.load_clip(first))
    except InputError:
        return None
    return LibraryEntry(name, origin, len(pairs), frames, None, folder)


def packed_entry(pack: TaskPack, origin: str) -> LibraryEntry:
    """A pack as a task."""
    context = pack.context
    return LibraryEntry(
        pack.name, origin, context.pairs, context.frames_per_clip, context.size, context, pack.words, pack.thumbnails
    )
