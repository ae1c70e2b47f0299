"""What the command line settles in its process, and a library in another's must not: streams, signals and threads."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
STREAMS = ("stdin", "stdout", "stderr")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
# Below it a step is thousands of operations too short to wait for: of width 216 on two processors two threads take 1.1
# to 1.5 times as long as one beside two other programs, twice as long in a quota of 1.5; of width 576 as long.
LEAST_WIDTH = 512
MOST_THREADS = 4096  # as of the native runner


class Terminated(KeyboardInterrupt):
    """TERM or HUP came: what is under way is undone as after an interrupt."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"ended by {signal.Signals(number).name}")


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """TERM and HUP raise `Terminated` in the main thread, the first of them; HUP not where it is ignored (`nohup`).

    A container's first process would otherwise not even end: it has no default for signals.
    """

    def stop(number: int, frame: object) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Guarded:
    """A stream whose failures are known to be its own; what it holds is dropped then, and `flush` tells of them again,
    as not everybody who writes lets them through.
    """

    def __init__(self, stream: Any, name: str, tolerated: bool):
        self._stream, self._name, self._tolerated = stream, name, tolerated
        self._failure: OSError | None = None

    def write(self, text: str) -> int:
        with self._failures():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._failures():
            if self._failure is not None:
                raise self._failure
            self._stream.flush()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._failure is None:
                to_nowhere(self._stream)
                self._failure = error
            if not self._tolerated:
                raise OSError(error.errno, error.strerror, self._name) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def sound_streams() -> Iterator[None]:
    """Standard streams that can be written whatever the process was started with.

    Descriptors 0 to 2 that are closed are opened on nothing: the next file opened would get their number, and messages
    of libraries. Characters that an encoding lacks are escaped. Standard error never fails.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = {name: getattr(sys, name) for name in STREAMS}
    with contextlib.ExitStack() as stack:
        for name, stream in before.items():
            if stream is None:
                nothing = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115
                setattr(sys, name, stack.enter_context(nothing))
        if hasattr(sys.stdout, "reconfigure"):
            stack.callback(sys.stdout.reconfigure, errors=sys.stdout.errors)
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout = _Guarded(sys.stdout, "standard output", tolerated=False)
        # A message that cannot be written is not worth the work that it tells of.
        sys.stderr = _Guarded(sys.stderr, "standard error", tolerated=True)
        try:
            yield
        finally:
            for name, stream in before.items():
                setattr(sys, name, stream)


def check_output_wanted() -> None:
    """Raises an `OSError` where standard output was closed before the process began, for what has no other place."""
    if getattr(sys.stdout, "name", None) == os.devnull:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard output")


def to_nowhere(stream: Any) -> None:
    """Lets a stream's descriptor lead nowhere, so that what it still holds is no error when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def settle_memory_and_waiting() -> None:
    """Before PyTorch is loaded, for work that ends, on Linux with glibc:

    * Freed memory stays with the process. glibc takes buffers of many megabytes from the system and gives them back,
      every time page by page; a step of the released widths takes 120,000, up to a tenth of its time.
    * OpenMP's threads sleep while they wait where processors are crowded, instead of spinning on what others need. A
      setting of the environment's own stands.
    """
    from lavin_rt.container import crowded

    if not sys.platform.startswith("linux"):
        return
    system = ctypes.CDLL(None)
    if hasattr(system, "mallopt"):
        system.mallopt(M_MMAP_MAX, 0)
        system.mallopt(M_TRIM_THRESHOLD, -1)
    if crowded():
        system.setenv(b"OMP_WAIT_POLICY", b"passive", 0)


def settle_threads(wanted: int | None = None, hidden_size: int | None = None) -> None:
    """As many threads of PyTorch as are `wanted`, or else as this process may keep busy: PyTorch knows the affinity,
    but not a control group's quota. For a model of a small hidden size one, where processors are crowded.

    Raises:
        InputError: fewer than one, or more than `MOST_THREADS`.
    """
    from lavin_rt.container import crowded, processors
    from lavin_rt.errors import InputError

    if wanted is not None and not 1 <= wanted <= MOST_THREADS:
        raise InputError(f"--threads is {wanted}; expected 1 to {MOST_THREADS}")
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if wanted is None:
        wanted = min(torch.get_num_threads(), processors())
        if wanted > 1 and hidden_size is not None and hidden_size < LEAST_WIDTH and crowded():
            wanted = 1
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)
