"""Task contexts: folders of example pairs, the choice among them, and their frames."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lavin_rt.errors import InputError, listed
from lavin_rt.pictures import images
from lavin_rt.scalars import whole

_ROLES = ("input", "target")


@dataclasses.dataclass(frozen=True)
class Pair:
    """An example of a task: what goes in and what should come out, each anything that `images.load_clip` reads."""

    name: str
    input: Any
    target: Any


def read_template(folder: str | os.PathLike) -> list[Pair]:
    """The pairs of an official template folder, in natural order of their names.

    A pair is `<name>_input.png` and `<name>_target.png`; what comes before the first `_` pairs them. Other picture
    formats do too, and so do folders of frames `<name>_input/`, `<name>_target/`, which are clips. Anything else is
    passed over.

    Raises:
        InputError: no such folder, no pairs in it, a picture without its partner, or two with one name.
    """
    folder, where = Path(folder), images.source_name(folder)
    if not folder.is_dir():
        raise InputError(f"{where}: no such folder; expected one with *_input and *_target pictures")
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: {role: [] for role in _ROLES})
    for path in _entries(folder):
        is_dir = path.is_dir()
        stem = path.name if is_dir else path.stem
        role = stem.rpartition("_")[2]
        if role in _ROLES and "_" in stem and (is_dir or path.suffix.lower() in images.PICTURE_SUFFIXES):
            found[stem.partition("_")[0]][role].append(path)
    if not found:
        raise InputError(f"{where}: no *_input, *_target pictures here; expected pairs as 0_input.png, 0_target.png")
    for name, roles in found.items():
        for paths in roles.values():
            if len(paths) > 1:
                raise InputError(
                    f"{where}: {_names(paths)} all begin with {images.source_name(name)}_; expected one, as the text "
                    "before the first _ tells pairs apart; rename them"
                )
    lonely = [path for roles in found.values() if not all(roles.values()) for paths in roles.values() for path in paths]
    if lonely:
        raise InputError(
            f"{where}: no partner for {_names(lonely)}; expected one _input and one _target for every text before the "
            "first _; add what is missing or take these away"
        )
    return [Pair(name, *(found[name][role][0] for role in _ROLES)) for name in sorted(found, key=images.natural_key)]


def given_pairs(pairs: Iterable[Sequence[Any] | Pair]) -> list[Pair]:
    """Pairs given in Python as `(input, target)`, all of them and in their order."""
    if not isinstance(pairs, Iterable):
        raise InputError(
            f"context is {type(pairs).__name__}; expected a folder, a task's name or pairs (input, target)"
        )
    given: list[Pair] = []
    for i, pair in enumerate(pairs):
        if isinstance(pair, Pair):
            given.append(pair)
            continue
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"context pair {i} is {type(pair).__name__}, expected a pair (input, target)")
        given.append(Pair(str(i), *pair))
    if not given:
        raise InputError("the context has no pairs; expected at least one (input, target)")
    return given


def choose_pairs(pairs: Sequence[Pair], count: int, seed: int, repeats: bool = False) -> list[Pair]:
    """Chooses `count` pairs by seed, in an order by seed.

    The pairs with the smallest SHA-256 of `seed:name` are taken. Unlike sampling in Python, NumPy and torch, which may
    change between versions, this is the same everywhere; the order of listing does not matter, fewer pairs are
    the beginning of more, and adding a pair to a folder leaves the order of the others.

    Args:
        pairs: all there are.
        count: at least 1, and at most all unless `repeats`.
        seed: any integer.
        repeats: draw each independently, so that one may come several times, as the original does.

    Raises:
        InputError: zero pairs, or more than there are.
    """
    wanted, number = whole(count), whole(seed)
    if number is None:
        raise InputError(f"seed is {seed!r}; expected a whole number")
    if wanted is None or wanted < 1:
        raise InputError(f"{count!r} context pairs asked for; expected a whole number, at least 1")
    if not pairs:
        raise InputError("the context has no pairs; expected at least one")
    if repeats:
        by_name = sorted(pairs, key=lambda pair: images.natural_key(pair.name))
        return [by_name[_hash(number, "draw", i) % len(by_name)] for i in range(wanted)]
    if wanted > len(pairs):
        raise InputError(
            f"{count} context pairs asked for, {len(pairs)} are there; ask for {len(pairs)} at most, or allow repeats"
        )
    return sorted(pairs, key=lambda pair: _hash(number, pair.name))[:wanted]


def find_task(name: str | os.PathLike, template_roots: Iterable[str | os.PathLike]) -> Path:
    """The template folder of a task: a folder given, else the first root that has one of that name.

    Args:
        name: a folder, or a task's name or a beginning of it that fits one task only (`depth` for `depth_estimation`).
        template_roots: folders of template folders, in order of preference; those that do not exist are passed over.

    Raises:
        InputError: no such folder, no such task (with those there are), or a beginning that fits several.
    """
    text = os.fspath(name)
    shown = images.source_name(text)
    if text and os.path.isdir(text):
        return Path(text)
    if os.sep in text:
        raise InputError(f"{shown}: no such folder; expected one with *_input and *_target pictures, or a task's name")
    tasks = [{path.name: path for path in task_folders(root)} for root in template_roots]
    for of_root in tasks:
        if text in of_root:
            return of_root[text]
        fitting = [task for task in of_root if text and task.startswith(text)]
        if len(fitting) == 1:
            return of_root[fitting[0]]
        if fitting:
            raise InputError(f"task {text!r} fits {_names(fitting, len(fitting))}; give more of the name")
    known = sorted({task for of_root in tasks for task in of_root}, key=images.natural_key)
    if not known:
        raise InputError(f"unknown task {text!r}; no templates here; give a folder")
    raise InputError(f"unknown task {text!r}; expected a folder or one of {_names(known, len(known))}")


def task_folders(root: str | os.PathLike) -> list[Path]:
    """The folders in a folder of templates, in natural order; none where there is no such folder."""
    return [path for path in _entries(Path(root)) if path.is_dir()]


@dataclasses.dataclass(frozen=True, eq=False)
class ContextFrames(Sequence[torch.Tensor]):
    """The clips of a context's pairs, decoded and resized, as a sequence `in1, target1, in2, target2, ...`.

    An item is what the VAE encodes, float32 `[1, 3, T, H, W]` in [-1, 1], made when it is asked for: held as uint8,
    the frames take a quarter of the memory.

    Attributes:
        frames: uint8 `[T, 3, H, W]` of every item.
        size: (height, width).
    """

    frames: tuple[torch.Tensor, ...]
    size: tuple[int, int]

    @classmethod
    def prepare(cls, pairs: Sequence[Pair], size: tuple[int, int], cut: int | None = None) -> ContextFrames:
        """Reads the pairs' pictures or clips, of longer clips `cut` frames, and resizes them to (height, width).

        Raises:
            InputError: no pairs, something unreadable, or clips of different lengths.
        """
        frames: list[torch.Tensor] = []
        for pair in pairs:
            for role, source in zip(_ROLES, (pair.input, pair.target), strict=True):
                clip = images.resize(images.load_clip(source, cut), size)
                if frames and len(clip) != len(frames[0]):
                    raise InputError(
                        f"{role} of context pair {images.source_name(pair.name)} has {len(clip)} frames, the first "
                        f"input {len(frames[0])}; all clips of a context have the same number"
                    )
                frames.append(clip)
        if not frames:
            raise InputError("the context has no pairs; expected at least one (input, target)")
        return cls(tuple(frames), (size[0], size[1]))

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, item: int) -> torch.Tensor:  # type: ignore[override]  # one by one, no slices
        return images.to_pixels(self.frames[item]).transpose(0, 1).unsqueeze(0).contiguous()

    @property
    def frames_per_clip(self) -> int:
        return len(self.frames[0])

    @property
    def pairs(self) -> int:
        return len(self.frames) // 2

    def rows(self, query: torch.Tensor, result: torch.Tensor) -> list[list[torch.Tensor]]:
        """The rows of `images.grid`: every input over its target, then the query over its result, uint8 frames all."""
        return [[*self.frames[0::2], query], [*self.frames[1::2], result]]


def check_query_frames(query_frames: int, context_frames: int, source: str = "query") -> None:
    """Checks that a query has as many frames as every clip of its context."""
    if query_frames != context_frames:
        raise InputError(
            f"{source}: {query_frames} frames, the context's clips have {context_frames}; "
            "give queries and pairs of the same length, or cut both (frames=N, --frames N)"
        )


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest(), "big")


def _entries(folder: Path) -> Iterator[Path]:
    """What a folder holds that is not hidden, in natural order; nothing where there is no such folder."""
    try:
        entries = [path for path in folder.iterdir() if path.name[0] != "."]
    except (FileNotFoundError, NotADirectoryError):
        return iter(())
    except OSError as error:
        raise InputError(
            f"{images.source_name(folder)}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    return iter(sorted(entries, key=lambda path: images.natural_key(path.name)))


def _names(paths: Sequence[Path | str], most: int = 5) -> str:
    return listed((images.source_name(os.path.basename(path)) for path in paths), most)
