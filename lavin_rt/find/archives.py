"""Unpacking `.tar.gz` archives without trusting them."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from lavin_rt.errors import InputError, one_line
from lavin_rt.files import Progress, written_whole

CHUNK = 2**20


def unpack(
    archive: str | os.PathLike,
    folder: str | os.PathLike,
    progress: Progress | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Unpacks a `.tar.gz` of files and folders into a new folder, which appears when everything is in it.

    Files and folders get default permissions and the present time.

    Args:
        archive: the archive.
        folder: does not exist yet, or is empty; its parents are made.
        progress: called with (bytes of the archive read, its size).
        check: called with the complete folder before it appears; what it raises undoes the unpacking.

    Raises:
        InputError: absolute members or members that lead out of the folder, links, devices, a damaged or truncated
            archive, a folder that cannot be written. Nothing is left behind.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        raw = _Watched(archive, progress or (lambda done, total: None))
    except OSError as error:
        raise InputError(f"cannot read {archive}: {error.strerror}; expected a .tar.gz archive") from None
    with raw, written_whole(folder, folder=True) as partial:
        try:
            with gzip.open(raw) as stream:
                with tarfile.open(fileobj=stream, mode="r|") as tar:
                    # Python's own opinion as well, where it has one: early patch releases of 3.10 and 3.11 have not.
                    tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
                    for member in tar:
                        if fault := _fault(member) or _unpack_member(tar, member, partial):
                            raise InputError(
                                f"{archive} is not unpacked: its member {member.name!r} {fault}; expected files and "
                                "folders that stay inside, get the archive from its publisher"
                            )
                while stream.read(CHUNK):  # to gzip's checksum, which stands behind the tar's end
                    pass
        except InputError:
            raise
        # `OSError` is left to `written_whole`, but for the one that gzip derives from it.
        except (EOFError, ValueError, OverflowError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
            raise InputError(
                f"{archive} is damaged, truncated or no .tar.gz ({one_line(error)}); download it again"
            ) from None
        if check is not None:
            check(partial)


class _Watched(io.FileIO):
    """A file that tells how far it has been read."""

    def __init__(self, path: Path, progress: Progress):
        super().__init__(path)
        self.progress, self.total = progress, os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self.progress(self.tell(), self.total)
        return content


def _fault(member: tarfile.TarInfo) -> str:
    """Why a member is refused, or nothing."""
    # In the notation of either kind of system.
    paths = PurePosixPath(member.name), PureWindowsPath(member.name)
    if any(path.anchor or ".." in path.parts for path in paths):
        return "is absolute or contains '..'"
    if member.issym() or member.islnk():
        return f"is a link to {member.linkname!r} (tar -h packs what links lead to)"
    return "" if member.isreg() or member.isdir() else "is a device or another special file"


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> str:
    """Writes a file or makes a folder; returns why it cannot be, or nothing."""
    try:
        if member.isdir():
            (root / member.name).mkdir(parents=True, exist_ok=True)
        else:
            tar.extract(member, root, set_attrs=False)
    except (FileExistsError, IsADirectoryError, NotADirectoryError):
        return "takes the place of another member"
    return ""
