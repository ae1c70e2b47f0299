"""The speeds that an artifact serves: their definitions in its manifest, and their tables in its modulation file.

An artifact says what its names of speeds mean, so that a reader with another meaning of one is not fooled.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from lavin_rt.artifact.parts import Record
from lavin_rt.artifact.sizes import shown
from lavin_rt.checkpoint.tensors import SafetensorsFile
from lavin_rt.dit.config import DiTConfig
from lavin_rt.errors import InputError
from lavin_rt.sampling.schedule import schedule
from lavin_rt.sampling.speeds import CONTEXT_TIME, MOST_EVALUATIONS, TASK, Speed, speed_of

EXACT = "exact"
# The table of the time at which a task's keys and values are made, which has the knots of one evaluation.
CONTEXT_TABLE, CONTEXT_KNOTS = "context", (CONTEXT_TIME, 1.0)

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_FIELDS = tuple(field.name for field in dataclasses.fields(Speed))


def named_speeds(speeds: Sequence[str] | Mapping[str, Speed]) -> dict[str, Speed]:
    """Speeds by name, `exact` first among them: those of `lavin_rt.sampling.speeds.SPEEDS`, or of names given here.

    Raises:
        InputError: no such speed, a name that none can have, or one whose meaning is fixed.
    """
    if isinstance(speeds, str):
        raise InputError(f"speeds is {speeds!r}; expected a list of names, such as ['fast']")
    chosen = dict(speeds) if isinstance(speeds, Mapping) else {name: speed_of(name) for name in speeds}
    for name, speed in chosen.items():
        _check_name(name)
        if not isinstance(speed, Speed):
            raise InputError(f"speed {name} is {shown(speed)}; expected a Speed")
    if chosen.get(EXACT, Speed()) != Speed():
        raise InputError(f"speed {EXACT} is {shown(chosen[EXACT])}, which is another one; give it a name of its own")
    return {EXACT: Speed(), **chosen}


def described(speed: Speed) -> Record:
    """A speed as plain values, of which `parsed_speeds` makes it again."""
    fields = {name: getattr(speed, name) for name in _FIELDS}
    return {
        name: sorted(value) if isinstance(value, frozenset) else list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
        if value is not None
    }


def parsed_speeds(values: object) -> dict[str, Speed]:
    """What a manifest has as "speeds", by name; `exact` alone where it has nothing, as those of the first version.

    Raises:
        InputError: no speeds, or one that contradicts itself.
    """
    speeds = {EXACT: Speed()}
    if values is None:
        return speeds
    if not isinstance(values, dict):
        raise InputError(f"speeds is {shown(values)}, expected dict")
    for name, fields in values.items():
        _check_name(name)
        if not isinstance(fields, dict) or not fields.keys() <= set(_FIELDS):
            raise InputError(f"speed {name} is {shown(fields)}, expected {', '.join(_FIELDS)}")
        for field, value in fields.items():
            _check_field(name, field, value)
        try:
            speeds[name] = Speed(**fields)
        except InputError as error:
            raise InputError(f"speed {name}: {error}") from None
    if speeds[EXACT] != Speed():
        raise InputError(f"speed {EXACT} is {shown(values[EXACT])}, expected {{}}")
    return speeds


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"a speed is named {shown(name)}; expected small letters, digits, - and _, 64 at most")


def _check_field(name: str, field: str, value: object) -> None:
    """Raises an `InputError` where a manifest's value is not of a field's type; `Speed` itself takes more."""
    if field == "evaluations":
        fits = type(value) is int
    elif field == "times":
        fits = isinstance(value, list) and all(type(time) in (int, float) and 0 <= time <= 1 for time in value)
    else:
        fits = isinstance(value, list) and all(type(index) is int and 0 <= index < MOST_EVALUATIONS for index in value)
        fits = fits or (field == "refresh" and value == TASK)
    if not fits:
        raise InputError(f"speed {name}: {field} is {shown(value)}, expected {_EXPECTED[field]}")


_EXPECTED = {
    "evaluations": "a whole number",
    "times": "a list of numbers from 0 to 1",
    "refresh": f'a list of whole numbers from 0 to {MOST_EVALUATIONS - 1}, or "{TASK}"',
    "guided": f"a list of whole numbers from 0 to {MOST_EVALUATIONS - 1}",
}


def tables(schedules: Sequence[int], speeds: Mapping[str, Speed]) -> dict[str, torch.Tensor]:
    """The knots of all tables in a modulation file, float32, by their names in it."""
    return {str(steps): schedule(steps) for steps in schedules} | _of_speeds(speeds)


def tables_of(count: int, schedules: Sequence[int], speeds: Mapping[str, Speed]) -> list[str]:
    """The names of the tables that have so many knots."""
    own = [name for name, knots in _of_speeds(speeds).items() if len(knots) == count]
    return [str(count)] * (count in schedules) + own


def _of_speeds(speeds: Mapping[str, Speed]) -> dict[str, torch.Tensor]:
    found = {f"speed.{name}": speed.knots() for name, speed in speeds.items() if speed.owns_grid}
    if any(speed.refresh == TASK for speed in speeds.values()):
        found[CONTEXT_TABLE] = torch.tensor(CONTEXT_KNOTS, dtype=torch.float32)
    return found


def read_table(path: Path, names: Iterable[str], config: DiTConfig, knots: torch.Tensor) -> dict[str, torch.Tensor]:
    """`blocks` `[n - 1, depth, 2, 4, D]` and `head_scale` `[n - 1, D]` float32 of knots `[n]`, from a modulation file.

    Args:
        path: the file.
        names: of tables that may have these knots.

    Raises:
        InputError: none has them, or a damaged file.
    """
    count = len(knots)
    shapes = {
        "blocks": (count - 1, config.depth, 2, 4, config.hidden_size),
        "head_scale": (count - 1, config.hidden_size),
    }
    file = SafetensorsFile.open(path)

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        entry = file.entries.get(name)
        if entry is None or entry.shape != shape or entry.dtype != "F32":
            raise InputError(f"{path}: {name} is {entry}, expected F32 {shape}; export it again")
        tensor = torch.empty(shape, dtype=torch.float32)
        reader.read_into(name, tensor)
        return tensor

    with file.reader() as reader:
        for table in names:
            if torch.equal(read(f"knots.{table}", (count,)), knots.cpu().float()):
                return {name: read(f"{name}.{table}", shape) for name, shape in shapes.items()}
    raise InputError(f"{path}: its {count} knots are not this package's; export the artifact again")
