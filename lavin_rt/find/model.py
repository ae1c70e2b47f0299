"""Finding a checkpoint's or an artifact's files: in a folder, in the published archives, or on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lavin_rt.artifact.manifest import KINDS_OF_CODE, Manifest, artifact_values
from lavin_rt.artifact.manifest import NAME as MANIFEST
from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.checkpoint.tensors import INDEX_SUFFIX
from lavin_rt.errors import InputError, listed, missing_extra, one_line
from lavin_rt.files import Progress, check_writable
from lavin_rt.find.archives import unpack

DIT = "lavin_dit.safetensors"
DIT_INDEX = "lavin_dit" + INDEX_SUFFIX
VAES = ("stvae.safetensors", "stvae.pt", "stvae" + INDEX_SUFFIX)
WEIGHTS_ARCHIVE, TEMPLATE_ARCHIVE = "weights.tar.gz", "template.tar.gz"
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz")
BUNDLED = Path(__file__).parents[1] / "mini"
BUNDLED_NAMES = ("mini", "lavin-mini")
FILES = (DIT, DIT_INDEX, "lavin_dit-*.safetensors", *VAES, "stvae-*.safetensors", "config.json")
WANTED = (*FILES, *(f"weights/{name}" for name in FILES), "template/*", WEIGHTS_ARCHIVE, TEMPLATE_ARCHIVE, MANIFEST)
EXPECTED = f"{DIT} and {' or '.join(VAES[:2])}, or {WEIGHTS_ARCHIVE}"
FILE_SUFFIXES = (".safetensors", ".pt", *ARCHIVE_SUFFIXES)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An exported artifact on this machine (`lavin_rt.artifact.manifest`).

    Attributes:
        manifest: of its folder, in which nothing is a link.
        fetched: whether it came from a hub, so that code in it runs only for who trusts it.
        source: what it is called in records: the path as given, or `owner/name@commit`.
    """

    manifest: Manifest
    fetched: bool
    source: str

    @property
    def folder(self) -> Path:
        return self.manifest.folder

    @property
    def templates(self) -> Path | None:
        """The folder whose sub-folders are tasks, or None."""
        return self.folder / "template" if (self.folder / "template").is_dir() else None


def find_model(
    model: str | os.PathLike | None = None,
    revision: str | None = None,
    trust: bool = False,
    cache: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Checkpoint | Artifact:
    """Finds a checkpoint's files as `find_checkpoint` does, or an artifact's, in a folder or on the hub.

    Args:
        model: see `find_checkpoint`; None is the small model that comes with the package.
        trust: fetch an artifact with code in it (TensorRT plans, AOTInductor packages) from a hub.

    Raises:
        InputError: as `find_checkpoint`, or an artifact with code in it from a hub without `trust`.
    """
    if is_bundled(model):
        return find_checkpoint(model, revision, cache)
    text = os.fspath(model or "")
    path = Path(os.path.expanduser(text))  # which leaves a user that there is not as it is
    if text and (values := artifact_values(path)) is not None:
        if revision is not None:
            raise InputError(f"{text} is a local path, which has no revision {revision!r}; leave the revision out")
        return Artifact(Manifest.of(path, values), fetched=False, source=text)
    if (text and os.path.lexists(path)) or not HUB_ID.fullmatch(text) or text.endswith(FILE_SUFFIXES):
        return find_checkpoint(model, revision, cache, progress)
    snapshot = _fetch(text, revision, cache)
    if not (snapshot / MANIFEST).is_file():
        return _in_snapshot(text, snapshot, progress)
    # Real files: those of the hub's own cache are links, which an artifact may not hold.
    folder = snapshot.parent.parent / "artifact" / snapshot.name
    _fetch(text, snapshot.name, cache, folder, [MANIFEST])
    if (values := artifact_values(folder)) is None:  # a checkpoint with a manifest of something else
        return _in_snapshot(text, snapshot, progress)
    manifest = Manifest.of(folder, values)
    source = f"{text}@{snapshot.name}"
    if manifest.kind in KINDS_OF_CODE and not trust:
        raise InputError(
            f"{source} is a {manifest.kind} artifact from a hub, which runs code of whoever made it; "
            "pass --trust if you trust them"
        )
    _fetch(text, snapshot.name, cache, folder, [MANIFEST, *manifest.files, "template/*"])
    return Artifact(manifest, fetched=True, source=source)


def opened(files: Checkpoint | Artifact) -> Checkpoint | Artifact:
    """The same files by absolute paths, which stay right when the working folder changes, and a checkpoint's header
    read.

    Raises:
        InputError: as `lavin_rt.checkpoint.header.open_checkpoint`.
    """
    if isinstance(files, Artifact):
        folder = Path(os.path.abspath(files.folder))
        return dataclasses.replace(files, manifest=dataclasses.replace(files.manifest, folder=folder))
    dit, vae = (Path(os.path.abspath(path)) for path in (files.dit, files.vae))
    templates = None if files.templates is None else Path(os.path.abspath(files.templates))
    return dataclasses.replace(files, dit=dit, vae=vae, templates=templates, header=files.read_header())


def template_roots(files: Checkpoint | Artifact) -> list[Path]:
    """Where tasks are looked for by name: a model's own templates, then those that come with the package."""
    return [root for root in (files.templates, BUNDLED / "template") if root is not None]


def is_bundled(model: str | os.PathLike | None) -> bool:
    """Whether this is the small model that comes with the package: None, or its name where no file has it."""
    return model is None or (os.fspath(model) in BUNDLED_NAMES and not os.path.lexists(model))


def find_checkpoint(
    checkpoint: str | os.PathLike | None,
    revision: str | None = None,
    cache: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Finds, and where needed fetches and unpacks, a checkpoint's files. A local path comes before a hub id.

    Args:
        checkpoint: a folder with `lavin_dit.safetensors` and `stvae.safetensors` (preferred) or `stvae.pt`, in it or in
            its `weights/`, and perhaps `template/` beside them; the transformer's file itself; `weights.tar.gz`,
            perhaps with `template.tar.gz` beside it, or a folder with them; a Hugging Face id such as
            `DerrickWang005/LaVin-DiT`; "mini" or None, the small model that comes with the package (`lavin_rt.mini`).
        revision: branch, tag or commit of a hub id.
        cache: where archives are unpacked and hub files kept; by default huggingface_hub's folders. Archives from the
            hub are unpacked beside the revision that they belong to, into `unpacked/<commit>/<archive>`.
        progress: called with (bytes done, bytes in all) while an archive is unpacked.

    Raises:
        InputError: neither a path nor a hub id, files missing, a hub that cannot be reached or does not know the id, a
            bad archive.
    """
    if is_bundled(checkpoint):
        return dataclasses.replace(find_checkpoint(BUNDLED, revision, cache), source=BUNDLED_NAMES[1])
    text = os.fspath(checkpoint or "")
    path = Path(os.path.expanduser(text))
    try:
        if text and path.exists():
            if revision is not None:
                raise InputError(f"{text} is a local path, which has no revision {revision!r}; leave the revision out")
            return _Finder(text, lambda archive: _cached_place(archive, cache), progress).find(path)
        if not HUB_ID.fullmatch(text) or text.endswith(FILE_SUFFIXES):
            raise InputError(
                f"{text!r} is no file or folder here, nor a Hugging Face id (owner/name); "
                f"expected a folder with {EXPECTED}"
            )
        return _in_snapshot(text, _fetch(text, revision, cache), progress)
    except OSError as error:
        raise InputError(f"cannot read {text}: {error.strerror or error}; expected {EXPECTED}") from None


def _in_snapshot(repository: str, snapshot: Path, progress: Progress | None) -> Checkpoint:
    """A checkpoint's files in a hub repository's snapshot; archives are unpacked beside it."""
    beside = snapshot.parent.parent / "unpacked" / snapshot.name
    source = f"{repository}@{snapshot.name}"
    return _Finder(source, lambda archive: beside / archive.name, progress).find(snapshot)


@dataclasses.dataclass(frozen=True)
class _Finder:
    """Looks for a checkpoint's files on this machine.

    Attributes:
        source: what they are called in messages and records.
        place: the folder into which an archive is unpacked, once.
        progress: see `find_checkpoint`.
    """

    source: str
    place: Callable[[Path], Path]
    progress: Progress | None

    def find(self, path: Path) -> Checkpoint:
        if path.is_dir():
            for folder in (path, path / "weights"):
                dit = _dit_in(folder)
                if dit is not None:
                    return Checkpoint(dit, _vae_in(folder), self.templates_near(folder), self.source)
            if (path / WEIGHTS_ARCHIVE).is_file():
                return self.find_in_archive(path / WEIGHTS_ARCHIVE)
            raise InputError(f"{self.source} holds {_contents(path)}; expected {EXPECTED}")
        if path.name.endswith(ARCHIVE_SUFFIXES):
            return self.find_in_archive(path)
        if path.name.endswith((".safetensors", INDEX_SUFFIX)):
            return Checkpoint(path, _vae_in(path.parent), self.templates_near(path.parent), self.source)
        raise InputError(f"{self.source} is no checkpoint; expected {EXPECTED}, or a folder with them")

    def find_in_archive(self, archive: Path) -> Checkpoint:
        root = self.unpacked(archive, _weights_in)
        folder = _weights_in(archive, root)
        templates = (self.templates_near(place) for place in (folder, root, archive.parent))
        dit = _dit_in(folder)
        assert dit is not None, "where the weights were found"
        return Checkpoint(dit, _vae_in(folder), next(filter(None, templates), None), self.source)

    def templates_near(self, folder: Path) -> Path | None:
        """`template/`, or its archive unpacked, beside the weights or the folder `weights/` that they lie in."""
        for place in [folder, folder.parent] if folder.name == "weights" else [folder]:
            if (place / "template").is_dir():
                return place / "template"
            if (place / TEMPLATE_ARCHIVE).is_file():
                return _tasks_in(place / TEMPLATE_ARCHIVE, self.unpacked(place / TEMPLATE_ARCHIVE, _tasks_in))
        return None

    def unpacked(self, archive: Path, check: Callable[[Path, Path], Path]) -> Path:
        """The folder of an unpacked archive; `check(archive, folder)` has passed before it appears."""
        folder = self.place(archive)
        if not folder.is_dir():
            try:
                check_writable(folder, folder=True)
            except InputError as error:
                raise InputError(
                    f"{archive} is to be unpacked, but {error}: the environment's HF_HOME, or unpack it yourself and "
                    "give the folder"
                ) from None
            try:
                unpack(archive, folder, self.progress, lambda partial: check(archive, partial))
            except InputError:
                if not folder.is_dir():  # else another process was faster
                    raise
        return folder


def _weights_in(archive: Path, root: Path) -> Path:
    """The folder with the weights, down to two levels below `root`, where `archive` was unpacked."""
    for folder in _folders(root, levels=2):
        if _dit_in(folder) is not None:
            _vae_in(folder)
            return folder
    raise InputError(f"{archive} holds {_contents(root)}; expected {DIT} and {' or '.join(VAES[:2])}")


def _tasks_in(archive: Path, root: Path) -> Path:
    """The folder whose sub-folders are tasks, at `root`, where `archive` was unpacked, or down to two levels below."""
    for pattern in ("*/*_input*", "*/*/*_input*", "*/*/*/*_input*"):
        found = min(root.glob(pattern), default=None)
        if found is not None:
            return found.parent.parent
    raise InputError(f"{archive} holds {_contents(root)}; expected folders with *_input and *_target pictures")


def _dit_in(folder: Path) -> Path | None:
    """The transformer's file in a folder, or the index of its files; None where there is neither.

    Raises:
        InputError: a link to what is not there.
    """
    _check_links(folder, DIT, DIT_INDEX)
    named = (folder / name for name in (DIT, DIT_INDEX))
    return next((path for path in named if path.is_file()), None)


def _check_links(folder: Path, *names: str) -> None:
    for name in names:
        if (folder / name).is_symlink() and not (folder / name).exists():
            raise InputError(
                f"{folder / name} is a link to {os.readlink(folder / name)}, which is not there; fetch it again, "
                "or copy the files themselves (cp -rL) where a hub's cache was copied"
            )


def _vae_in(folder: Path) -> Path:
    _check_links(folder, *VAES)
    for name in VAES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} holds {_contents(folder)}; expected {' or '.join(VAES[:2])} beside the transformer")


def _folders(root: Path, levels: int) -> Iterator[Path]:
    """A folder and those in it, down to `levels`, outer ones first."""
    row = [root]
    for level in range(levels + 1):
        yield from row
        if level < levels:
            row = sorted(child for folder in row for child in folder.iterdir() if child.is_dir())


def _contents(folder: Path) -> str:
    """What a folder holds, for a message."""
    return listed(sorted(child.name + "/" * child.is_dir() for child in folder.iterdir())) or "nothing"


def _cached_place(archive: Path, cache: str | os.PathLike | None) -> Path:
    """Where a local archive is unpacked: a folder named after the archive's path, size and time of change."""
    if cache is None:
        try:
            from huggingface_hub.constants import HF_ASSETS_CACHE

            assets = Path(HF_ASSETS_CACHE)
        except ImportError:
            assets = Path.home() / ".cache/huggingface/assets"  # the same place
        cache = assets / "lavin-rt/archives/unpacked"
    status = archive.stat()
    identity = f"{archive.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape")
    return Path(cache) / f"{archive.name}-{hashlib.sha256(identity).hexdigest()[:16]}"


def _fetch(
    repository: str,
    revision: str | None,
    cache: str | os.PathLike | None,
    folder: Path | None = None,
    wanted: Sequence[str] = WANTED,
) -> Path:
    """A hub repository's wanted files: in a folder of real files, or by default in the hub's cache, whose snapshot
    folder `.../snapshots/<commit>` is returned.
    """
    at = f" at revision {revision!r}" if revision is not None else ""
    hub = f"{repository} is no local path, and as a Hugging Face id{at} it"
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise missing_extra("huggingface_hub", "hub", f"{repository} is no local path, and fetching it") from None
    place = {"cache_dir": cache} if folder is None else {"local_dir": folder}
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*wanted], **place))
    except errors.GatedRepoError:
        advice = "needs permission: accept its terms on its page and log in (`hf auth login`)"
    except errors.RepositoryNotFoundError:
        advice = "does not exist, or is private: check the spelling, or log in (`hf auth login`)"
    except errors.RevisionNotFoundError:
        advice = "does not exist: check the revision against its branches and tags"
    except errors.LocalEntryNotFoundError:
        advice = (
            "is not (completely) in the cache while the hub cannot be reached: "
            f"go online once, or give a folder with {EXPECTED}"
        )
    # What else a network can do comes as exceptions of several HTTP libraries, by huggingface_hub's version.
    except Exception as error:
        advice = f"could not be fetched ({one_line(error, 200)}): try again, or give a folder with {EXPECTED}"
    raise InputError(f"{hub} {advice}")
