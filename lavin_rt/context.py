"""Task contexts: folders of example pairs, the choice among them, their frames, and encoded contexts in files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lavin_rt import images, kept_keys
from lavin_rt.errors import InputError
from lavin_rt.files import written_whole
from lavin_rt.kept_keys import KeptKeys
from lavin_rt.scalars import whole

_ROLES = ("input", "target")
_FORMAT, _VERSION = "lavin-rt encoded context", "1"
THUMBNAILS = "thumbnails"


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


def given_pairs(pairs: Iterable[Sequence[Any]]) -> list[Pair]:
    """Pairs given in Python as `(input, target)`, all of them and in their order."""
    if not isinstance(pairs, Iterable):
        raise InputError(
            f"context is {type(pairs).__name__}; expected a folder, a task's name or pairs (input, target)"
        )
    given = []
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
    given, count = count, whole(count)
    if whole(seed) is None:
        raise InputError(f"seed is {seed!r}; expected a whole number")
    seed = whole(seed)  # its text decides
    if count is None or count < 1:
        raise InputError(f"{given!r} context pairs asked for; expected a whole number, at least 1")
    if not pairs:
        raise InputError("the context has no pairs; expected at least one")
    if repeats:
        by_name = sorted(pairs, key=lambda pair: images.natural_key(pair.name))
        return [by_name[_hash(seed, "draw", i) % len(by_name)] for i in range(count)]
    if count > len(pairs):
        raise InputError(
            f"{count} context pairs asked for, {len(pairs)} are there; ask for {len(pairs)} at most, or allow repeats"
        )
    return sorted(pairs, key=lambda pair: _hash(seed, pair.name))[:count]


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
class ContextFrames(Sequence):
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

    def __getitem__(self, item: int) -> torch.Tensor:
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


class WhenRead:
    """A dataclass's field that takes a value, or a function that gives it when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> Any:
        if instance is None:
            raise AttributeError(self._name)  # no default
        value = instance.__dict__[self._name]
        if callable(value):
            value = instance.__dict__[self._name] = value()
        return value

    def __set__(self, instance: object, value: Any) -> None:
        instance.__dict__[self._name] = value


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedContext:
    """A context as the diffusion transformer reads it, encoded once for any number of queries.

    Attributes:
        latents: `[1, 16, F, h, w]`, `h = height / 8`, already scaled (`(z - shift) * scale` after the VAE's encoder);
            F is the latent frames of `in1, target1, in2, target2, ...` one after another.
        vae_fingerprint: `vae_fingerprint` of the VAE that encoded it, or what computes it once it is asked for.
        size: (height, width) of the frames, pixels.
        posterior: "mean" or "sample", what was taken of the VAE's posterior.
        pairs: how many.
        frames_per_clip: frames of every input and target, `1 + 4 k`.
        source: where it comes from, for messages.
        kept: keys and values of the pairs in one transformer, or None.
    """

    latents: torch.Tensor
    vae_fingerprint: str = WhenRead()
    size: tuple[int, int]
    posterior: str
    pairs: int
    frames_per_clip: int
    source: str = "encoded context"
    kept: KeptKeys | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, `latents` and metadata, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        self.save_with(path, {}, {})

    def save_with(self, path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], more: Mapping[str, str]) -> None:
        """Writes the file of `save` with more tensors and metadata, as a task pack has them."""
        from safetensors.torch import save

        described = {
            "format": _FORMAT,
            "version": _VERSION,
            "vae_fingerprint": self.vae_fingerprint,
            "size": f"{self.size[0]}x{self.size[1]}",
            "posterior": self.posterior,
            "pairs": str(self.pairs),
            "frames_per_clip": str(self.frames_per_clip),
        }
        tensors = {"latents": self.latents.detach().cpu().contiguous(), **tensors}
        if self.kept is not None:
            tensors[kept_keys.TENSOR], described[kept_keys.FINGERPRINT] = self.kept.parts, self.kept.fingerprint
        content = save(tensors, metadata={**more, **described})
        images.check_writable(path)
        with written_whole(path) as partial:
            partial.write_bytes(content)

    @classmethod
    def load(cls, path: str | os.PathLike) -> EncodedContext:
        """Reads what `save` wrote, on the CPU and in the dtype it was saved in.

        Raises:
            InputError: no such file, truncated, another kind of file or version, or a contradiction.
        """
        from safetensors import SafetensorError, safe_open

        name = images.source_name(path)
        foreign = f"{name}: not an encoded context of lavin-rt"
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                described = file.metadata() or {}
                if described.get("format") != _FORMAT:
                    raise InputError(f"{foreign} (its metadata do not say so); expected a file saved as one")
                version = described.get("version", "none")
                if version != _VERSION:
                    raise InputError(f"{name}: is of version {version}, this package reads {_VERSION}; encode it again")
                # A task pack has small pictures of its pairs beside them (lavin_rt.packs).
                held = set(file.keys())
                if "latents" not in held or held - {"latents", THUMBNAILS, kept_keys.TENSOR}:
                    raise InputError(f"{name}: holds {sorted(held)}, expected latents alone; encode it again")
                latents = file.get_tensor("latents").clone()
                kept = KeptKeys.read(file, name) if kept_keys.TENSOR in held else None
        except FileNotFoundError:
            raise InputError(f"{name}: no such file; expected an encoded context") from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"{foreign}, or truncated ({' '.join(str(error).split())}); encode it again") from error
        try:
            size = images.parse_size(described["size"])
            pairs, frames_per_clip = int(described["pairs"]), int(described["frames_per_clip"])
            images.check_clip_frames(frames_per_clip)
            posterior, fingerprint = described["posterior"], described["vae_fingerprint"]
        except (KeyError, ValueError) as error:
            raise InputError(f"{name}: damaged metadata ({error}); encode it again") from error
        shape = [1, 16, 2 * pairs * (1 + (frames_per_clip - 1) // 4), size[0] // 8, size[1] // 8]
        if pairs < 1 or list(latents.shape) != shape or not latents.is_floating_point() or not latents.isfinite().all():
            found = f"{str(latents.dtype).removeprefix('torch.')} {list(latents.shape)}"
            raise InputError(f"{name}: latents are {found}, expected finite numbers {shape}; encode it again")
        return cls(latents, fingerprint, size, posterior, pairs, frames_per_clip, name, kept)

    def check(
        self,
        vae_fingerprint: str,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        posterior: str | None = None,
    ) -> None:
        """Refuses to be used with another VAE, or where given, at another size, frame count or posterior.

        Raises:
            InputError: one of them differs; names both values.
        """
        if vae_fingerprint != self.vae_fingerprint:
            raise InputError(
                f"{self.source}: encoded by another VAE (fingerprint {self.vae_fingerprint[:12]}, this one has "
                f"{vae_fingerprint[:12]}); encode the task's context again with this VAE"
            )
        if size is not None and tuple(size) != self.size:
            raise InputError(
                f"{self.source}: encoded at size {self.size[0]}x{self.size[1]}, asked for {size[0]}x{size[1]}; "
                f"run at {self.size[0]}x{self.size[1]} or encode it again"
            )
        if posterior is not None and posterior != self.posterior:
            raise InputError(
                f"{self.source}: holds the posterior's {self.posterior}, asked for {posterior}; encode it again"
            )
        if frames is not None:
            check_query_frames(frames, self.frames_per_clip)


def vae_fingerprint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """32 hexadecimal digits that tell VAEs apart: SHA-256 over names, shapes and bfloat16 values of the tensors.

    Names are sorted, so the kind of file and the order in it do not matter. Rounded to bfloat16, the same weights have
    one fingerprint whether they run in float32 or in bfloat16. Tensors are read one by one.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        values = tensor.detach().to("cpu", torch.bfloat16).contiguous().flatten()
        digest.update(memoryview(values.view(torch.uint8).numpy()))
    return digest.hexdigest()[:32]


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
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(images.source_name(os.path.basename(path)) for path in paths[:most]) + more
