"""`lavin-rt bench pipeline`: the waterfall from the way the authors run LaVin-DiT to the fastest way here.

One model of random weights, every variant a switch more than the one above it, all of them interleaved in one run and
held against a float32 run of the plain model before anything is timed. On CUDA the released shapes in bfloat16, from
256 px and 1 pair to 512 px and 8; on a CPU the same comparison at a small size.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lavin_bench.ceilings import ceilings
from lavin_bench.kernels.bench import largest_error
from lavin_bench.pipeline.checks import graphs_equal_eager, memory_of_the_standard_run
from lavin_bench.pipeline.peers import Peers
from lavin_bench.pipeline.variants import (
    AUTHORS_COMPILED,
    AUTHORS_EAGER,
    CPU_CONFIG,
    CPU_CONFIGS,
    CPU_VAE,
    GUIDANCE,
    QUICK_CONFIG,
    TWO_BLOCKS,
    Baselines,
    Sampling,
    Setting,
    Variant,
    oracles,
    random_model,
    random_vae,
    variants,
    weights_bytes,
    whole_calls,
)
from lavin_bench.record import write_record
from lavin_bench.timing import Timing, header, header_line, measure, use_threads
from lavin_rt.devices import current_device, release_cached, resolve_device, resolve_dtype
from lavin_rt.errors import InputError, one_line
from lavin_rt.files import written_whole
from lavin_rt.pictures.images import check_writable

STEPS = 20
TOLERANCE = 1e-4  # of a whole sampling in float32
CHECKS = {"memory": memory_of_the_standard_run, "graphs": graphs_equal_eager}
AUTHORS_BOUND = 0.05  # of the authors' way in 16 bits, which sets the budget of the others


def settings(
    device: torch.device, sizes: Sequence[int] = (), pairs: Sequence[int] = (), full: bool = False
) -> list[Setting]:
    """What is measured on a device unless something else is asked for; `full` of a CPU, the released widths."""
    if device.type == "cuda":
        return [Setting(size, count) for size in sizes or (256, 512) for count in pairs or (1, 4, 8)]
    config, usual = (TWO_BLOCKS, 256) if full else (CPU_CONFIG, 128)
    return [Setting(size, count, config, CPU_VAE) for size in sizes or (usual,) for count in pairs or (4,)]


def run(
    chosen: Sequence[Setting],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 7,
    steps: int = STEPS,
    error_steps: int = STEPS,
    show: bool = True,
    without: Sequence[str] = (),
    whole: bool = True,
    checks: Sequence[str] = tuple(CHECKS),
    save: Callable[[dict[str, Any]], None] = lambda record: None,
    speeds: bool = True,
    with_peers: bool = False,
) -> dict[str, Any]:
    """Measures every setting; all have one model's shape. Returns the record that `report` reads.

    Args:
        chosen: settings.
        device, dtype: where and in what the variants run; the truth is float32.
        repeats: samples per variant.
        steps: knots of what is timed.
        error_steps: knots of the samplings whose errors are taken; fewer where a float32 run takes too long.
        show: print as it goes.
        without: variants to leave out.
        whole: measure whole calls, too.
        checks: of `CHECKS`, on CUDA.
        save: gets the record after everything that was added to it.
        speeds: measure the other speeds, too; each form of an evaluation is compiled by itself.
        with_peers: on a CPU, measure other engines, too, and bfloat16 beside float32 where it is fast.
    """
    top = ceilings(device, dtype)
    config, vae_config = chosen[0].config, chosen[0].vae
    record: dict[str, Any] = {
        "kind": "pipeline",
        "header": {**header(device), "dtype": str(dtype).removeprefix("torch."), "repeats": repeats},
        "config": dataclasses.asdict(config),
        "vae": dataclasses.asdict(vae_config),
        "steps": steps,
        "error_steps": error_steps,
        "guidance": GUIDANCE,
        "ceilings": top,
        "settings": [],
        "failures": [],
    }
    if show:
        print(header_line(record["header"]))
        print(f"matmul {top['matmul']['flops_per_second'] / 1e12:.3g} TFLOP/s; {config}", flush=True)
    dit = random_model(config, device, dtype)
    vae = random_vae(vae_config, device, dtype)
    truths = [oracles(dit, vae, setting, error_steps, whole) for setting in chosen]
    peers = Peers(copy.deepcopy(dit).float(), copy.deepcopy(vae), (STEPS, steps, error_steps)) if with_peers else None
    vae = vae.to(dtype)
    _release(device)
    if device.type == "cuda":
        for name in checks:
            record[name], failures = CHECKS[name](dit, vae, chosen)
            record["failures"] += failures
            _release(device)
            if show:
                print(f"{name}: {record[name]}", flush=True)
            save(record)
    for setting, truth in zip(chosen, truths, strict=True):
        if show:
            print(setting.name, flush=True)
        baselines = Baselines(dit, vae)
        figures: dict[str, Any] = {"name": setting.name, "size": setting.size, "pairs": setting.pairs}
        figures["useful_flops"] = (steps - 1) * setting.useful_flops
        meter = Meter(dit, setting, dtype, repeats, steps, error_steps, top["matmul"]["flops_per_second"], show)
        found = {"sampling": variants(dit, setting, baselines, peers=peers)}
        if whole:
            found["whole call"] = whole_calls(dit, vae, setting, baselines, peers)
        for what, kind, of in zip(found, ("rows", "calls"), truth, strict=False):
            kept = {
                name: variant
                for name, variant in found[what].items()
                if name not in without and (speeds or variant.speed == "exact")
            }
            figures[kind] = meter.rows(kept, of, what)
        figures["skipped"] = meter.skipped
        figures["speedups"] = speedups(figures)
        record["settings"].append(figures)
        record["failures"] += meter.failures
        if not figures["rows"]:
            record["failures"].append(f"{setting.name}: no sampling was measured; see what was skipped, and why")
        save(record)
        if show:
            for gain in figures["speedups"]:
                print(
                    f"  {gain['what']}: {gain['fast']} is {gain['times']:.2f}x as fast as {gain['base']}"
                    f" ({gain['low']:.2f} - {gain['high']:.2f})"
                )
        del baselines, meter, found, kept  # variants hold the baselines
        torch.compiler.reset()  # the graphs of mode="reduce-overhead" hold memory
        _release(device)
    return record


@dataclasses.dataclass(eq=False)
class Meter:
    """Makes, checks and times the variants of one setting."""

    dit: Any
    setting: Setting
    dtype: torch.dtype
    repeats: int
    steps: int
    error_steps: int
    ceiling: float
    show: bool

    def __post_init__(self):
        self.failures: list[str] = []
        self.skipped: list[dict[str, str]] = []
        self.device = self.dit.device

    def rows(self, found: dict[str, Variant], truth: torch.Tensor, what: str = "sampling") -> list[dict[str, Any]]:
        """A row per variant whose result is right; a whole call has neither FLOPs nor memory to be counted."""
        whole = what != "sampling"
        calls, rows = {}, {}
        for name, variant in found.items():
            _release(self.device)
            try:
                began, before = time.perf_counter(), self._reserved()
                call = variant.make()
                latents = call(self.steps)
                self._synchronize()
                rows[name] = {"variant": name, "first_seconds": time.perf_counter() - began}
                if not whole and not variant.peer and variant.dtype is None:
                    weights = weights_bytes(self.dit, variant.modulates)
                    rows[name]["peak_bytes"] = weights + self._working_bytes(name, before, variant)
                if self.error_steps != self.steps:
                    latents = call(self.error_steps)
            except Exception as error:  # of torch, Triton, a compiler or a child; none of them ends the others
                rows.pop(name, None)  # no compiler, too little memory, ...
                reason = one_line(error, 300)
                self.skipped.append({"what": what, "variant": name, "reason": reason})
                self._say(f"{what}, {name}: skipped, {reason}")
                continue
            rows[name]["relative_error"] = largest_error((latents.cpu(),), (truth,))
            calls[name] = call
            self._say(f"{what}, {name}: first after {rows[name]['first_seconds']:.1f} s")
        for name, row in rows.items():
            variant = found[name]
            if variant.speed != "exact":
                row["speed"] = variant.speed
            if variant.dtype is not None:
                row["dtype"] = str(variant.dtype).removeprefix("torch.")
            if variant.peer:
                row["peer"] = True
        self._refuse(calls, rows, what)
        for name, timing in self._times(calls, what).items():
            rows[name]["seconds"] = timing.as_dict()
            if not whole:
                flops = self.setting.flops(found[name].speed, self.steps)
                rate = flops / timing.median
                rows[name] |= {"useful_flops": flops, "useful_flops_per_second": rate}
                if "dtype" not in rows[name]:  # the ceiling is that of the run's
                    rows[name]["share_of_ceiling"] = rate / self.ceiling
            self._say(f"{what}, {line(rows[name])}")
        return [rows[name] for name in calls]

    def _refuse(self, calls: dict[str, Any], rows: dict[str, Any], what: str) -> None:
        """Drops the exact variants whose results are wrong; a speed's error is its price, and is shown."""
        own = rows.get(AUTHORS_EAGER, {}).get("relative_error", AUTHORS_BOUND)
        allowed = TOLERANCE if self.dtype == torch.float32 else 2 * own + torch.finfo(self.dtype).eps
        for name in [name for name in calls if "speed" not in rows[name]]:
            coarse = "dtype" in rows[name] or (name == AUTHORS_EAGER and self.dtype != torch.float32)
            bound = AUTHORS_BOUND if coarse else allowed
            error, apart = rows[name]["relative_error"], 0
            if hasattr(calls[name], "frames") and AUTHORS_EAGER in calls and self.dtype == torch.float32:
                pictures = (calls[other].frames.int().flatten() for other in (name, AUTHORS_EAGER))
                apart = int(torch.sub(*pictures).abs().max())
            if not error <= bound or apart > 1:
                reason = f"error {error:.1e}, allowed {bound:.1e}; pictures {apart} grey levels apart, allowed 1"
                self.failures.append(f"{self.setting.name}, {what}, {name}: no time, {reason}")
                print(f"  FAILED {self.failures[-1]}", flush=True)
                del calls[name]

    def _times(self, calls: dict[str, Sampling], what: str) -> dict[str, Timing]:
        if not calls:
            return {}
        from tqdm import tqdm

        timed = {name: lambda call=call: call(self.steps) for name, call in calls.items()}
        with tqdm(desc=what, total=self.repeats * len(timed), leave=False, disable=None, file=sys.stderr) as bar:
            # Everything has run before, so that no call needs another one to warm up.
            return measure(timed, self.repeats, 0, self.device, progress=lambda done, _: bar.update(done - bar.n))

    def _say(self, text: str) -> None:
        if self.show:
            print(f"  {text}", flush=True)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _reserved(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_reserved(self.device)

    def _working_bytes(self, name: str, before: int, variant: Variant) -> int:
        """Memory beyond the weights: what a variant's first sampling made the allocator reserve, or on a CPU what it
        takes in a process of its own.
        """
        if self.device.type == "cuda":
            # A variant that needs the modulation linears on the device brought them with it.
            brought = weights_bytes(self.dit, variant.modulates) - weights_bytes(self.dit, False)
            return max(torch.cuda.max_memory_reserved(self.device) - before - brought, 0)
        command = [sys.executable, "-m", "lavin_bench.pipeline.variants", name, "--size", str(self.setting.size)]
        command += ["--pairs", str(self.setting.pairs), "--steps", str(self.steps)]
        command += ["--threads", str(torch.get_num_threads()), "--dtype", str(self.dtype).removeprefix("torch.")]
        command += ["--config", next(name for name, one in CPU_CONFIGS.items() if one == self.setting.config)]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def speedups(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours, exact, against the authors' way, like against like where a CPU offers it, else against the compiled one;
    against other engines in the same dtype; and where there are rungs in another dtype, eager, against the run's own.
    Medians' ratios, and the least and the most of a round.
    """
    found = []
    for key, what in (("rows", "sampling"), ("calls", "whole call")):
        rows = {row["variant"]: row for row in figures.get(key, []) if "speed" not in row}
        peers = [name for name, row in rows.items() if "peer" in row]
        authors = [name for name in rows if name.startswith((AUTHORS_EAGER, AUTHORS_COMPILED))]
        ours = [name for name in rows if name not in (*authors, *peers)]
        for base in (*authors, *peers):
            same = [name for name in ours if rows[name].get("dtype") == rows[base].get("dtype")]
            compiled = [name for name in same if "compiled" in name]
            eager = [name for name in same if "compiled" not in name]
            if base in peers:
                fast = eager[-1:] + compiled[-1:]
            elif compiled:
                fast = (compiled if base.startswith(AUTHORS_COMPILED) else eager)[-1:]
            else:
                fast = eager[-1:]
            found += [{"what": what, "fast": one, "base": base, **_ratio(rows[base], rows[one])} for one in fast]
        eager = [name for name in ours if "compiled" not in name]
        plain, coarse = ([name for name in eager if ("dtype" in rows[name]) == other][-1:] for other in (False, True))
        found += [
            {"what": what, "fast": one, "base": base, **_ratio(rows[base], rows[one])}
            for base, one in zip(plain, coarse, strict=False)
        ]
    return found


def _ratio(base: dict[str, Any], fast: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as `base`; rounds are interleaved, so that a round's ratio is one of neighbours."""
    slow, quick = base["seconds"], fast["seconds"]
    rounds = [one / other for one, other in zip(slow["samples"], quick["samples"], strict=True)]
    return {"times": slow["median"] / quick["median"], "low": min(rounds), "high": max(rounds)}


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    seconds = row["seconds"]
    text = f"{row['variant']:24}{seconds['median'] * 1e3:9.1f} ms"
    text += f" ({seconds['low'] * 1e3:.1f} - {seconds['high'] * 1e3:.1f})  error {row['relative_error']:.1e}"
    if "useful_flops" in row:
        text += f"  {row['useful_flops_per_second'] / 1e12:7.3f} TFLOP/s"
    if "share_of_ceiling" in row:
        text += f", {row['share_of_ceiling']:4.0%} of the ceiling"
    if "peak_bytes" in row:
        text += f"  peak {row['peak_bytes'] / 1e9:.2f} GB"
    return f"{text}  first after {row['first_seconds']:.1f} s"


def _release(device: torch.device) -> None:
    """Lets go of what the variants before compiled, captured and kept."""
    gc.collect()
    release_cached(device)


def bench_pipeline(options: argparse.Namespace) -> None:
    """Runs the command; a wrong result raises `RuntimeError` when all the rest is done."""
    if options.output:
        check_writable(options.output)
    use_threads(options.threads)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    for name, values, multiple in (("--size", options.size, 16), ("--pairs", options.pairs, 1)):
        wrong = [value for value in values if value < 1 or value % multiple]
        if wrong:
            raise InputError(f"{name} is {wrong[0]}; expected a positive multiple of {multiple}")
    repeats = (1 if options.quick else 7) if options.repeats is None else options.repeats
    if repeats < 1:
        raise InputError(f"--repeats is {repeats}; expected at least 1")
    if options.full and (options.quick or device.type != "cpu"):
        raise InputError("--full is a CPU's run of the released widths; leave it out on a GPU and with --quick")
    chosen, steps = settings(device, options.size, options.pairs, options.full), 4 if options.full else STEPS
    if options.quick:
        chosen, steps = [Setting(32, 1, QUICK_CONFIG, CPU_VAE)], 6
    with torch.no_grad(), current_device(device):
        error_steps, speeds = min(options.error_steps, steps), not (options.quick or options.full)
        peers = device.type == "cpu" and not options.quick
        record = run(
            chosen, device, dtype, repeats, steps, error_steps, whole=not options.full, speeds=speeds, with_peers=peers
        )
    if options.output:
        from lavin_bench.pipeline.waterfall import waterfall

        write_record(options.output, record)
        with written_whole(Path(options.output).with_suffix(".svg")) as partial:
            partial.write_text(waterfall(record))
    if record["failures"]:
        raise RuntimeError(f"{len(record['failures'])} checks failed: {record['failures'][0]}")
