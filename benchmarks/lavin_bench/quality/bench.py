"""`lavin-rt bench quality`: how well a pipeline does lavin-mini's tasks on held-out scenes.

Every task's figures stand beside three yardsticks: copying the query, the mean of the context's targets, and the
ceiling of the VAE, the target encoded and decoded. Then whether it is the context that decides: the same queries with
other tasks' pairs, pairs with other pairs' targets, and one, two or four pairs.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from lavin_bench.quality.answers import Answered, Answers, Sampling, new_record
from lavin_bench.quality.figures import SMOOTH, Figures, better, border_steps, figures, interval, means
from lavin_bench.quality.queries import TaskQueries, alike
from lavin_bench.quality.report import clear, task_line
from lavin_rt.errors import InputError
from lavin_rt.mini.world.measures import MEASURES
from lavin_rt.mini.world.tasks import TASKS
from lavin_rt.pipeline import Pipeline

PAIRS = (1, 2, 4)
YARDSTICKS = ("copy", "mean")  # the simple ones, which a model should beat


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
        "copy": means(copies),
        "ceiling": means(ceilings),
        "pairs": [],
    }
    if name in SMOOTH:
        record["blocks"] = {"model": border_steps(answered.results[most]), "target": border_steps(asked.targets)}
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
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> tuple[dict[str, Any], list[Answered]]:
    """Answers and measures everything.

    Args:
        pipe: what is measured.
        drawn: of `quality_queries.draw`, with contexts of `max(pairs)`.
        pairs: how many in a context, ascending.
        sampling: how queries are answered.
        exact: what `pipe` is held against, on the same queries, contexts and noise.
        show: print as it goes.
        save: called with the record after every task, so that a run that is ended keeps what it has.

    Returns:
        The record that `report` reads, and the answers, for sheets.

    Raises:
        InputError: the pipeline can run none of the tasks.
    """
    began = time.perf_counter()
    record: dict[str, Any] = {
        **new_record("quality", pipe),
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
            record["context"] = context_record(answered)
            record["across_tasks"] = across_tasks(record["tasks"], found)
            record["seconds"] = round(time.perf_counter() - began, 1)
            save(record)
    if not answered:
        raise InputError(f"no task could be run; {record['skipped'][0]['task']}: {record['skipped'][0]['reason']}")
    return record, answered
