"""Looks for speeds: `python -m lavin_bench.quality.speed_search -o FILE.json`.

Grids of 3 to 10 evaluations with sets of refreshed contexts and of null branches, judged on scenes of the training
split alone, so that `lavin-rt bench quality --speed` can say on held-out ones what the choice is worth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lavin_bench.programs import at_least, program
from lavin_bench.quality.answers import Sampling
from lavin_bench.quality.queries import draw
from lavin_bench.quality.speeds import ONE_TO_MANY, run_speeds
from lavin_bench.record import write_record
from lavin_bench.timing import use_threads
from lavin_rt.mini.world.tasks import TASKS, find_task
from lavin_rt.pictures.images import check_writable
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.speeds import Speed

EVALUATIONS = (3, 4, 5, 6, 8, 10)


def candidates(evaluations: Sequence[int] = EVALUATIONS) -> Iterator[Speed]:
    """What is tried: every grid with a few spreads of both sets over it."""
    for count in evaluations:
        every = [frozenset(range(0, count, stride)) for stride in (2, 3)]
        early = [frozenset(range(min(many, count))) for many in (1, 2, 3)]
        sets = list(dict.fromkeys([None, *every, *early]))
        for refresh in (None, "task", *dict.fromkeys([*early[:1], *every[:1]])):
            for guided in sets:
                yield Speed(evaluations=count, refresh=refresh, guided=guided)


def ranked(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every speed, the least work first: FLOPs, the worst task's loss at the bad end and on average, the least PSNR to
    exact; over the tasks that have one right answer.
    """
    rows = []
    for index, speed in enumerate(record["speeds"][1:], 1):
        of_tasks = [task for task in record["tasks"] if task["task"] not in ONE_TO_MANY] or record["tasks"]
        mine = [(task, task["rows"][index]) for task in of_tasks]
        losses = {task["task"]: row["worst_loss"] for task, row in mine}
        means = [
            -row["better_than_exact"][task["deciding"]][0] / abs(task["rows"][0]["measures"][task["deciding"]])
            for task, row in mine
        ]
        worst = max(losses, key=losses.__getitem__)
        rows.append(
            {
                "speed": speed["speed"],
                "flops": mine[0][1]["flops"] / mine[0][0]["rows"][0]["flops"],
                "worst_loss": losses[worst],
                "worst_task": worst,
                "worst_mean_loss": max(means),
                "least_psnr": min(row["psnr_to_exact"] for _, row in mine),
            }
        )
    return sorted(rows, key=lambda row: row["flops"])


@program
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lavin_bench.quality.speed_search", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="folder, archive or hub id (default: lavin-mini)")
    parser.add_argument("--tasks", nargs="+", help="by their full names (default: those with one right answer)")
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", help="JSON of every speed and task")
    options = parser.parse_args(arguments)
    at_least(options, scenes=2, pairs=1)
    speeds = list(candidates(options.evaluations))
    if options.output:
        check_writable(options.output)
    use_threads(options.threads)
    tasks = [find_task(name) for name in options.tasks or (name for name in TASKS if name not in ONE_TO_MANY)]
    pipe = Pipeline.from_pretrained(options.checkpoint, device=options.device)
    drawn = draw(pipe.size, options.scenes, options.pairs, tasks, split="train")
    with torch.no_grad():
        record = run_speeds(pipe, drawn, options.pairs, Sampling(), speeds)
    record["ranked"] = ranked(record)
    for row in record["ranked"]:
        print(
            f"1/{1 / row['flops']:5.1f}  worst {row['worst_loss']:7.1%} ({row['worst_task']}), "
            f"mean {row['worst_mean_loss']:6.1%}, {row['least_psnr']:.1f} dB  {row['speed']}"
        )
    if options.output:
        write_record(options.output, record)


if __name__ == "__main__":
    sys.exit(main())
