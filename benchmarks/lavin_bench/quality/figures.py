"""What is measured of a task's answers, and how differences are judged."""

from __future__ import annotations

import numpy as np

from lavin_bench.quality.queries import TaskQueries
from lavin_rt.mini.world.measures import MEASURES, measure
from lavin_rt.mini.world.tasks import TASKS

PATCH = 16  # pixels a side of what one token of the transformer stands for

Figures = dict[str, np.ndarray]
"""A task's measures by name, the deciding one first, and "fidelity" (PSNR, dB), each `[N]`, one value a query."""


def figures(asked: TaskQueries, results: np.ndarray) -> Figures:
    """The measures of every result."""
    still = slice(None) if asked.task.is_clip else 0
    pairs = list(zip(results, asked.targets, strict=True))
    rows = [measure(asked.task, result[still], target[still]) for result, target in pairs]
    found = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {**found, "fidelity": np.array([fidelity(*pair) for pair in pairs])}


def fidelity(result: np.ndarray, target: np.ndarray) -> float:
    """PSNR in dB of uint8 values, whatever the task, so that tasks can be averaged."""
    return float(-10 * np.log10(max(np.square(result / 255 - target / 255).mean(), 1e-10)))


def border_steps(pictures: np.ndarray) -> float | None:
    """The mean absolute step across borders of the transformer's patches over that one pixel to either side, of uint8
    `[N, T, S, S, 3]`; None where there is no border or no step beside one.
    """
    across, beside = [], []
    for axis in (2, 3):
        steps = np.abs(np.diff(pictures.astype(np.int16), axis=axis))
        borders = np.arange(PATCH, pictures.shape[axis], PATCH) - 1  # step i is that from pixel i to the next
        across.append(steps.take(borders, axis=axis).ravel())
        beside.append(steps.take(np.concatenate([borders - 1, borders + 1]), axis=axis).ravel())
    one, other = (np.concatenate(steps) for steps in (across, beside))
    return round(float(one.mean() / other.mean()), 4) if other.any() else None


def interval(differences: np.ndarray) -> list[float]:
    """The mean of paired differences and the half-width of its 95 % interval (normal)."""
    half = 1.96 * differences.std(ddof=1) / np.sqrt(len(differences))
    return [round(float(value), 6) for value in (differences.mean(), half)]


def means(found: Figures) -> dict[str, float]:
    return {name: round(float(values.mean()), 6) for name, values in found.items()}


def better(task: str, a: Figures, b: Figures) -> dict[str, list[float]]:
    """By how much a is better than b, of every measure: mean and half-width."""
    of_task = {m.name: m.better for m in MEASURES[TASKS[task].measure]}
    return {name: interval(of_task[name](a[name], b[name])) for name in of_task}
