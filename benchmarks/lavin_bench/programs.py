"""What the programs `python -m lavin_bench....` have in common: bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavin_rt.errors import InputError, one_line


def program(main: Callable[..., int | None]) -> Callable[..., int]:
    """A `main` that gives its exit code, and 2 for what it was given and cannot use."""

    @functools.wraps(main)
    def told(*arguments: Any) -> int:
        try:
            return main(*arguments) or 0
        except InputError as error:
            text = one_line(error)
        except OSError as error:
            text = f"{error.filename}: {error.strerror}" if error.filename else one_line(error)
        print(f"error: {text}", file=sys.stderr)
        return 2

    return told


def at_least(options: argparse.Namespace, **least: int) -> None:
    """Raises `InputError` for an option that is smaller than what is expected of it."""
    for name, value in least.items():
        if getattr(options, name) < value:
            raise InputError(f"--{name} is {getattr(options, name)}; expected at least {value}")


def multiple_of(options: argparse.Namespace, multiple: int) -> None:
    """Raises `InputError` for a `--size` that is no positive multiple."""
    if options.size < multiple or options.size % multiple:
        raise InputError(f"--size is {options.size}; expected a positive multiple of {multiple}")


def read_record(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        InputError: it holds no record.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); expected a record that a benchmark wrote") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}: a {type(record).__name__}; expected a record that a benchmark wrote")
    return record
