"""`lavin-rt bench tune`: times every kernel's launch candidates on the GPU at hand and writes the device's file.

A candidate whose result is outside the kernel's error budget, or that does not fit the device, is dropped with the
reason. Times are taken at the standard run's shapes, the candidates interleaved.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lavin_bench.kernels.bench import check, largest_error
from lavin_bench.kernels.cases import Case, cases, settings
from lavin_bench.timing import header, measure
from lavin_kernels import tuning
from lavin_kernels.table import KERNELS, OPERATORS
from lavin_rt.devices import current_device, memory_at_hand, resolve_device
from lavin_rt.errors import InputError
from lavin_rt.files import written_whole
from lavin_rt.pictures.images import check_writable

PROCESS_BYTES = 3e9  # of one that tries candidates: a context, and attention's case with what libraries read


def candidates(kernel: str, capability: int) -> list[dict[str, int | str]]:
    """The launch configurations that a kernel's module lists as worth timing, and that the capability can run."""
    module = importlib.import_module(f"lavin_kernels.ops.{OPERATORS[KERNELS[kernel]].module}")
    listed = module.CANDIDATES[kernel] if isinstance(module.CANDIDATES, Mapping) else module.CANDIDATES
    fits = getattr(module, "fits", None)
    return [candidate for candidate in listed if fits is None or fits(candidate, capability)]


def overridden(kernel: str, candidate: Mapping[str, int | str], call: Callable[[], Any]) -> Callable[[], Any]:
    """A call with one kernel launched as the candidate says."""

    def run() -> Any:
        with tuning.override(kernel, **candidate):
            return call()

    return run


def tune(
    kernel: str,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    dropped: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Times a kernel's candidates and today's configuration in one case; returns times, what was dropped, the best.

    `dropped` are candidates that are known not to work, with the reasons.

    Raises:
        RuntimeError: today's configuration is among those that do not work.
    """
    today = dict(tuning.config(kernel, device, dtype))
    today_name = _named(today)
    ours = case.variants["ours"]
    kept: dict[str, Callable[[], Any]] = {}
    configs: dict[str, dict[str, int | str]] = {}
    dropped = dict(dropped or {})
    truth = case.truth()
    allowed = _allowed(case, dtype)
    for candidate in [today, *(c for c in candidates(kernel, tuning.capability(device)) if c != today)]:
        name = _named(candidate)
        if name in dropped:
            continue
        run = overridden(kernel, candidate, ours.call)
        try:
            wrong = _wrong(largest_error(ours.compared(run()), truth), allowed)
            torch.cuda.synchronize(device)
        except Exception as failure:  # Triton raises its own errors for what does not fit a device.
            wrong = _reason(failure)
        if wrong:
            dropped[name] = wrong
        else:
            kept[name], configs[name] = run, candidate
    if today_name not in kept:
        raise RuntimeError(f"{kernel}: today's configuration fails on this device: {dropped[today_name]}")
    timings = measure(kept, repeats, warmup=2, device=device, graph=device.type == "cuda")
    best = min(timings, key=lambda name: timings[name].median)
    times = {name: timing.as_dict() for name, timing in timings.items()}
    return {
        "case": case.name,
        "flops": case.flops,
        "bytes": case.bytes,
        "today": today_name,
        "best": configs[best],
        "times": times,
        "dropped": dropped,
    }


def _allowed(case: Case, dtype: torch.dtype) -> float:
    """The error budget of a candidate."""
    eager = dataclasses.replace(case, variants={"eager": case.variants["eager"]})
    return 2 * check(eager, dtype)["eager"] + torch.finfo(dtype).eps


def _wrong(error: float, allowed: float) -> str:
    """What is wrong with a result of that error; nothing within the budget."""
    return "" if error <= allowed else f"wrong result, error {error:.1e}"


def _reason(failure: Exception) -> str:
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:200]


def case_of(kernel: str, device: torch.device, dtype: torch.dtype) -> Case:
    """The standard run's case of a kernel."""
    operator = KERNELS[kernel]
    return next(case for case in cases(settings(device)[0], device, dtype) if case.operator == operator)


def processes_at_once(device: torch.device) -> int:
    """Processes that a device's free memory and the processors take, at least one."""
    return max(1, min(os.cpu_count() or 1, int(memory_at_hand(device) / PROCESS_BYTES)))


def tried(
    kernels: Sequence[str], device: torch.device, dtype: torch.dtype, workers: int, seconds: float
) -> dict[str, dict[str, str]]:
    """Of every kernel the candidates whose result is wrong, or that end or hold up a process, with the reasons.

    Each of `workers` processes compiles and runs its share once, so that one which aborts in the compiler or never
    returns takes nothing with it, and all that work are in Triton's cache afterwards. One that fails otherwise, be it
    for the memory that other processes hold, or that was not reached in time, is left for `tune` to try alone.
    """
    listed = [(kernel, candidate) for kernel in kernels for candidate in candidates(kernel, tuning.capability(device))]
    shares = [listed[first::workers] for first in range(min(workers, len(listed)))]
    command = [sys.executable, "-m", "lavin_bench.kernels.tune", str(device), str(dtype).removeprefix("torch.")]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(number) for number in range(len(shares))]
        running = []
        for share, output in zip(shares, outputs, strict=True):
            with output.open("w") as out:
                process = subprocess.Popen([*command, json.dumps(share)], stdout=out, stderr=subprocess.DEVNULL)
            running.append(process)
        deadline = time.monotonic() + seconds
        try:
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
            ended = [process.poll() is not None for process in running]
            # What a process is at began when it last wrote a line.
            idle = [time.time() - output.stat().st_mtime for output in outputs]
        finally:
            for process in running:
                process.kill()
                process.wait()
        said = [_lines(output) for output in outputs]
    found: dict[str, dict[str, str]] = {kernel: {} for kernel in kernels}
    for share, lines, at_end, seconds_silent in zip(shares, said, ended, idle, strict=True):
        # The first of a share without a word ended its process, or holds it up if it had half of the time.
        stuck = ["ended or held up its process"] if at_end or seconds_silent > seconds / 2 else []
        for (kernel, candidate), reason in zip(share, [*lines, *stuck], strict=False):
            if reason:
                found[kernel][_named(candidate)] = reason
    return found


def _lines(output: Path) -> list[str]:
    """What one process said of its candidates, in their order."""
    return [json.loads(line)["said"] for line in output.read_text().splitlines() if line.startswith('{"said"')]


def _try_candidates(device: torch.device, dtype: torch.dtype, share: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """What one of the processes of `tried` does: a line of JSON per candidate that says what drops it, or nothing. Ends
    with the first that leaves the device unusable to this process, without a line of it.
    """
    kernel_of_case, case, truth, allowed = "", None, None, 0.0
    for kernel, candidate in share:
        said = ""
        try:
            if kernel != kernel_of_case:
                case = truth = None  # its memory, before that of the next
                case = case_of(kernel, device, dtype)
                truth, allowed, kernel_of_case = case.truth(), _allowed(case, dtype), kernel
            assert case is not None and truth is not None
            ours = case.variants["ours"]
            said = _wrong(largest_error(ours.compared(overridden(kernel, candidate, ours.call)()), truth), allowed)
            torch.cuda.synchronize(device)
        except Exception:
            try:
                torch.cuda.synchronize(device)
            except Exception:  # an illegal address fails whatever comes after it
                return
        print(json.dumps({"said": said}), flush=True)


def _named(candidate: Mapping[str, int | str]) -> str:
    return " ".join(f"{key}={value}" for key, value in candidate.items())


def tune_all(
    device: torch.device,
    operator: str,
    repeats: int,
    save: Callable[[dict[str, Any]], None],
    workers: int | None = None,
    seconds: float = 90.0,
) -> dict[str, Any]:
    """Tunes every kernel of an operator whose name contains `operator`; returns the record, which `save` gets after
    every kernel.
    """
    dtype = torch.bfloat16
    record: dict[str, Any] = {"kind": "tuning", "header": header(device), "kernels": {}, "failures": []}
    chosen = [kernel for kernel, of in KERNELS.items() if operator in of]
    chosen.sort(key=lambda kernel: "attention" not in kernel)  # what matters most comes first
    dropped = tried(chosen, device, dtype, workers or processes_at_once(device), seconds)
    for kernel in chosen:
        try:
            found = tune(kernel, case_of(kernel, device, dtype), device, dtype, repeats, dropped[kernel])
        except Exception as failure:  # one kernel's failure is written down and ends no other's tuning
            record["failures"].append(f"{kernel}: {_reason(failure)}")
            print(f"FAILED {record['failures'][-1]}", flush=True)
        else:
            record["kernels"][kernel] = found
            medians = {name: times["median"] for name, times in found["times"].items()}
            before, after = medians[found["today"]], min(medians.values())
            print(f"{kernel}: {before * 1e6:.1f} -> {after * 1e6:.1f} us with {found['best']}", flush=True)
        save(record)
    return record


def bench_tune(options: argparse.Namespace) -> None:
    """Runs the command."""
    device = resolve_device(options.device)
    if device.type != "cuda":
        raise InputError("tuning needs a CUDA device, this machine has none; the defaults of lavin_kernels serve it")
    if not any(options.operator in operator for operator in KERNELS.values()):
        raise InputError(
            f"no tuned operator has {options.operator!r} in its name; expected one of "
            + ", ".join(dict.fromkeys(KERNELS.values()))
        )
    path = Path(options.output) if options.output else tuning.config_file(torch.cuda.get_device_name(device))
    check_writable(path)
    try:
        tuned = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); repair it or take it away") from None

    def save(record: dict[str, Any]) -> None:
        # After every kernel, so that a failure in a later one loses nothing.
        for target, content in (
            (path, merged(tuned, record)),
            *([(Path(options.json), record)] if options.json else []),
        ):
            with written_whole(target) as partial:
                partial.write_text(json.dumps(content, indent=2) + "\n")

    with torch.no_grad(), current_device(device):
        record = tune_all(device, options.operator, options.repeats, save)
    print(f"wrote {path}")
    if record["failures"]:
        raise RuntimeError(f"{len(record['failures'])} kernels were not tuned: {record['failures'][0]}")


def merged(tuned: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """A device's file of launch configurations (`lavin_kernels.tuning`) with a record's best ones."""
    best = {kernel: {**tuned.get(kernel, {}), "bfloat16": found["best"]} for kernel, found in record["kernels"].items()}
    return {**tuned, **best}


if __name__ == "__main__":
    with torch.no_grad():
        _try_candidates(torch.device(sys.argv[1]), getattr(torch, sys.argv[2]), json.loads(sys.argv[3]))
