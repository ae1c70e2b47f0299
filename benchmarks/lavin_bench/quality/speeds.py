"""`lavin-rt bench quality --speed ...`: what every speed costs, and what it loses, task by task.

The same queries, contexts and noise at speed `exact` and at every other one. Beside the task's own measures, with the
95 % interval of the paired difference, stand the distance to the exact answer and the work.
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

from lavin_bench.pipeline.flops import speed_flops
from lavin_bench.quality.answers import Answers, Sampling, new_record
from lavin_bench.quality.figures import Figures, better, fidelity, figures, interval, means
from lavin_bench.quality.queries import TaskQueries
from lavin_bench.quality.report import clear
from lavin_bench.quality.speeds_report import BOUNDS, LEAST_PSNR, front, summary
from lavin_bench.record import write_record
from lavin_bench.timing import use_threads
from lavin_rt.console import loading_options
from lavin_rt.devices import current_device
from lavin_rt.errors import InputError
from lavin_rt.files import written_whole
from lavin_rt.mini.world.measures import MEASURES
from lavin_rt.pictures import context as contexts
from lavin_rt.pictures.images import check_writable, latent_frames, load_clip, resize
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.speeds import SPEEDS, Speed
from lavin_rt.task import task_shape

# One query has many right answers: the measure against the one target says little about a speed, so that these are
# listed apart and no bound is asked of them.
ONE_TO_MANY = ("inpainting", "colorization", "image_from_depth", "image_from_normals", "frame_prediction")


def speed_row(
    asked: TaskQueries, speed: Speed, results: np.ndarray, exact: np.ndarray, exact_figures: Figures
) -> dict[str, Any]:
    """What a speed's results are worth beside the exact ones.

    Args:
        asked: the task's queries.
        speed: that they were answered at.
        results, exact: answers at the speed and at `exact`, uint8 `[N, T, S, S, 3]`.
        exact_figures: of the exact answers.
    """
    found, task = figures(asked, results), asked.task
    deciding = MEASURES[task.measure][0].name
    differences = better(task.name, found, exact_figures)
    mean, half = differences[deciding]
    to_exact = [fidelity(*pair) for pair in zip(results, exact, strict=True)]
    # By how much it may be worse, at the bad end of the interval, as a share of the exact measure.
    worst = max(half - mean, 0.0) / max(abs(float(exact_figures[deciding].mean())), 1e-9)
    row: dict[str, Any] = {
        "speed": speed.name,
        "measures": means(found),
        "better_than_exact": differences,
        "worst_loss": round(worst, 6),
        "psnr_to_exact": round(float(np.median(to_exact)), 3),
    }
    bound, least = BOUNDS.get(speed.name), LEAST_PSNR.get(speed.name, -np.inf)
    if bound is not None and task.name not in ONE_TO_MANY:
        row["within"] = worst <= bound and row["psnr_to_exact"] >= least
    return row


def run_speeds(
    pipe: Pipeline,
    drawn: Sequence[TaskQueries],
    pairs: int,
    sampling: Sampling,
    speeds: Sequence[str | Speed],
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Answers all queries at `exact` and at every speed; returns the record that `report` reads.

    Args:
        pipe: what is measured.
        drawn: of `quality_queries.draw`, with contexts of `pairs`.
        pairs: in every context.
        sampling: how queries are answered.
        speeds: names or speeds besides `exact`.
        save: called with the record after every task, so that a run that is ended keeps what it has.

    Raises:
        InputError: a speed that the pipeline has not, or no task that it can run.
    """
    began, chosen = time.perf_counter(), [pipe.speed(speed) for speed in ("exact", *speeds)]
    record: dict[str, Any] = {
        **new_record("quality_speeds", pipe),
        "size": drawn[0].queries.shape[2],
        "pairs": pairs,
        **dataclasses.asdict(sampling),
        "speeds": [],
        "tasks": [],
        "skipped": [],
    }
    steps = sampling.steps
    for speed in chosen:
        knots = speed.knots(None if speed.owns_grid else steps)
        row = {"speed": speed.name, "evaluations": len(knots) - 1, "times": [round(time, 6) for time in knots.tolist()]}
        record["speeds"].append(row)
    with tqdm(total=sum(map(len, drawn)) * len(chosen), unit="query", disable=None, file=sys.stderr) as bar:
        for asked in drawn:
            bar.set_description(asked.task.name)
            try:
                of_task = _task(pipe, asked, pairs, sampling, chosen, bar)
            except InputError as error:
                record["skipped"].append({"task": asked.name, "reason": str(error)})
                if record["tasks"]:
                    save(record)
                continue
            record["tasks"].append(of_task)
            record["seconds"] = round(time.perf_counter() - began, 1)
            bar.write("\n".join(task_lines(of_task)), file=sys.stdout)
            save(record)
    if not record["tasks"]:
        raise InputError(f"no task could be run; {record['skipped'][0]['task']}: {record['skipped'][0]['reason']}")
    return record


def _task(
    pipe: Pipeline, asked: TaskQueries, pairs: int, sampling: Sampling, speeds: Sequence[Speed], bar: tqdm
) -> dict[str, Any]:
    answers, exact, exact_figures = Answers(pipe, asked, sampling), None, None
    deciding = MEASURES[asked.task.measure][0]
    record: dict[str, Any] = {
        "task": asked.name,
        "clear": False,
        "one_to_many": asked.task.name in ONE_TO_MANY,
        "measures": [dataclasses.asdict(measure) for measure in MEASURES[asked.task.measure]],
        "deciding": deciding.name,
        "queries": len(asked),
        "rows": [],
    }
    frames = latent_frames(asked.queries.shape[1])
    for speed in speeds:
        results = answers.results(pairs, progress=bar.update, speed=speed)
        row: dict[str, Any]
        if exact is None or exact_figures is None:
            exact, exact_figures = results, figures(asked, results)
            simple = (figures(asked, one) for one in (asked.queries, asked.context_means(pairs)))
            record["clear"] = all(clear(better(asked.task.name, exact_figures, one)[deciding.name]) for one in simple)
            row = {"speed": speed.name, "measures": means(exact_figures)}
        else:
            row = speed_row(asked, speed, results, exact, exact_figures)
        knots = speed.knots(None if speed.owns_grid else sampling.steps)
        shape = task_shape(1, pairs, frames, asked.queries.shape[2:4], sampling.guidance != 1.0, speed.keeps)
        row["flops"] = speed_flops(pipe.network.config, shape, speed, len(knots) - 1)
        row["seconds"] = round(answers.seconds / len(asked), 6)
        record["rows"].append(row)
    return record


def task_lines(task: dict[str, Any]) -> list[str]:
    """A line for every speed of a task: the deciding measure, its difference to exact, and the work."""
    exact, name = task["rows"][0], task["deciding"]
    lines = []
    for row in task["rows"]:
        text = f"{task['task']:24}{row['speed']:9}{name} {row['measures'][name]:.4f}"
        if row is not exact:
            mean, half = row["better_than_exact"][name]
            text += f" ({mean:+.4f} ± {half:.4f}, at worst {row['worst_loss']:.1%} worse), "
            text += f"{row['psnr_to_exact']:.1f} dB to exact"
            text += {True: "", False: ", OUTSIDE ITS BOUND", None: ", one to many" if task["one_to_many"] else ""}[
                row.get("within")
            ]
        work = exact["flops"] / row["flops"], exact["seconds"] / row["seconds"]
        lines.append(
            f"{text}; {row['flops'] / 1e12:.3g} TFLOP, 1/{work[0]:.1f}; {row['seconds']:.3f} s, {work[1]:.1f}x"
        )
    return lines


def known_speeds(names: Sequence[str]) -> list[str]:
    """The speeds that a command line names, without `exact`, which always runs.

    Raises:
        InputError: a name that is none.
    """
    for name in names:
        if name not in SPEEDS:
            raise InputError(f"--speed has {name!r}; expected some of {', '.join(SPEEDS)}")
    return [name for name in dict.fromkeys(names) if name != "exact"]


def bench_speeds(
    options: argparse.Namespace, pipe: Pipeline, drawn: Sequence[TaskQueries], pairs: int, sampling: Sampling
) -> None:
    """`--speed` of the command, on lavin-mini's tasks."""

    def save(record: dict[str, Any]) -> None:
        if options.output:
            write_record(options.output, record)
            with written_whole(Path(options.output).with_suffix(".svg")) as partial:
                partial.write_text(front(record))

    with torch.no_grad(), current_device(pipe.device):
        record = run_speeds(pipe, drawn, pairs, sampling, known_speeds(options.speed), save)
    print("\n".join(summary(record)))


def bench_own_pairs(options: argparse.Namespace) -> None:
    """`--task DIR --speed ...`: leave-one-out over a folder's pairs, every speed's answer held against exact's."""
    if not options.speed:
        raise InputError("--task needs --speed: what to hold against exact, such as --speed near fast fastest")
    names = known_speeds(options.speed)
    if options.output:
        check_writable(options.output)
    use_threads(options.threads)
    pipe = Pipeline.from_pretrained(options.checkpoint, **loading_options(options))
    found = contexts.read_template(contexts.find_task(options.task, pipe.template_roots))
    if len(found) < 2:
        raise InputError(
            f"{options.task} has {len(found)} pair; expected at least 2, as one is the query of the others"
        )
    record = own_pairs_record(pipe, found, names, max(options.pairs or (4,)), options)
    for row in record["rows"]:
        print(own_line(row))
    if options.output:
        write_record(options.output, record)


def own_pairs_record(
    pipe: Pipeline, found: Sequence[contexts.Pair], speeds: Sequence[str], pairs: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Every pair answered from others of its folder: PSNR to its target and to the exact answer, and seconds."""
    rows: dict[str, list[list[float]]] = {speed: [] for speed in ("exact", *speeds)}
    for index, pair in enumerate(tqdm(found, unit="query", disable=None, file=sys.stderr)):
        others = [
            (one.input, one.target)
            for one in contexts.choose_pairs(
                [other for other in found if other is not pair], min(pairs, len(found) - 1), options.seed
            )
        ]
        task = pipe.task(others, size=options.size)
        target, exact = resize(load_clip(pair.target), task.size).numpy(), None
        for speed, of_speed in rows.items():
            steps = options.steps if not pipe.speed(speed).owns_grid else None
            task.prepare(1, steps, options.guidance, speed)
            began = time.perf_counter()
            [result] = task.run([pair.input], steps, options.guidance, options.seed + index, speed=speed)
            seconds, answer = time.perf_counter() - began, result.frames.numpy()
            exact = answer if exact is None else exact
            of_speed.append([fidelity(answer, target), fidelity(answer, exact), seconds])
    record: dict[str, Any] = {
        **new_record("own_pairs", pipe),
        "task": str(options.task),
        "queries": len(found),
        "pairs": len(others),
        "size": list(task.size),
        "steps": options.steps,
        "guidance": options.guidance,
        "seed": options.seed,
        "rows": [],
    }
    of_exact = np.array(rows["exact"])
    for speed, values in rows.items():
        table = np.array(values)
        row: dict[str, Any] = {"speed": speed, "psnr": round(float(table[:, 0].mean()), 3)}
        row["seconds"] = round(float(np.median(table[:, 2])), 4)
        if speed != "exact":
            row["better_than_exact"] = interval(table[:, 0] - of_exact[:, 0])
            row["psnr_to_exact"] = round(float(np.median(table[:, 1])), 3)
        record["rows"].append(row)
    return record


def own_line(row: dict[str, Any]) -> str:
    """A speed's line: PSNR to the targets, its difference to exact, PSNR to exact's answers, seconds."""
    text = f"{row['speed']:9}PSNR to the targets {row['psnr']:.2f} dB"
    if "better_than_exact" in row:
        mean, half = row["better_than_exact"]
        text += f" ({mean:+.2f} ± {half:.2f}), to exact's answers {row['psnr_to_exact']:.1f} dB"
    return f"{text}; {row['seconds']:.3f} s a query"
