"""What this process may use of its machine, by its control groups (v1 and v2), its affinity and its own limits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def processors() -> int:
    """Processors that this process may keep busy: by affinity, and by the quota of its control groups, rounded."""
    return max(1, round(processor_time()))


def crowded() -> bool:
    """Whether threads on all of `processors()` would wait for one another: other programs run on some of the machine's,
    or a quota ends in the middle of one.
    """
    free = (os.cpu_count() or 1) - _others_running()
    return min(free, processor_time()) < processors()


def processor_time() -> float:
    """Seconds of processors a second that affinity and quotas allow."""
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                allowed = min(allowed, int(quota) / int(period))
    return allowed


def _others_running() -> int:
    """Threads beside this one that run or wait for a processor, anywhere on the machine; 0 where the system does not
    say. The median of five looks in 16 ms, as many run for an instant only.
    """
    looks = []
    for look in range(5):
        time.sleep(0.004 if look else 0)
        with contextlib.suppress(OSError, ValueError, IndexError):
            running, _ = (ROOT / "proc/loadavg").read_text().split()[3].split("/")
            looks.append(max(0, int(running) - 1))
    return statistics.median_low(looks) if looks else 0


def memory_left() -> int | None:
    """Bytes that this process may take by the limits of its control groups and its own; None where there are none.

    Pages of files that nothing uses at present do not count as taken.
    """
    left = []
    for folder in _groups("memory"):
        with contextlib.suppress(OSError, ValueError):
            if (folder / "memory.max").exists():
                limit, taken, idle = "memory.max", "memory.current", "inactive_file"
            else:
                limit, taken, idle = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            most = (folder / limit).read_text().strip()
            if most == "max" or int(most) >= 2**60:  # v1's way to say none
                continue
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left.append(int(most) - int((folder / taken).read_text()) + int(statistics.get(idle, 0)))
    left += _address_space_left()
    return max(0, min(left)) if left else None


def give_back_freed_memory() -> None:
    """Lets the system have what is freed and still held, where the C library knows how."""
    if sys.platform.startswith("linux"):
        system = ctypes.CDLL(None)
        if hasattr(system, "malloc_trim"):
            system.malloc_trim(0)


def _address_space_left() -> list[int]:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            pages = int((ROOT / "proc/self/statm").read_text().split()[0])
            return [most - pages * resource.getpagesize()]
    return []


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control groups of a controller, from its own up to the outermost one seen here."""
    try:
        own = [line.split(":", 2) for line in (ROOT / "proc/self/cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (ROOT / "proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return
    for fields in mounts:
        rest = fields[fields.index("-") + 1 :]
        version_2 = rest[0] == "cgroup2"
        if not version_2 and not (rest[0] == "cgroup" and controller in rest[2].split(",")):
            continue
        for _, controllers, group in own:
            if controller in controllers.split(",") or (version_2 and not controllers):
                # In a container the group's path may be one that is not seen from inside: the mount is the group then.
                inside = os.path.relpath(group, fields[3]) if group.startswith(fields[3]) else "."
                mount = ROOT / fields[4].lstrip("/")
                folder = mount / inside
                while folder.is_relative_to(mount):
                    yield folder
                    folder = folder.parent


def temporary_folder() -> str:
    """The folder for temporary files that the environment asks for first, there or not: programs in C do not look for
    another one.
    """
    return tempfile._candidate_tempdir_list()[0]  # type: ignore[attr-defined]  # its list has no public name


def folder_fault(folder: str | os.PathLike[str]) -> str:
    """Why files cannot be made, or programs not be run, in a folder; nothing where they can."""
    try:
        with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:
            file.write(bytes(2**16))
            file.flush()
        if hasattr(os, "ST_NOEXEC") and os.statvfs(folder).f_flag & os.ST_NOEXEC:
            return "programs may not run there (noexec)"
    except OSError as error:
        return error.strerror or str(error)
    return ""
