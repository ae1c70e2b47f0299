"""Files and folders that appear whole or not at all.

What is not ready has a hidden name, `.lavin-rt-*.part`, beside its place or, where that is a folder, in it. Who writes
it holds a lock on it, so that what a killed process left is known by its lock being free, and is removed by the next
that writes there.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from lavin_rt.errors import InputError, one_line

Progress = Callable[[int, int], None]
"""`(bytes done, bytes in all)`, called while files are read or unpacked."""

Stamp = tuple[int, int]
"""Size and time of last change, by which a file is known to be the same. No inode: some network file systems number a
file anew when they forget it."""

PARTIAL = ".lavin-rt-*.part"
ABANDONED_SECONDS = 24 * 3600  # where a file system knows no locks
NOT_CONTENT = ("lost+found",)  # in the root of a volume
LONGEST_PATH = 4095
_reclaimed: set[Path] = set()


@contextlib.contextmanager
def written_whole(path: str | os.PathLike, folder: bool = False) -> Iterator[Path]:
    """An empty file, or with `folder` an empty folder, to fill: it is at `path` when the block ends, and gone if that
    fails. Missing parents are made.

    A file is renamed, and has the mode, owner and attributes of the one that it replaces. Where that one cannot be
    replaced, being a mount of its own or in a folder that cannot be written, and where it is no plain file, it is
    written over. A folder is renamed; into one that is there and empty, which may be a mount or the current one, its
    content is moved. An `OSError` in the block becomes an `InputError`, about the file elsewhere that it names, if any.

    Raises:
        InputError: it cannot be written; or a folder that is not empty.
    """
    target = Path(os.path.realpath(path))  # writing through a link keeps the link
    try:
        old = _status(path)
        _check_kind(old, folder)
        with _partial(target, folder, old) as partial:
            yield partial
            if old is None:
                os.replace(partial, target)
            elif folder:
                _move_content(partial, target)
            elif stat.S_ISREG(old.st_mode):
                _replace(partial, target, old)
            else:
                _write_over(partial, Path(path))
    except OSError as error:
        if isinstance(error.filename, str) and not _is_of(Path(os.path.abspath(error.filename)), target):
            reason = error.strerror or error
            raise InputError(
                f"{one_line(error.filename)}: {reason}; {one_line(os.fspath(path))} was not written for it"
            ) from error
        raise _cannot_write(path, error) from error


def _is_of(place: Path, target: Path) -> bool:
    """Whether a file is a target's: in it, in something unfinished beside it, or a folder that leads there."""
    place = Path(os.path.realpath(place.parent)) / place.name
    if place.is_relative_to(target) or target.is_relative_to(place):
        return True
    beside = place.is_relative_to(target.parent)
    return beside and fnmatch.fnmatchcase(place.relative_to(target.parent).parts[0], PARTIAL)


def check_writable(path: str | os.PathLike, folder: bool = False) -> None:
    """Checks, before any work is done, that `written_whole` can write there; makes nothing.

    Raises:
        InputError: names that are too long, a file that cannot be written, a folder that cannot be written or is not
            empty.
    """
    target = Path(os.path.realpath(path))
    try:
        there = next(place for place in (target, *target.parents) if os.path.lexists(place))
        _check_names(target, there)
        old = _status(path)
        _check_kind(old, folder)
        if old is None or folder:
            with tempfile.TemporaryFile(dir=there):
                pass
            if old is not None and not is_vacant(target):
                raise OSError(0, "it is not empty")
        elif stat.S_ISREG(old.st_mode):
            # Also where it would be renamed over: what its owner protected stays as it is.
            os.close(os.open(path, os.O_WRONLY))
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _cannot_write(path, error) from error


def is_vacant(folder: str | os.PathLike) -> bool:
    """Whether a folder holds nothing but what processes that were killed left in it, which is removed."""
    _reclaim(Path(folder))
    return all(name in NOT_CONTENT or fnmatch.fnmatchcase(name, PARTIAL) for name in os.listdir(folder))


@contextlib.contextmanager
def _partial(target: Path, folder: bool, old: os.stat_result | None) -> Iterator[Path]:
    """A free hidden name, made and locked; gone in the end."""
    inside = folder and old is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target if inside else target.parent
    if old is not None and not folder and not (stat.S_ISREG(old.st_mode) and os.access(place, os.W_OK | os.X_OK)):
        place = Path(tempfile.gettempdir())
    with scratch(place, folder) as partial:
        yield partial


@contextlib.contextmanager
def scratch(place: Path, folder: bool = True) -> Iterator[Path]:
    """A new hidden folder, or file, in `place`: gone when the block ends, reclaimed where the process is killed."""
    if place not in _reclaimed:
        _reclaim(place)
        _reclaimed.add(place)
    partial, lock = _made(place, folder)
    try:
        yield partial
    finally:
        if folder:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def _made(place: Path, folder: bool) -> tuple[Path, int | None]:
    """A new hidden file or folder and the descriptor that holds its lock."""
    while True:
        partial = place / PARTIAL.replace("*", secrets.token_hex(6))
        partial.mkdir() if folder else partial.touch(exist_ok=False)
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # another process thought it abandoned
            return partial, _lock(partial)[0]


def _lock(partial: Path) -> tuple[int | None, bool]:
    """A descriptor that holds the lock of a file or folder, and whether there are locks here.

    Raises:
        BlockingIOError: another process holds it.
    """
    if fcntl is None:
        return None, False
    descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # whatever it is
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            return descriptor, False
        if not os.path.samestat(os.fstat(descriptor), os.stat(partial)):
            raise FileNotFoundError(partial)
        return descriptor, True
    except BaseException:
        os.close(descriptor)
        raise


def _reclaim(folder: Path) -> None:
    """Removes what killed processes left unfinished."""
    for partial in folder.glob(PARTIAL):
        with contextlib.suppress(OSError):
            lock, locked = _lock(partial)
            try:
                if locked or time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
            finally:
                if lock is not None:
                    os.close(lock)


def _replace(partial: Path, target: Path, old: os.stat_result) -> None:
    """Renames over a file, as which it looks; where that cannot be, writes over it."""
    try:
        made = partial.stat()
        if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
            os.chown(partial, old.st_uid, old.st_gid)
        partial.chmod(stat.S_IMODE(old.st_mode))
        for name in getattr(os, "listxattr", lambda _: [])(target):
            with contextlib.suppress(OSError):
                os.setxattr(partial, name, os.getxattr(target, name))
        os.replace(partial, target)
    except OSError:
        _write_over(partial, target)


def _write_over(partial: Path, target: Path) -> None:
    """Copies into a file that is there; its room is taken before anything of it is lost."""
    plain = target.is_file()
    with open(partial, "rb") as source, open(target, "r+b" if plain else "wb", buffering=0) as file:
        size = os.fstat(source.fileno()).st_size
        if plain and size and hasattr(os, "posix_fallocate"):
            before = os.fstat(file.fileno()).st_size
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError:
                file.truncate(before)
                raise
        shutil.copyfileobj(source, file)
        if plain:
            file.truncate(size)
            os.fsync(file.fileno())


def _move_content(partial: Path, target: Path) -> None:
    """Moves what a folder holds into the empty one that it lies in, the last written last; back if that fails."""
    if not is_vacant(target):
        raise OSError(0, "it is not empty")
    moved: list[str] = []
    names = sorted(os.listdir(partial), key=lambda name: os.lstat(partial / name).st_mtime_ns)
    try:
        for name in names:
            os.rename(partial / name, target / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            os.rename(target / name, partial / name)
        raise


def _check_names(target: Path, there: Path) -> None:
    """Raises an `OSError` for a name that the file system of `there`, a parent, cannot hold."""
    if len(os.fsencode(target)) > LONGEST_PATH:
        raise OSError(0, f"its path is longer than {LONGEST_PATH} bytes")
    longest = os.statvfs(there).f_namemax if hasattr(os, "statvfs") else 255
    for part in target.parts[len(there.parts) :]:
        if len(os.fsencode(part)) > longest:
            raise OSError(0, f"its name is longer than the {longest} bytes that names have here")


def _check_kind(old: os.stat_result | None, folder: bool) -> None:
    if old is not None and folder != stat.S_ISDIR(old.st_mode):
        code = errno.ENOTDIR if folder else errno.EISDIR
        raise OSError(code, os.strerror(code))


def _status(path: str | os.PathLike) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _cannot_write(path: str | os.PathLike, error: OSError) -> InputError:
    name = one_line(os.fspath(path))
    name = name if len(name) <= 300 else f"{name[:150]}...{name[-100:]}"
    return InputError(f"{name}: cannot be written ({error.strerror or error}); choose a place you can write to")


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file by its status."""
    return status.st_size, status.st_mtime_ns


def check_stamp(path: str | os.PathLike, stamp: Stamp, descriptor: int | None = None) -> None:
    """Raises an `InputError` where a model's file, or what is open in its place, is not as it was."""
    try:
        found = stamp_of(os.stat(path if descriptor is None else descriptor))
    except OSError as error:
        raise cannot_reread(path, error) from None
    if found != stamp:
        raise InputError(f"{os.fspath(path)} has changed since its model was loaded; load the model again")


def cannot_reread(path: str | os.PathLike, error: OSError) -> InputError:
    """The error for a file of a model in use that is gone."""
    return InputError(
        f"{os.fspath(path)} cannot be read any more: {error.strerror}; keep a model's files in place while it is in use"
    )


@contextlib.contextmanager
def utf8_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """A file's path for a library that takes UTF-8 alone: its own, or one through its open descriptor."""
    name = os.fspath(path)
    try:
        os.fsencode(name).decode()
    except UnicodeDecodeError:
        with open(name, "rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        yield name
