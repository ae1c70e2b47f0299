"""Named speeds: fewer evaluations, a context whose keys and values are kept, and guidance that is held.

`exact` is the published sampler. Every other speed changes the answer by more than rounding, which is why it has a
name: nothing runs in one unless it was asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Set
from typing import TYPE_CHECKING, Any

from lavin_rt.errors import InputError
from lavin_rt.scalars import whole

if TYPE_CHECKING:
    import torch

    from lavin_rt.dit.layout import Form, Shape

STEPS = 20
TASK = "task"
MOST_EVALUATIONS = 1000
# The time at which a task's keys and values are made, over a query and a target of zeros. On training scenes of
# lavin-mini as it was on 2026-11-22 (16 to 18 queries) six evaluations with them lost, at the bad end of the interval:
# in depth 11 % at time 0, 2.6 % at 0.3 and 0.6, 4.3 % at 1; in negative 1.7 % at 0, 1.2 % at 0.5.
CONTEXT_TIME = 0.5


@dataclasses.dataclass(frozen=True)
class Speed:
    """How often the network is evaluated along a run, and how much of it each time.

    Sets hold indices of the grid's evaluations and have 0 in them; any iterable of whole numbers is taken.

    Attributes:
        evaluations: n evaluations on the uniform grid `linspace(0, 1, n + 1)`.
        times: the grid itself, increasing from 0 to 1. With neither, the published table for `steps` knots.
        refresh: in which evaluations the context (the pairs', in the null branch the zero frame's rows) is computed;
            in the others its keys and values are those of the last such evaluation at which its branch ran, while query
            and target are computed at the current time. `"task"`: the pairs' are made once per task and the zero
            frame's at evaluation 0. None computes the context in every evaluation.
        guided: in which evaluations the null branch runs; between, the difference of both branches' velocities is
            held: `v = v_cond + (guidance - 1) * d`. None runs it in every evaluation.

    Raises:
        InputError: a bad grid, or a set without 0 or beyond the grid.
    """

    evaluations: int | None = None
    times: tuple[float, ...] | None = None
    refresh: Set[int] | str | None = None
    guided: Set[int] | None = None

    def __post_init__(self):
        if self.times is not None:
            if self.evaluations is not None:
                raise InputError("a speed has evaluations and times; expected one of them, as either is the grid")
            object.__setattr__(self, "times", _grid(self.times))
        if self.evaluations is not None:
            evaluations = whole(self.evaluations)
            if evaluations is None or not 1 <= evaluations <= MOST_EVALUATIONS:
                raise InputError(
                    f"evaluations is {self.evaluations!r}; expected a whole number from 1 to {MOST_EVALUATIONS}"
                )
            object.__setattr__(self, "evaluations", evaluations)
        if not (isinstance(self.refresh, str) and self.refresh == TASK):
            object.__setattr__(self, "refresh", _indices("refresh", self.refresh, ', or "task"'))
        object.__setattr__(self, "guided", _indices("guided", self.guided))
        evaluations = self.evaluations if self.times is None else len(self.times) - 1
        if evaluations is not None:
            self._check_sets(evaluations)

    @property
    def owns_grid(self) -> bool:
        """Whether it has a grid of its own, which no `steps` may be given beside."""
        return self.evaluations is not None or self.times is not None

    @property
    def keeps(self) -> bool:
        """Whether keys and values of the context are kept."""
        return self.refresh is not None

    @property
    def name(self) -> str:
        """Its name among `SPEEDS`, or what it is."""
        for name, known in SPEEDS.items():
            if known == self:
                return name
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shown = {
            key: sorted(value) if isinstance(value, frozenset) else value
            for key, value in given.items()
            if value is not None
        }
        return f"Speed({', '.join(f'{key}={value!r}' for key, value in shown.items())})"

    def knots(self, steps: int | None = None) -> torch.Tensor:
        """The times of all evaluations and the end, `[evaluations + 1]` float32.

        Args:
            steps: knots of the published table, 20 by default; only for a speed without a grid of its own.

        Raises:
            InputError: steps beside a grid, a bad number of steps, or a set beyond the table's evaluations.
        """
        import torch

        from lavin_rt.sampling.schedule import schedule

        if not self.owns_grid:
            knots = schedule(STEPS if steps is None else steps)
            self._check_sets(len(knots) - 1)
            return knots
        if steps is not None:
            raise InputError(f"speed {self.name} has a grid of its own, steps is {steps!r}; leave one of them out")
        if self.times is not None:
            return torch.tensor(self.times, dtype=torch.float64).float()
        assert self.evaluations is not None  # or it would own no grid
        return torch.linspace(0, 1, self.evaluations + 1, dtype=torch.float64).float()

    def forms(self, shape: Shape, evaluations: int) -> list[Form]:
        """What every evaluation of a run computes; at guidance 1.0 (`shape.guided` False) the null branch never runs.

        Args:
            shape: of the run; `shape.kept` as `self.keeps`.
            evaluations: of the grid.
        """
        from lavin_rt.dit.layout import COMPUTED, REUSED, STORED, Form

        forms = []
        null: str | None
        for index in range(evaluations):
            if self.refresh is None:
                context = null = COMPUTED
            elif self.refresh == TASK:
                context, null = REUSED, STORED if index == 0 else REUSED
            else:
                context = null = STORED if index in self.refresh else REUSED
            if not shape.guided or (self.guided is not None and index not in self.guided):
                null = None
            forms.append(Form(context, null, held=shape.guided and self.guided is not None))
        return forms

    def _check_sets(self, evaluations: int) -> None:
        for name in ("refresh", "guided"):
            beyond = [] if getattr(self, name) in (None, TASK) else sorted(getattr(self, name))[-1:]
            if beyond and beyond[0] >= evaluations:
                raise InputError(
                    f"{name} has evaluation {beyond[0]}, the grid has {evaluations}: 0 to {evaluations - 1}; "
                    "take it out or give a longer grid"
                )


def speed_of(speed: str | Speed) -> Speed:
    """The speed that a name means.

    Raises:
        InputError: no such name, or neither a name nor a `Speed`.
    """
    if isinstance(speed, Speed):
        return speed
    if not isinstance(speed, str) or speed not in SPEEDS:
        raise InputError(f"speed is {speed!r}; expected one of {', '.join(SPEEDS)}, or a Speed")
    return SPEEDS[speed]


def _grid(times: Iterable[float]) -> tuple[float, ...]:
    try:
        grid = tuple(float(time) for time in times)
    except (TypeError, ValueError):
        raise InputError(f"times is {times!r}; expected numbers increasing from 0 to 1") from None
    rising = all(first < second for first, second in itertools.pairwise(grid))
    if len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or not rising or not all(map(math.isfinite, grid)):
        raise InputError(f"times is {_short(grid)}; expected numbers increasing from 0 to 1")
    if len(grid) > MOST_EVALUATIONS + 1:
        raise InputError(f"times has {len(grid)} numbers; expected at most {MOST_EVALUATIONS + 1}")
    return grid


def _indices(name: str, given: Iterable[Any] | None, others: str = "") -> frozenset[int] | None:
    if given is None:
        return None
    expected = f"expected a set of evaluations with 0 in it, such as {{0, 4}}{others}, or None"
    try:
        indices = [whole(index) for index in given]
    except TypeError:
        raise InputError(f"{name} is {given!r}; {expected}") from None
    if isinstance(given, str) or not all(index is not None and index >= 0 for index in indices) or 0 not in indices:
        raise InputError(f"{name} is {_short(given)}; {expected}")
    return frozenset(index for index in indices if index is not None)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# The published table of 20 knots without eight of those up to 0.0524, between which hardly anything moves.
SPARSE = (0, 0.0222, 0.05, 0.073, 0.1148, 0.1777, 0.2618, 0.3671, 0.4936, 0.6412, 0.81, 1)

SPEEDS = {
    "exact": Speed(),
    "near": Speed(times=SPARSE, refresh={0, 2, 4, 6, 8}),
    "fast": Speed(times=(0, 0.1, 0.3, 0.5, 0.75, 1), refresh={0, 2}, guided={0, 1, 2, 4}),
    "fastest": Speed(evaluations=4, refresh="task", guided={0, 1}),
}
