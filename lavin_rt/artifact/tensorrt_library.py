"""What running and building TensorRT plans share: the module, its versions, its logger, signals meanwhile."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from lavin_rt.errors import InputError, missing_extra, one_line
from lavin_rt.process import SIGNALS

OLDEST = (10, 15)


def import_tensorrt(purpose: str) -> ModuleType:
    """The module `tensorrt`, of a version that the package knows.

    Raises:
        InputError: it is not installed, or older than 10.15, whose parser does not know RMSNormalization.
    """
    try:
        import tensorrt
    except ImportError as error:
        if getattr(error, "name", None) not in ("tensorrt", None):
            raise InputError(f"{purpose} needs TensorRT, which is installed but cannot be loaded: {error}") from error
        raise missing_extra("tensorrt", "tensorrt", purpose) from error
    found = version_numbers(tensorrt.__version__)
    if found[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise InputError(f"{purpose} needs TensorRT {oldest} or newer; {tensorrt.__version__} is installed")
    return tensorrt


def version_numbers(version: str) -> tuple[int, ...]:
    """`"10.16.1.11"` as `(10, 16, 1, 11)`; what follows the last number is ignored."""
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if digits:
            numbers.append(int(digits[:9]))  # of a manifest's there may be thousands
        if digits != part:
            break
    return tuple(numbers)


def check_version(built: str | None, installed: str) -> None:
    """Refuses a plan of another TensorRT before it is opened.

    A plan runs on the version that built it, up to the patch.

    Raises:
        InputError: one line with what the plan needs, what is there and what to do.
    """
    needs = version_numbers(built or "")
    if not needs or version_numbers(installed)[:3] != needs[:3]:
        version = one_line(built, 40) if needs else "of unknown version"
        raise InputError(
            f"the plan was built with TensorRT {version}; {installed} is installed; "
            "install that version, or export it again on this machine: lavin-rt export tensorrt"
        )


def make_logger(trt: ModuleType) -> Any:
    """A TensorRT logger that keeps warnings and errors in `.lines` and prints nothing; `.why` is the last error."""

    base: Any = trt.ILogger

    class Logger(base):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity, message):
            kept = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING)
            if severity in kept:
                self.lines.append((severity.name.lower(), one_line(message)))

        @property
        def errors(self) -> list[str]:
            return [message for severity, message in self.lines if severity.endswith("error")]

        @property
        def why(self) -> str:
            return (self.errors or ["TensorRT gave no reason"])[-1]

    return Logger()


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Notes interrupts, TERM and HUP that come during a call into TensorRT, and lets them do what they would have when
    the block ends.

    TensorRT calls back, its logger and its monitor; Python raises what a signal's handler raises as they are entered,
    and C++ drops it.
    """
    noted: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, *SIGNALS)}
        before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if noted:
            before[noted[0]](noted[0], None)


def create(kind: Callable[[Any], Any], logger: Any) -> Any:
    """A builder or a runtime, the first thing that needs a GPU and a driver.

    Raises:
        RuntimeError: TensorRT cannot start on this machine, with what it logged.
    """
    try:
        with signals_noted():
            return kind(logger)
    except (TypeError, RuntimeError) as error:
        raise RuntimeError(f"TensorRT cannot start: {(logger.errors or [str(error)])[-1]}") from error
