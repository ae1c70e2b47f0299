"""`lavin-rt bench speeds`: the second query of a task at every named speed, by a model of the released widths.

Random weights, any number of the 22 blocks: what a speed spares is in the blocks, so that a few of them show it where
all of them take too long. Every call is timed whole, and of it the sampling, from the embedded context to latents;
speeds take turns. Before, a run that keeps keys and holds guidance is compared with the plain model's.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lavin_bench.ceilings import matmul_ceiling
from lavin_bench.pipeline.bench import AUTHORS_BOUND, STEPS, TOLERANCE
from lavin_bench.pipeline.flops import speed_flops
from lavin_bench.pipeline.variants import (
    CPU_VAE,
    GUIDANCE,
    QUICK_CONFIG,
    RELEASED,
    Setting,
    random_model,
    random_vae,
    task_pixels,
)
from lavin_bench.record import write_record
from lavin_bench.timing import Timing, header, header_line, in_turn, resident_bytes, use_threads
from lavin_rt.devices import current_device, resolve_device, resolve_dtype
from lavin_rt.errors import InputError
from lavin_rt.pictures.images import check_writable
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.executor import Executor
from lavin_rt.sampling.self_check import relative_error
from lavin_rt.sampling.speeds import SPEEDS, Speed
from lavin_rt.task import Task

# One evaluation that stores keys and values, and one that reuses them and holds guidance.
CHECKED = Speed(evaluations=2, refresh={0}, guided={0})


class _TimedExecutor(Executor):
    """One that keeps the seconds of its last sampling."""

    seconds = 0.0

    def sample(self, *arguments: Any, **options: Any) -> torch.Tensor:
        began = time.perf_counter()
        latents = super().sample(*arguments, **options)
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        self.seconds = time.perf_counter() - began
        return latents


def run(
    setting: Setting,
    device: torch.device,
    dtype: torch.dtype,
    speeds: Sequence[str],
    repeats: int,
    compile: bool = False,
) -> dict[str, Any]:
    """Measures speeds; the record that `report` reads.

    Raises:
        RuntimeError: the packed step's latents are not those of the plain model.
    """
    model = f"released widths, {setting.config.depth} blocks" if setting.config != QUICK_CONFIG else "a tiny model"
    record: dict[str, Any] = {
        "kind": "speeds",
        "header": {**header(device), "dtype": str(dtype).removeprefix("torch."), "repeats": repeats},
        "setting": f"{model}, {setting.name}{', compiled' if compile else ''}",
        "matmul_flops_per_second": matmul_ceiling(device, dtype)["flops_per_second"],
    }
    print(header_line(record["header"]), flush=True)
    dit, vae = random_model(setting.config, device, dtype), random_vae(setting.vae, device, dtype).to(dtype)
    context, _, query = task_pixels(setting)
    pipe = Pipeline(dit, vae, compile=compile)
    task = pipe.task(context, size=setting.size)
    plain = Pipeline(dit, vae, impl="plain").task(task.context)
    error = _error(task, plain, query)
    bound = TOLERANCE if dtype == torch.float32 else AUTHORS_BOUND
    if not error <= bound:
        raise RuntimeError(f"latents differ from the plain model's by {error:.1e}, allowed {bound:.1e}; nothing timed")
    record["relative_error"] = error
    timed = pipe.executor = _TimedExecutor(pipe.network, pipe.executor.graphs)

    del plain
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here on
    for speed in speeds:
        task.warmup(guidance=GUIDANCE, speed=speed)
    latents: dict[str, torch.Tensor] = {}
    samplings: dict[str, list[float]] = {speed: [] for speed in speeds}

    def call(speed: str) -> float:
        began = time.perf_counter()
        [result] = task.run([query], guidance=GUIDANCE, speed=speed)
        seconds, latents[speed] = time.perf_counter() - began, result.latents
        samplings[speed].append(timed.seconds)
        print(f"  {speed:9}{seconds:9.2f} s, sampling {timed.seconds:.2f} s", flush=True)
        return seconds

    calls = in_turn({speed: partial(call, speed) for speed in speeds}, repeats)
    rows: list[dict[str, Any]] = []
    for speed in speeds:
        chosen = SPEEDS[speed]
        shape = dataclasses.replace(setting.shape, kept=chosen.keeps)
        evaluations = len(chosen.knots(None if chosen.owns_grid else STEPS)) - 1
        row = {
            "speed": speed,
            "evaluations": evaluations,
            "flops": speed_flops(setting.config, shape, chosen, evaluations),
            "sampling": Timing.of(samplings[speed]).as_dict(),
            "call": calls[speed].as_dict(),
        }
        if "exact" in latents:
            row["apart"] = relative_error(latents[speed], latents["exact"])
        rows.append(row)
    peak = resident_bytes("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_reserved(device)
    return {**record, "rows": rows, "peak_bytes": peak}


def _error(task: Task, plain: Task, query: torch.Tensor) -> float:
    """How far the latents of `CHECKED` are from those of the plain model."""
    ours, theirs = (one.run([query], guidance=GUIDANCE, speed=CHECKED)[0].latents for one in (task, plain))
    return relative_error(ours, theirs)


def bench_speeds(options: argparse.Namespace) -> None:
    """Runs the command."""
    if options.output:
        check_writable(options.output)
    use_threads(options.threads)
    for name, value, multiple in (
        ("--size", options.size, 16),
        ("--pairs", options.pairs, 1),
        ("--blocks", options.blocks, 1),
        ("--repeats", options.repeats, 1),
    ):
        if value < 1 or value % multiple:
            wanted = "at least 1" if multiple == 1 else f"a positive multiple of {multiple}"
            raise InputError(f"{name} is {value}; expected {wanted}")
    if options.blocks > RELEASED.depth:
        raise InputError(f"--blocks is {options.blocks}; the released model has {RELEASED.depth}")
    device = resolve_device(options.device)
    setting = Setting(options.size, options.pairs, dataclasses.replace(RELEASED, depth=options.blocks))
    if options.quick:
        setting = Setting(32, 1, QUICK_CONFIG, CPU_VAE)
    with torch.no_grad(), current_device(device):
        record = run(
            *(setting, device, resolve_dtype(options.dtype, device)),
            *(list(dict.fromkeys(options.speed)), 1 if options.quick else options.repeats),
            options.compile,
        )
    if options.output:
        write_record(options.output, record)
