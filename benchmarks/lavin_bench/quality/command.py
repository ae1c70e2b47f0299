"""`lavin-rt bench quality`: what was asked for is checked, drawn, run, and written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from lavin_bench.quality.answers import Sampling
from lavin_bench.quality.bench import PAIRS, run
from lavin_bench.quality.queries import draw
from lavin_bench.quality.report import summary
from lavin_bench.quality.sheet import context_sheet, tasks_sheet
from lavin_bench.quality.speeds import bench_own_pairs, bench_speeds
from lavin_bench.record import write_record
from lavin_bench.timing import header, header_line, use_threads
from lavin_rt.artifact.load import ArtifactNetwork
from lavin_rt.console import loading_options
from lavin_rt.devices import current_device
from lavin_rt.errors import InputError
from lavin_rt.files import written_whole
from lavin_rt.mini.world.tasks import TASKS, find_task
from lavin_rt.pictures.images import check_writable
from lavin_rt.pipeline import Pipeline


def bench_quality(options: argparse.Namespace) -> None:
    """Runs the command."""
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
    if options.speed and options.against is not None:
        raise InputError("--speed holds the speeds against exact of one checkpoint; give --speed or --against")
    tasks = [find_task(name) for name in options.tasks or TASKS]

    given = loading_options(options)
    pipe, exact = Pipeline.from_pretrained(options.checkpoint, **given), None
    if options.against is not None:
        if not options.against and isinstance(pipe.network, ArtifactNetwork):
            raise InputError(f"{pipe.source} is an artifact; say what to hold it against: --against CHECKPOINT")
        given |= {"dtype": "float32", "impl": "auto", "compile": False}
        if options.against not in ("", options.checkpoint):
            given["revision"] = None
        exact = Pipeline.from_pretrained(options.against or options.checkpoint, **given)
    size = pipe.size if options.size is None else options.size
    if size < 16 or size % 16:
        raise InputError(f"--size is {size}; expected a positive multiple of 16")
    sampling = Sampling(options.steps, options.guidance, options.seed, options.batch_size)
    print(header_line({**header(pipe.device), "checkpoint": pipe.source, "impl": pipe.impl}), flush=True)
    drawn = draw(size, scenes, pairs[-1], tasks, options.seed)
    if options.speed:
        bench_speeds(options, pipe, drawn, pairs[-1], sampling)
        return

    def save(record: dict[str, Any]) -> None:
        if options.output:
            write_record(options.output, record)

    with torch.no_grad(), current_device(pipe.device):
        record, answered = run(pipe, drawn, pairs, sampling, exact, save=save)
    print("\n".join(summary(record)))
    if options.output:
        path = Path(options.output)
        for suffix, sheet in (("", tasks_sheet(answered)), ("-context", context_sheet(answered))):
            if sheet is not None:
                with written_whole(path.with_name(f"{path.stem}{suffix}.png")) as partial:
                    sheet.save(partial, "PNG", optimize=True)
