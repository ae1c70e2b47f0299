"""Task packs: a task in one file, its encoded context with a name, words and small pictures of its pairs.

A pack is an encoded context (`EncodedContext`) with more in it, so that whatever takes the one takes the other:
`lavin-rt run --task mytask.safetensors`, `Pipeline.task("mytask.safetensors")`, `lavin-rt serve`, `map`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lavin_rt.errors import InputError, one_line
from lavin_rt.files import utf8_path
from lavin_rt.pictures import images
from lavin_rt.pictures.encoded import THUMBNAILS, EncodedContext

if TYPE_CHECKING:
    from lavin_rt.task import Task

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
THUMBNAIL_SIDE = 128
WORDS = 500


def check_name(name: str) -> str:
    """A task's name as it may stand in an address: small letters, digits, `-` and `_`, 64 at most.

    Raises:
        InputError: another one.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"name {one_line(name, 80)!r}: expected small letters, digits, - and _, beginning with a letter "
            "or a digit, 64 at most"
        )
    return name


def check_words(words: str) -> None:
    """Raises an `InputError` for more words about a task than a pack takes."""
    if len(words) > WORDS:
        raise InputError(f"{len(words)} characters of words; expected {WORDS} at most")


@dataclasses.dataclass(frozen=True, eq=False)
class TaskPack:
    """A task in one file.

    Attributes:
        context: the encoded pairs.
        name: of the task.
        words: what it does, for people.
        thumbnails: uint8 `[2 * pairs, 3, h, w]`, the first frames of `in1, target1, in2, target2, ...`, or None.
    """

    context: EncodedContext
    name: str
    words: str = ""
    thumbnails: torch.Tensor | None = None

    @classmethod
    def of(cls, task: Task, name: str, words: str = "", keep_keys: bool = False) -> TaskPack:
        """The pack of a task of a pipeline, with thumbnails where its pairs' pictures are at hand.

        Raises:
            InputError: a name that is none, too many words, or keys and values that cannot be kept.
        """
        check_words(words)
        thumbnails = None
        if task.frames is not None:
            scale = min(1.0, THUMBNAIL_SIDE / max(task.size))
            size = tuple(max(1, round(edge * scale)) for edge in task.size)
            thumbnails = torch.cat([images.resize(clip[:1], (size[0], size[1])) for clip in task.frames.frames])
        context = task.with_keys() if keep_keys else task.context
        return cls(context, check_name(name), one_line(words), thumbnails)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        tensors = {} if self.thumbnails is None else {THUMBNAILS: self.thumbnails.contiguous()}
        self.context.save_with(path, tensors, {"name": self.name, "words": self.words})

    @classmethod
    def load(cls, path: str | os.PathLike) -> TaskPack:
        """Reads a pack, or an encoded context, whose name is then the file's.

        Raises:
            InputError: whatever `EncodedContext.load` refuses, or damaged thumbnails or name.
        """
        from safetensors import safe_open

        context = EncodedContext.load(path)
        with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
            described = file.metadata() or {}
            thumbnails = file.get_tensor(THUMBNAILS).clone() if THUMBNAILS in file.keys() else None  # noqa: SIM118
        if thumbnails is not None and (
            thumbnails.dtype != torch.uint8 or thumbnails.ndim != 4 or thumbnails.shape[:2] != (2 * context.pairs, 3)
        ):
            found = f"{str(thumbnails.dtype).removeprefix('torch.')} {list(thumbnails.shape)}"
            raise InputError(
                f"{images.source_name(path)}: thumbnails are {found}, expected uint8 [{2 * context.pairs}, 3, h, w]; "
                "make the pack again"
            )
        default = re.sub(r"[^a-z0-9_-]+", "-", Path(path).stem.lower()).strip("-_")[:64] or "task"
        name = check_name(described.get("name", default))
        return cls(context, name, one_line(described.get("words", ""), WORDS), thumbnails)


def first_pairs(context: EncodedContext, pairs: int) -> EncodedContext:
    """The context of the first so many pairs, which are encoded one by one and so are all there.

    Raises:
        InputError: more than there are, or none.
    """
    if not 1 <= pairs <= context.pairs:
        raise InputError(f"{pairs} context pairs asked for, {context.pairs} are there; ask for 1 to {context.pairs}")
    frames = context.latents.shape[2] // context.pairs
    latents = context.latents[:, :, : frames * pairs].contiguous()
    # A pair's keys and values depend on all pairs.
    kept = context.kept if pairs == context.pairs else None
    return dataclasses.replace(context, latents=latents, pairs=pairs, kept=kept)
