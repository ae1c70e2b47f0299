"""Unpacking `.tar.gz` archives without trusting them."""

from __future__ import annotations

import contextlib
import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from lavin_rt.errors import InputError, one_line
from lavin_rt.files import Progress, written_whole

CHUNK = 2**20


def unpack(
    archive: str | os.PathLike,
    folder: str | os.PathLike,
    progress: Progress | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Unpacks a `.tar.gz` into a new folder, which appears when everything is in it.

    Files and folders get default permissions and the present time. Links are made last, and only if they stay inside.

    Args:
        archive: the archive.
        folder: does not exist yet, or is empty; its parents are made.
        progress: called with (bytes of the archive read, its size).
        check: called with the complete folder before it appears; what it raises undoes the unpacking.

    Raises:
        InputError: absolute members, members or links that lead out of the folder, devices, a damaged or truncated
            archive, a folder that cannot be written. Nothing is left behind.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        raw = open(archive, "rb")  # noqa: SIM115, closed by the next `with`
    except OSError as error:
        raise InputError(f"cannot read {archive}: {error.strerror}; expected a .tar.gz archive") from None
    with raw, written_whole(folder, folder=True) as partial:
        try:
            _Unpacking(archive, partial).run(raw, progress or (lambda done, total: None))
        except InputError:
            raise
        # `OSError` is left to `written_whole`, but for the one that gzip derives from it.
        except (EOFError, ValueError, OverflowError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
            reason = one_line(error)
            raise InputError(f"{archive} is damaged, truncated or no .tar.gz ({reason}); download it again") from None
        if check is not None:
            check(partial)


class _Unpacking:
    """One run of `unpack`: files and folders as they come, links last, so that nothing is written through a link."""

    def __init__(self, archive: Path, root: Path):
        self.archive = archive
        self.root = root
        self.hard_links: list[tuple[str, str]] = []
        self.symbolic_links: list[tuple[str, str]] = []

    def run(self, raw: BinaryIO, progress: Progress) -> None:
        total = os.fstat(raw.fileno()).st_size
        with gzip.open(raw) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    self._check(member)
                    with self._own_place(member.name):
                        for _ in self._take(tar, member):
                            progress(raw.tell(), total)
            while stream.read(CHUNK):  # to gzip's checksum, which stands behind the tar's end
                pass
        self._link()
        progress(total, total)

    def _refuse(self, member: str, reason: str) -> InputError:
        return InputError(
            f"{self.archive} is not unpacked: its member {member!r} {reason}; "
            "expected files and folders that stay inside, get the archive from its publisher"
        )

    def _path(self, name: str) -> Path:
        return self.root / PurePosixPath(name)

    def _check(self, member: tarfile.TarInfo) -> None:
        if _leads_out(member.name):
            raise self._refuse(member.name, "is absolute or contains '..'")
        if not (member.isreg() or member.isdir() or member.islnk() or member.issym()):
            raise self._refuse(member.name, "is a device or another special file")
        if member.islnk() and _leads_out(member.linkname):
            raise self._refuse(member.name, f"is a link to {member.linkname!r}, out of the archive")
        if member.issym():
            # Lexically first, for the message; where the link really leads is asked when all of them are there.
            target = os.path.normpath(os.path.join("/root", os.path.dirname(member.name), member.linkname))
            inside = target == "/root" or target.startswith("/root/")
            if os.path.isabs(member.linkname) or PureWindowsPath(member.linkname).anchor or not inside:
                raise self._refuse(member.name, f"is a link to {member.linkname!r}, out of the archive")
        if hasattr(tarfile, "data_filter"):  # Python's own opinion, absent from early patch releases of 3.10 and 3.11
            try:
                tarfile.data_filter(member, os.fspath(self.root))
            except tarfile.FilterError as error:
                raise self._refuse(member.name, f"is refused by Python's tarfile ({error})") from None

    @contextlib.contextmanager
    def _own_place(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileExistsError, IsADirectoryError, NotADirectoryError):
            raise self._refuse(name, "takes the place of another member") from None

    def _take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[int]:
        """Makes a folder, notes a link, or writes a file, yielding after every chunk how many bytes there are."""
        path = self._path(member.name)
        if member.isdir():
            path.mkdir(parents=True, exist_ok=True)
            return
        if not member.isreg():
            links = self.hard_links if member.islnk() else self.symbolic_links
            links.append((member.name, member.linkname))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        content = tar.extractfile(member)
        assert content is not None  # of a regular file
        with content as source, open(path, "wb") as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)
                yield target.tell()
            if target.tell() != member.size:
                raise tarfile.ReadError(f"{member.name} ends early")

    def _link(self) -> None:
        links = self.hard_links + self.symbolic_links
        for name, _ in links:  # real folders now, so that no link can take a parent's place
            with self._own_place(name):
                self._path(name).parent.mkdir(parents=True, exist_ok=True)
        for name, target in self.hard_links:
            if not self._path(target).is_file():
                raise self._refuse(name, f"is a link to {target!r}, which is no file of the archive")
            with self._own_place(name):
                os.link(self._path(target), self._path(name))
        for name, target in self.symbolic_links:
            with self._own_place(name):
                os.symlink(target, self._path(name))
        root = os.path.realpath(self.root)
        for name, target in self.symbolic_links:
            try:
                inside = os.path.commonpath([root, os.path.realpath(self._path(name), strict=True)]) == root
            except OSError:
                raise self._refuse(name, f"is a link to {target!r}, which leads nowhere") from None
            if not inside:
                raise self._refuse(name, f"is a link to {target!r}, out of the archive")


def _leads_out(name: str) -> bool:
    """Whether a member's name is absolute or climbs, in the notation of either kind of system."""
    return any(path.anchor or ".." in path.parts for path in (PurePosixPath(name), PureWindowsPath(name)))
