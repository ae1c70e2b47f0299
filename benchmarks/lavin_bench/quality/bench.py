"""`lavin-rt bench quality`: how well a pipeline does lavin-mini's tasks on held-out scenes.

Every task's figures stand beside three yardsticks: copying the query, the mean of the context's targets, and the
ceiling of the VAE, the target encoded and decoded. Then whether it is the context that decides: the same queries with
other tasks' pairs, pairs with other pairs' targets, and one, two or four pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lavin_bench.quality.answers import Answers, Sampling
from lavin_bench.quality.queries import TaskQueries, alike, draw
from lavin_bench.quality.report import clear, summary, task_line
from lavin_bench.quality.sheet import context_sheet, tasks_sheet
from lavin_bench.report import write_record
from lavin_bench.timing import header, header_line, use_threads
from lavin_rt.devices import current_device
from lavin_rt.dit.model import JDiT
from lavin_rt.errors import InputError
from lavin_rt.files import written_whole
from lavin_rt.mini.world.measures import MEASURES, measure
from lavin_rt.mini.world.tasks import TASKS, find_task
from lavin_rt.pictures.images import check_writable
from lavin_rt.pipeline import Pipeline

PAIRS = (1, 2, 4)
PATCH = 16  # pixels a side of what one token of the transformer stands for
YARDSTICKS = ("copy", "mean")  # the simple ones, which a model should beat

Figures = dict[str, np.ndarray]
"""A task's measures by name, the deciding one first, and "fidelity" (PSNR, dB), each `[N]`, one value a query."""


@dataclasses.dataclass(frozen=True, eq=False)
class Answered:
    """What one pipeline made of one task.

    Attributes:
        asked: queries and contexts.
        results: by number of pairs, uint8 `[N, T, S, S, 3]`.
        shuffled: with shuffled targets, of the most pairs; None of clips.
        ceilings: targets encoded and decoded.
    """

    asked: TaskQueries
    results: dict[int, np.ndarray]
    shuffled: np.ndarray | None
    ceilings: np.ndarray


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


def task_record(answered: Answered, exact: Answered | None = None) -> tuple[dict[str, Any], dict[str, Figures]]:
    """One task's part of the record, and the figures of its results and of its shuffled ones."""
    asked, name = answered.asked, answered.asked.task.name
    deciding = MEASURES[asked.task.measure][0]
    most = max(answered.results)
    found = {str(pairs): figures(asked, results) for pairs, results in answered.results.items()}
    copies, ceilings = figures(asked, asked.queries), figures(asked, answered.ceilings)
    record: dict[str, Any] = {
        "task": name,
        "trained": asked.task.trained,
        "members": [member.name for member in asked.members] if asked.task.family else [],
        "held_out": asked.held_out,
        "measures": [dataclasses.asdict(m) for m in MEASURES[asked.task.measure]],
        "queries": len(asked),
        "scenes": asked.scenes,
        "blocks": {"model": border_steps(answered.results[most]), "target": border_steps(asked.targets)},
        "copy": means(copies),
        "ceiling": means(ceilings),
        "pairs": [],
    }
    for pairs in answered.results:
        row: dict[str, Any] = {"pairs": pairs}
        context_means = figures(asked, asked.context_means(pairs))
        row["model"], row["mean"] = means(found[str(pairs)]), means(context_means)
        yardsticks = zip(YARDSTICKS, (copies, context_means), strict=True)
        row["better_than"] = {kind: better(name, found[str(pairs)], of_kind) for kind, of_kind in yardsticks}
        row["clear"] = all(clear(of_kind[deciding.name]) for of_kind in row["better_than"].values())
        if exact is not None:
            of_exact = figures(asked, exact.results[pairs])
            row["exact"] = means(of_exact)
            row["better_than_exact"] = better(name, found[str(pairs)], of_exact)
        record["pairs"].append(row)
    record["clear"] = record["pairs"][-1]["clear"]
    fewest = min(answered.results)
    if most > fewest:
        record["more_pairs"] = better(name, found[str(most)], found[str(fewest)])
    if answered.shuffled is not None:
        found["shuffled"] = figures(asked, answered.shuffled)
        record["shuffled"] = {"model": means(found["shuffled"])}
        record["shuffled"]["better_than_right"] = better(name, found["shuffled"], found[str(most)])
    return record, found


def context_record(answered: Sequence[Answered]) -> dict[str, Any] | None:
    """The same scenes under several tasks' contexts: which task's target the result is nearest to, by the mean squared
    error of pixels; `matrix[i][j]` counts the results of task i's context that are nearest to task j's target.

    None with fewer than two such tasks.
    """
    group = {one.task.name for one in alike([one.asked for one in answered])}
    members = [one for one in answered if one.asked.task.name in group]
    if len(members) < 2:
        return None
    scenes, names = members[0].asked.scenes, [one.asked.task.name for one in members]
    targets = np.stack([one.asked.targets[:scenes] for one in members]) / 255.0  # [tasks, scenes, 1, S, S, 3]

    def nearest(results: list[np.ndarray]) -> np.ndarray:
        """The task `[tasks of the context, scenes]` whose target every result is nearest to."""
        pictures = np.stack([of_task[:scenes] for of_task in results]) / 255.0
        return np.stack([np.square(pictures - target).mean((2, 3, 4, 5)) for target in targets]).argmin(0)

    def right(found: np.ndarray) -> list[float]:
        return interval((found == np.arange(len(members))[:, None]).mean(0))

    by_pairs = {pairs: nearest([one.results[pairs] for one in members]) for pairs in members[0].results}
    most = max(by_pairs)
    return {
        "tasks": names,
        "scenes": scenes,
        "distance": "mean squared error of pixels",
        "chance": round(1 / len(names), 6),
        "nearest_to_right": {str(pairs): right(found) for pairs, found in by_pairs.items()},
        "means_nearest_to_right": right(nearest([one.asked.context_means(most) for one in members])),
        "matrix": [np.bincount(row, minlength=len(members)).tolist() for row in by_pairs[most]],
    }


def across_tasks(records: Sequence[dict[str, Any]], found: Sequence[dict[str, Figures]]) -> dict[str, Any]:
    """PSNR of results against targets, the mean over the tasks of pictures that lavin-mini was trained on (over all if
    there are none), members of families that it was not trained on left out, scene by scene: by number of pairs, and
    with shuffled targets.
    """
    both = list(zip(records, found, strict=True))
    trained = [one for one in both if one[0]["trained"] and not one[0]["held_out"]]
    chosen = [one for one in trained if not TASKS[one[0]["task"]].is_clip] or both
    scenes = min(record["scenes"] for record, _ in chosen)

    def of(key: str) -> np.ndarray:
        return np.mean([figures_of[key]["fidelity"][:scenes] for _, figures_of in chosen], axis=0)

    counts = [str(row["pairs"]) for row in records[0]["pairs"]]
    curve = {count: interval(of(count)) for count in counts}
    record: dict[str, Any] = {"tasks": len(chosen), "scenes": scenes, "psnr": curve}
    if len(counts) > 1:
        record["more_pairs"] = interval(of(counts[-1]) - of(counts[0]))
    if all("shuffled" in figures_of for _, figures_of in chosen):
        record["shuffled"] = interval(of("shuffled"))
        record["shuffled_minus_right"] = interval(of("shuffled") - of(counts[-1]))
    return record


def samplings(asked: TaskQueries, pairs: Sequence[int]) -> int:
    """How often each query is answered: once for every number of pairs, and pictures with shuffled targets."""
    return len(pairs) + (not asked.task.is_clip)


def answer(
    pipe: Pipeline, asked: TaskQueries, pairs: Sequence[int], sampling: Sampling, progress: Callable[[int], object]
) -> Answered:
    """All answers of one pipeline to one task.

    Raises:
        InputError: a shape that the pipeline cannot run, such as clips of an artifact that was exported without.
    """
    answers = Answers(pipe, asked, sampling)
    results = {count: answers.results(count, progress=progress) for count in pairs}
    shuffled = answers.results(max(pairs), True, progress) if samplings(asked, pairs) > len(pairs) else None
    return Answered(asked, results, shuffled, answers.ceilings())


def run(
    pipe: Pipeline,
    drawn: Sequence[TaskQueries],
    pairs: Sequence[int],
    sampling: Sampling,
    exact: Pipeline | None = None,
    show: bool = True,
) -> tuple[dict[str, Any], list[Answered]]:
    """Answers and measures everything.

    Args:
        pipe: what is measured.
        drawn: of `quality_queries.draw`, with contexts of `max(pairs)`.
        pairs: how many in a context, ascending.
        sampling: how queries are answered.
        exact: what `pipe` is held against, on the same queries, contexts and noise.
        show: print as it goes.

    Returns:
        The record that `report` reads, and the answers, for sheets.

    Raises:
        InputError: the pipeline can run none of the tasks.
    """
    began = time.perf_counter()
    record: dict[str, Any] = {
        "kind": "quality",
        "header": {**header(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch.")},
        "checkpoint": pipe.source,
        "impl": pipe.impl,
        "size": drawn[0].queries.shape[2],
        **dataclasses.asdict(sampling),
        "tasks": [],
        "skipped": [],
    }
    if exact is not None:
        record["exact"] = {
            "checkpoint": exact.source,
            "impl": exact.impl,
            "dtype": str(exact.dtype).removeprefix("torch."),
        }
    answered, found = [], []
    total = sum(len(asked) * samplings(asked, pairs) for asked in drawn) * (1 if exact is None else 2)
    with tqdm(total=total, unit="query", disable=None if show else True, file=sys.stderr) as bar:
        for asked in drawn:
            bar.set_description(asked.name)
            try:
                mine = answer(pipe, asked, pairs, sampling, bar.update)
                theirs = None if exact is None else answer(exact, asked, pairs, sampling, bar.update)
            except InputError as error:
                record["skipped"].append({"task": asked.name, "reason": str(error)})
                if show:
                    bar.write(f"{asked.name}: skipped, {error}", file=sys.stdout)
                continue
            answered.append(mine)
            of_task, of_figures = task_record(mine, theirs)
            record["tasks"].append(of_task)
            found.append(of_figures)
            if show:
                bar.write(task_line(of_task), file=sys.stdout)
    if not answered:
        raise InputError(f"no task could be run; {record['skipped'][0]['task']}: {record['skipped'][0]['reason']}")
    record["context"] = context_record(answered)
    record["across_tasks"] = across_tasks(record["tasks"], found)
    record["seconds"] = round(time.perf_counter() - began, 1)
    return record, answered


def bench_quality(options: argparse.Namespace) -> None:
    """Runs the command."""
    from lavin_bench.quality.speeds import bench_own_pairs, bench_speeds  # which build on this module

    if options.task:
        bench_own_pairs(options)
        return
    pairs = sorted(set(options.pairs or ((2,) if options.quick else PAIRS)))
    scenes = (4 if options.quick else 64) if options.scenes is None else options.scenes
    for name, value, least in (("scenes", scenes, 2), ("pairs", pairs[0], 1), ("batch-size", options.batch_size, 1)):
        if value < least:
            raise InputError(f"--{name} is {value}; expected at least {least}")
    if pairs[-1] > 8:
        raise InputError(f"--pairs is {pairs[-1]}; expected at most 8")
    if options.output:
        check_writable(options.output)
    use_threads(options.threads)
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}; expected a whole number from 0 on")
    tasks = [find_task(name) for name in options.tasks or TASKS]

    def load(checkpoint: str | None, **settled: Any) -> Pipeline:
        revision = options.revision if checkpoint == options.checkpoint else None
        given = {"device": options.device, "revision": revision, "strict": options.strict}
        return Pipeline.from_pretrained(checkpoint, **given, trust=options.trust, **settled)

    pipe, exact = load(options.checkpoint, dtype=options.dtype, impl=options.impl, compile=options.compile), None
    if options.against is not None:
        if not options.against and not isinstance(pipe.dit, JDiT):
            raise InputError(f"{pipe.source} is an artifact; say what to hold it against: --against CHECKPOINT")
        exact = load(options.against or options.checkpoint, dtype="float32")
    size = pipe.size if options.size is None else options.size
    if size < 16 or size % 16:
        raise InputError(f"--size is {size}; expected a positive multiple of 16")
    sampling = Sampling(options.steps, options.guidance, options.seed, options.batch_size)
    print(header_line({**header(pipe.device), "checkpoint": pipe.source, "impl": pipe.impl}), flush=True)
    drawn = draw(size, scenes, pairs[-1], tasks, options.seed)
    if options.speed:
        bench_speeds(options, pipe, drawn, pairs[-1], sampling)
        return
    with torch.no_grad(), current_device(pipe.device):
        record, answered = run(pipe, drawn, pairs, sampling, exact)
    print("\n".join(summary(record)))
    if options.output:
        path = Path(options.output)
        write_record(path, record)
        for suffix, sheet in (("", tasks_sheet(answered)), ("-context", context_sheet(answered))):
            if sheet is not None:
                with written_whole(path.with_name(f"{path.stem}{suffix}.png")) as partial:
                    sheet.save(partial, "PNG", optimize=True)
