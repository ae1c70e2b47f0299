"""Everything that one GPU visit should bring: `make gpu-check DIR=results`, on a bare machine, in under ten minutes.

What matters most comes first, every part in a process of its own with its own limit, and writes its file after every
case. A second call goes on where the first stopped. At the end one screen holds the figures against their bounds.

It takes 12 GB of the GPU's memory. One whose matrix product is slower than 200 TFLOP/s samples 256 px instead of 512;
twice the `--minutes` give every part twice the time, and half as fast a GPU its 512 px.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lavin_bench import gpu_summary
from lavin_bench.ceilings import matmul_ceiling
from lavin_bench.kernels import bench as kernels
from lavin_bench.kernels import tune
from lavin_bench.kernels.cases import settings
from lavin_bench.pipeline import bench as pipeline
from lavin_bench.pipeline import startup
from lavin_bench.pipeline.variants import AUTHORS_COMPILED, AUTHORS_EAGER, CPU_VAE, QUICK_CONFIG, Setting
from lavin_bench.programs import program
from lavin_bench.record import write_record
from lavin_bench.timing import header
from lavin_kernels import tuning
from lavin_rt.errors import InputError

MINUTES = 9.5
GRACE = 8.0  # seconds between the request to end and the kill
TUNED = "tuned.json"
FIRST_TESTS = (
    "kernels/test_joint_attention_gpu.py", "sampling/test_executor_gpu.py", "kernels/test_stream_linear.py",
    "kernels/test_golden_triton.py",
)  # fmt: skip
# FLOP/s of a matrix product in bfloat16 that 512 px need in the parts' seconds: the first takes eight samplings of
# 1,061 TFLOP in 100, at two thirds of that rate. 256 px need a sixth.
ENOUGH = 200e12
SLOWER = ("exact savings",)  # rungs of the waterfall that a short visit leaves out


@dataclasses.dataclass(frozen=True)
class Visit:
    """What parts share: the folder of the results, the device, whether all is as small as it can be, and how many times
    the usual seconds a part has.
    """

    folder: Path
    device: torch.device
    dry: bool = False
    full: bool = False
    patience: float = 1.0

    @functools.cached_property
    def size(self) -> int:
        """Pixels of the standard run, that the device at hand can sample in the time there is."""
        if self.dry:
            return 512
        rate = matmul_ceiling(self.device, torch.bfloat16, repeats=5)["flops_per_second"]
        size = 512 if rate * self.patience >= ENOUGH else 256
        print(f"a matrix product has {rate / 1e12:.0f} TFLOP/s: samplings at {size} px", flush=True)
        return size

    def setting(self, size: int) -> Setting:
        return Setting(32, 1, QUICK_CONFIG, CPU_VAE) if self.dry else Setting(size, 4)

    @contextlib.contextmanager
    def tuned(self) -> Iterator[None]:
        """Launches as this visit's tuning found them best."""
        path = self.folder / TUNED
        found = json.loads(path.read_text()) if path.exists() else {}
        with contextlib.ExitStack() as stack:
            for kernel, by_dtype in found.items():
                stack.enter_context(tuning.override(kernel, **by_dtype["bfloat16"]))
            yield


Save = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class CheckPart:
    """Something to do, in at most so many seconds; `run` saves its record as it grows."""

    seconds: float
    run: Callable[[Visit, Save], None]


def _tests(visit: Visit, save: Save, first: bool) -> None:
    """The GPU tests, in parallel where pytest-xdist is there: compiling takes most of their time."""
    names = [f"tests/{name}" for name in FIRST_TESTS]
    files = (
        names if first else [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if str(path) not in names]
    )
    parallel = ["-n", str(min(8, tune.processes_at_once(visit.device)))] if importlib.util.find_spec("xdist") else []
    log = visit.folder / ("tests-first.log" if first else "tests.log")
    report = visit.folder / f"{log.stem}.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu and not slow",
        "-v",
        *parallel,
        f"--junitxml={report}",
        *files,
    ]
    with log.open("w") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    lines = log.read_text().strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    # No pytest, killed, nothing collected: no test says so. 5 is "no test was selected", as it may be in a dry run.
    if code not in ((0, 5) if visit.dry else (0,)) and not failed:
        failed = [f"pytest ended with {code}: {lines[-1] if lines else 'nothing printed'}"]
    save({"kind": "tests", "exit_code": code, "last_line": lines[-1:], "failures": failed})


def _standard(visit: Visit, save: Save) -> None:
    """The standard run by our exact ways alone, with the launches of today."""
    without = [AUTHORS_EAGER, AUTHORS_COMPILED, *SLOWER]
    _pipeline(visit, save, (visit.size,), without, speeds=False)


def _tuned(visit: Visit, save: Save) -> None:
    """The standard run and 256 px again, at every speed, with the launches that tuning found."""
    with visit.tuned():
        sizes = tuple(dict.fromkeys((visit.size, 256)))
        _pipeline(visit, save, sizes, [AUTHORS_EAGER, AUTHORS_COMPILED, *SLOWER], speeds=True)


def _peers(visit: Visit, save: Save) -> None:
    """Ours and the authors' way interleaved, with the launches that tuning found."""
    with visit.tuned():
        _pipeline(visit, save, (visit.size,), SLOWER, speeds=False)


def _pipeline(visit: Visit, save: Save, sizes: Sequence[int], without: Sequence[str], speeds: bool) -> None:
    dtype = torch.float32 if visit.dry else torch.bfloat16
    chosen, repeats = [visit.setting(size) for size in sizes], 1 if visit.dry else 3
    options: dict[str, Any] = {
        "steps": 6 if visit.dry else 20,
        "error_steps": 4,
        "without": without,
        "whole": False,
        "checks": (),
    }
    speeds = speeds and not visit.dry
    save(pipeline.run(chosen, visit.device, dtype, repeats, **options, save=save, speeds=speeds))


def _tune(visit: Visit, save: Save, operator: str) -> None:
    if visit.dry:
        save({"kind": "tuning", "header": header(visit.device), "kernels": {}, "failures": []})
        return
    path = visit.folder / TUNED
    before = json.loads(path.read_text()) if path.exists() else {}

    def keep(record: dict[str, Any]) -> None:
        write_record(path, tune.merged(before, record))
        save(record)

    save(tune.tune_all(visit.device, operator, 9, keep, seconds=90 * visit.patience))


def _kernels(visit: Visit, save: Save) -> None:
    dtype = torch.float32 if visit.dry else torch.bfloat16
    with visit.tuned():
        chosen, repeats = settings(visit.device, visit.full), 2 if visit.dry else 9
        save(kernels.run(chosen, visit.device, dtype, repeats=repeats, save=save))


def _startup(visit: Visit, save: Save) -> None:
    if visit.dry:
        save({"kind": "startup", "header": header(visit.device)})
        return
    save(startup.run({**startup.STANDARD, "size": visit.size}, "released", repeats=1))


def _graphs(visit: Visit, save: Save) -> None:
    """Whether graphs give the bits of eager steps; needs nothing else."""
    if visit.dry:
        save({"kind": "graphs", "header": header(visit.device)})
        return
    from lavin_bench.pipeline.checks import graphs_equal_eager
    from lavin_bench.pipeline.variants import RELEASED_VAE, random_model, random_vae

    dit = random_model(visit.setting(256).config, visit.device, torch.bfloat16)
    figures, failures = graphs_equal_eager(dit, random_vae(RELEASED_VAE, visit.device), [visit.setting(256)])
    save({"kind": "graphs", "header": header(visit.device), **figures, "failures": failures})


PARTS = {
    "tests-first": CheckPart(110, lambda visit, save: _tests(visit, save, first=True)),
    "standard": CheckPart(100, _standard),
    "attention": CheckPart(150, lambda visit, save: _tune(visit, save, "joint_attention")),
    "tuning": CheckPart(170, lambda visit, save: _tune(visit, save, "")),
    "standard-tuned": CheckPart(120, _tuned),
    "kernels": CheckPart(150, _kernels),
    "peers": CheckPart(200, _peers),
    "graphs": CheckPart(60, _graphs),
    "startup": CheckPart(90, _startup),
    "tests": CheckPart(150, lambda visit, save: _tests(visit, save, first=False)),
}


def run_part(name: str, visit: Visit) -> int:
    """Runs one part in this process; returns 1 where it failed. Its file says `complete` once it ran to its end."""
    began, path = time.perf_counter(), visit.folder / f"{name}.json"
    last: dict[str, Any] = {"kind": "failure", "failures": []}

    def save(record: dict[str, Any]) -> None:
        last.clear()
        last.update(record, part_seconds=time.perf_counter() - began)
        write_record(path, last)

    try:
        with torch.no_grad():
            PARTS[name].run(visit, save)
    except BaseException as failure:  # whatever it was, an interrupt too, it is written down and fails the part
        last.setdefault("failures", []).append(traceback.format_exc())
        save(dict(last))
        if not isinstance(failure, Exception):
            raise
    last["complete"] = True
    save(dict(last))
    failed = bool(last.get("failures"))
    print(f"{name}: {'FAILED' if failed else 'done'} in {last['part_seconds']:.0f} s", flush=True)
    return int(failed)


def run_in_process(name: str, visit: Visit, seconds: float) -> str:
    """Runs a part in a process group of its own; "done", "failed", or "stopped" where the time did not suffice.

    An illegal address ends a process's use of the device, and a kernel may hang: at its limit the group is asked to
    end, as by Ctrl-C, and then killed with all it started.
    """
    command = [sys.executable, "-m", "lavin_bench.gpu_check", "--output", str(visit.folder), "--part", name]
    command += ["--dry-run"] * visit.dry + ["--full"] * visit.full + ["--minutes", str(MINUTES * visit.patience)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    # Also what a part that ended left behind: a process on the device would take its memory and time from the next.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if code is None:
        print(f"{name}: STOPPED after {seconds:.0f} s; its file has what was done", flush=True)
        return "stopped"
    return "failed" if code else "done"


def completed(path: Path) -> bool:
    """Whether a part's file is there and ran to its end without a failure."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return bool(record.get("complete")) and not record.get("failures")


@program
def main() -> int:
    parser = argparse.ArgumentParser(prog="lavin_bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"for everything; more of them lengthen all (default: {MINUTES})"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts alone, in this order"
    )
    parser.add_argument("--full", action="store_true", help="all sizes and pairs; takes longer")
    parser.add_argument("--dry-run", action="store_true", help="the whole script on a CPU, as small as can be")
    parser.add_argument("--part", choices=PARTS, help="run this part alone, in this process")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise InputError("no CUDA device on this machine; gpu-check measures a GPU")
    if not 0 < options.minutes < float("inf"):
        raise InputError(f"--minutes is {options.minutes}; expected a positive number")
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if options.dry_run else "cuda")
    visit = Visit(options.output, device, options.dry_run, options.full, max(1.0, options.minutes / MINUTES))
    if options.part:
        return run_part(options.part, visit)
    ends = time.monotonic() + 60 * options.minutes
    outcomes = {}
    for name in options.only:
        if completed(visit.folder / f"{name}.json"):
            outcomes[name] = "done before"
            continue
        left = ends - time.monotonic() - GRACE
        if left < 10:
            outcomes[name] = "no time left; call again"
            continue
        outcomes[name] = run_in_process(name, visit, min(left, PARTS[name].seconds * visit.patience))
    print("\n".join(gpu_summary.lines(visit.folder, outcomes)))
    return 0 if all(outcome.startswith("done") for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
