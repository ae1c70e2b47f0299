"""What is measured of a task's answers, and how differences are judged."""

from __future__ import annotations

import numpy as np
from scipy.special import stdtrit

from lavin_bench.quality.queries import TaskQueries
from lavin_rt.mini.world.measures import MEASURES, measure
from lavin_rt.mini.world.tasks import TASKS

PATCH = 16  # pixels a side of what one token of the transformer stands for
SMOOTH = ("depth_estimation", "normal_estimation")  # tasks whose results show borders of patches

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


def border_steps(pictures: np.ndarray) -> list[float] | None:
    """The mean absolute step across borders of the transformer's patches over that one pixel to either side, of uint8
    `[N, T, S, S, 3]`, and the half-width of its 95 % interval over the pictures (a ratio of means, by the delta
    method); None where there is no border or no step beside one.
    """
    across, beside = np.zeros((2, len(pictures)))
    for axis in (2, 3):
        steps = np.abs(np.diff(pictures.astype(np.int16), axis=axis))
        borders = np.arange(PATCH, pictures.shape[axis], PATCH) - 1  # step i is that from pixel i to the next
        across += _sums(steps.take(borders, axis=axis))
        beside += _sums(steps.take(np.concatenate([borders - 1, borders + 1]), axis=axis)) / 2
    if not beside.any():
        return None
    ratio, count = across.sum() / beside.sum(), max(len(pictures), 2)
    rest = np.square(across - ratio * beside).sum() * count / (count - 1)
    return [round(float(value), 4) for value in (ratio, quantile(count) * np.sqrt(rest) / beside.sum())]


def _sums(steps: np.ndarray) -> np.ndarray:
    return steps.reshape(len(steps), -1).sum(1, dtype=np.float64)


def quantile(count: int) -> float:
    """Half the width of a 95 % interval of a mean of `count` values, at least two, in standard errors: of Student's t,
    which is 1.6 times the normal distribution's at four values and a fiftieth more at 64.
    """
    return float(stdtrit(count - 1, 0.975))


def interval(differences: np.ndarray) -> list[float]:
    """The mean of paired differences and the half-width of its 95 % interval (Student's t)."""
    half = quantile(len(differences)) * differences.std(ddof=1) / np.sqrt(len(differences))
    return [round(float(value), 6) for value in (differences.mean(), half)]


def means(found: Figures) -> dict[str, float]:
    return {name: round(float(values.mean()), 6) for name, values in found.items()}


def better(task: str, a: Figures, b: Figures) -> dict[str, list[float]]:
    """By how much a is better than b, of every measure: mean and half-width."""
    of_task = {m.name: m.better for m in MEASURES[TASKS[task].measure]}
    return {name: interval(of_task[name](a[name], b[name])) for name in of_task}
