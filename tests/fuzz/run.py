"""Runs every fuzzer in turn: `python tests/fuzz/run.py --seconds 60 [--reader NAME ...]`; exit code 1 after a crash.

What a run finds worth keeping goes to `build/fuzz/`, where the next one starts from; crashes too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MEGABYTES = 4096
LARGEST = 256  # megabytes of one allocation
LONGEST = {"checkpoint": 32768, "archive": 16384}  # bytes of a case
LONGEST_ELSE = 4096
SANITIZER = "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32"
# Seconds after which a case counts as one that hangs.
HANGS = 30


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a fuzzer did: its cases, the edges of code that they reached at its start and end, and the crash it met."""

    reader: str
    cases: int
    first: int
    coverage: int
    crash: str

    def __str__(self) -> str:
        did = f"{self.reader:<20} {self.cases:>10,} cases, coverage {self.first} -> {self.coverage}"
        return f"{did}  {self.crash or 'no crash'}"


def missing_python() -> str:
    """Why the fuzzers of what Python reads cannot run here, or nothing."""
    return "" if importlib.util.find_spec("atheris") else "no atheris; pip install '.[fuzz]'"


def missing_native() -> str:
    """Why the fuzzers of the native runner cannot be built here, or nothing."""
    lacking = [tool for tool in ("cmake", "clang++") if shutil.which(tool) is None]
    return f"no {' nor '.join(lacking)} on this machine" if lacking else ""


def build(folder: Path) -> str:
    """Builds the native fuzzers; returns what is missing for it, or nothing."""
    import torch

    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    options = ["-DCMAKE_CXX_COMPILER=clang++", "-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DLAVIN_FUZZ=ON", prefix]
    configured = subprocess.run(["cmake", "-S", ROOT, "-B", folder, *options], capture_output=True, text=True)
    if configured.returncode:
        return (re.search("lavin-native lacks .*", configured.stderr) or [configured.stderr[-2000:]])[0]
    built = subprocess.run(
        ["cmake", "--build", folder, "-j2", "--target", "fuzzers"], capture_output=True, text=True, timeout=1800
    )
    if built.returncode:
        raise RuntimeError(f"{built.stdout[-4000:]}\n{built.stderr[-2000:]}")
    return ""


def run(
    reader: str, command: list[str | Path], work: Path, seconds: float, cases: int = 0, longest: int | None = None
) -> Outcome:
    """Runs one fuzzer for so long, and no more than so many cases where that is not 0; `longest` bytes of a case."""
    from seeds import NATIVE, PYTHON

    kind, name = reader.split("/")
    kept, fixed, crashes = work / "corpus" / kind / name, HERE / "corpus" / kind / name, work / "crashes" / kind / name
    for folder in (kept, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    for file, content in (PYTHON if kind == "python" else NATIVE)[name]().items():
        (kept / file).write_bytes(content)
    longest = longest or LONGEST.get(name, LONGEST_ELSE)
    options = [
        f"-max_total_time={seconds:.0f}", f"-rss_limit_mb={MEGABYTES}", f"-timeout={HANGS}",
        f"-max_len={longest}", f"-malloc_limit_mb={LARGEST}",
        f"-artifact_prefix={crashes}/", "-print_final_stats=1", f"-runs={cases or -1}", "-reload=0",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ASAN_OPTIONS": SANITIZER}
    if name in ("checkpoint", "manifest", "context", "safetensors"):
        options.append(f"-dict={HERE / 'json.dict'}")
    if cases:
        options.append("-seed=1")
    corpora = [kept] + [fixed] * fixed.is_dir()
    with open(crashes / "log", "w") as log:
        done = subprocess.run([*command, *options, *corpora], stdout=log, stderr=log, env=environment)
    said = (crashes / "log").read_text(errors="replace")
    coverage = [int(found) for found in re.findall(r"(?:INITED|NEW|REDUCE|DONE|pulse|RELOAD).*?cov: (\d+)", said)]
    count = [int(found) for found in re.findall(r"^(?:#|stat::number_of_executed_units: )(\d+)", said, re.M)]
    crash = ""
    if done.returncode:
        lines = re.findall(r"(?:=== Uncaught|ERROR: |SUMMARY: |runtime error|\w+Error: ).*", said)
        crash = f"crash: {lines[0] if lines else said[-300:]} (see {crashes})"
    return Outcome(reader, max(count, default=0), *([coverage[0], coverage[-1]] if coverage else [0, 0]), crash)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of every fuzzer (default: 60)")
    parser.add_argument("--cases", type=int, default=0, help="stop after so many (default: no limit)")
    parser.add_argument("--longest", type=int, help="bytes of a case; 1024 tries three times as many as 4096")
    parser.add_argument("--reader", nargs="+", help="python/picture, native/manifest, ... (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "fuzz", help="folder for corpora and crashes")
    options = parser.parse_args()
    from seeds import NATIVE, PYTHON

    commands: dict[str, list[str | Path]] = {}
    if lacking := missing_python():
        print(f"python: {lacking}")
    else:
        commands |= {f"python/{name}": [sys.executable, HERE / "readers.py", name] for name in PYTHON}
    native = options.work / "native"
    if lacking := missing_native() or build(native):
        print(f"native: {lacking}")
    else:
        commands |= {f"native/{name}": [native / f"fuzz-{name}"] for name in NATIVE}
    crashed = False
    for reader, command in commands.items():
        if not options.reader or reader in options.reader:
            outcome = run(reader, command, options.work, options.seconds, options.cases, options.longest)
            print(outcome, flush=True)
            crashed |= bool(outcome.crash)
    return int(crashed)


if __name__ == "__main__":
    sys.exit(main())
