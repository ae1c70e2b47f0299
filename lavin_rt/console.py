"""What is told: records on stdout, progress on stderr, and to the log what the runtime does out of sight."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from lavin_rt.process import check_output_wanted

log = logging.getLogger("lavin_rt")  # captures, compilations, evictions and retries, at debug level


def loading_options(options: argparse.Namespace) -> dict[str, Any]:
    """What of a command line's options `Pipeline.from_pretrained` takes, the checkpoint aside."""
    names = ("device", "dtype", "impl", "compile", "revision", "strict", "trust")
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def print_json(record: dict) -> None:
    """A record on stdout."""
    check_output_wanted()
    print(json.dumps(record, indent=2))


class Progress:
    """Bars on stderr, shown where it is a terminal."""

    def __init__(self, quiet: bool):
        self.quiet = quiet

    def bar(self, what: str, unit: str) -> _Bar:
        return _Bar(what, unit, disable=True if self.quiet else None)


class _Bar:
    """A tqdm bar that is told where it stands: `bar(done, total)`."""

    def __init__(self, what: str, unit: str, disable: bool | None):
        from tqdm import tqdm

        self._bar = tqdm(desc=what, unit=unit, unit_scale=unit == "B", disable=disable, file=sys.stderr, leave=False)

    def __enter__(self) -> Callable[[float, int], None]:
        return self._update

    def _update(self, done: float, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
