"""Everything that one GPU visit should bring: `make gpu-check DIR=results` runs this in under nine minutes.

The GPU tests, the ceilings, the kernels, the pipeline at the standard run and at 256 px with 4 pairs, and the start of
a process. Each part writes its own JSON file into the folder, so that a part that fails takes nothing with it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lavin_bench import kernels, pipeline, startup
from lavin_bench.cases import settings
from lavin_bench.ceilings import ceilings
from lavin_bench.pipeline_variants import AUTHORS_COMPILED, Setting
from lavin_bench.report import write_record
from lavin_bench.timing import header

# What a part may take: nine minutes in all. At 512 px about a minute goes into compiling the authors' way, so that
# 256 px has it eager only; a random checkpoint of 7 GB is written and read twice for the start.
SECONDS = {"tests": 130, "ceilings": 20, "kernels": 110, "pipeline-512": 160, "pipeline-256": 60, "startup": 60}


def gpu_tests(folder: Path) -> dict[str, Any]:
    """Runs `pytest -m gpu` into a log; exit code 124 where the time did not suffice."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={folder / 'gpu-tests.xml'}"]
    log = folder / "gpu-tests.log"
    with log.open("w") as out:
        try:
            # Ends before its part does, so that no test is left behind on the device.
            limit = SECONDS["tests"] - 20
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 124
    return {"kind": "tests", "exit_code": code, "last_line": log.read_text().strip().splitlines()[-1:]}


def parts(device: torch.device, folder: Path, full: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to do, by the name of its file."""
    dtype = torch.bfloat16
    return {
        "tests": lambda: gpu_tests(folder),
        "ceilings": lambda: {"kind": "ceilings", "header": header(device), **ceilings(device, dtype)},
        "kernels": lambda: kernels.run(settings(device, full), device, dtype),
        **pipelines(device, dtype, full),
        "startup": lambda: startup.run(startup.STANDARD, "released", repeats=3 if full else 1),
    }


def pipelines(device: torch.device, dtype: torch.dtype, full: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """The whole matrix, or the standard run and 256 px with what fits into the time."""
    if full:
        return {"pipeline": lambda: pipeline.run(pipeline.settings(device), device, dtype)}
    short = {"repeats": 3, "error_steps": 6}
    return {
        "pipeline-512": lambda: pipeline.run([Setting(512, 4)], device, dtype, **short, whole=False, checks=()),
        "pipeline-256": lambda: pipeline.run(
            [Setting(256, 4)], device, dtype, **short, without=[AUTHORS_COMPILED], checks=["graphs"]
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="lavin_bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--full", action="store_true", help="all sizes and pairs; takes longer")
    parser.add_argument("--part", help="run this part alone, in this process")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("lavin-rt: error: no CUDA device on this machine; gpu-check measures a GPU", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    todo = parts(torch.device("cuda"), options.output, options.full)
    if options.part:
        return run_part(options.part, todo[options.part], options.output)
    failed = []
    for name in todo:
        # Each in a process of its own: an illegal address ends a process's use of the device, and a kernel may hang.
        command = [sys.executable, "-m", "lavin_bench.gpu_check", "--output", str(options.output), "--part", name]
        limit = None if options.full else SECONDS[name]
        try:
            done = subprocess.run([*command, *(["--full"] if options.full else [])], timeout=limit)
            failed += [name] if done.returncode else []
        except subprocess.TimeoutExpired:
            print(f"{name}: FAILED, not done after {limit} s", flush=True)
            failed.append(name)
    return 1 if failed else 0


@torch.no_grad()
def run_part(name: str, part: Callable[[], dict[str, Any]], folder: Path) -> int:
    """Runs one part and writes its file; returns 1 where it failed."""
    began = time.perf_counter()
    try:
        record = part()
    except Exception:  # whatever it was, it is written down and fails the whole
        record = {"kind": "failure", "failures": [traceback.format_exc()]}
    failed = bool(record.get("failures") or record.get("exit_code"))
    record["part_seconds"] = time.perf_counter() - began
    write_record(folder / f"{name}.json", record)
    print(f"{name}: {'FAILED' if failed else 'done'} in {record['part_seconds']:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
