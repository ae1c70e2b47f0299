"""The names of speeds, where the pipeline at hand has any.

A pipeline whose tasks take `speed` is handed the name; any other has one speed, `exact`, and refuses the rest.
"""

from __future__ import annotations

import inspect

from lavin_rt.task import Task

EXACT = "exact"
NAMES = (EXACT, "near", "fast", "fastest")


def accepted() -> bool:
    """Whether a task's run takes a speed."""
    return "speed" in inspect.signature(Task.run).parameters


def speeds() -> tuple[str, ...]:
    """The speeds that can be asked for here."""
    return NAMES if accepted() else (EXACT,)


def options(speed: str) -> dict[str, str]:
    """The keyword arguments that make a task run at a speed."""
    return {"speed": speed} if accepted() else {}
