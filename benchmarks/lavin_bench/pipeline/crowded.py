"""`lavin-rt run` of the bundled model beside programs that keep processors busy: its own choice of threads and waiting
against every fixed one. In a container with a quota it measures that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavin_bench.programs import at_least, program
from lavin_bench.record import write_record
from lavin_bench.timing import Timing, header, header_line
from lavin_rt.container import processor_time, processors
from lavin_rt.find.model import BUNDLED
from lavin_rt.pictures.context import read_template
from lavin_rt.pictures.images import check_writable

TASK = "depth_estimation"
AUTO = "auto"


def choices(most: int) -> dict[str, tuple[list[str], list[str]]]:
    """What the command line may be told, by name: the environment's settings, and options."""
    found: dict[str, tuple[list[str], list[str]]] = {AUTO: ([], [])}
    for threads in sorted({1, most}):
        for wait in ("", "passive"):
            name = f"{threads} thread{'s' * (threads > 1)}" + f", {wait}" * bool(wait)
            found[name] = [f"OMP_WAIT_POLICY={wait}"] * bool(wait), ["--threads", str(threads)]
    return found


@contextlib.contextmanager
def busy(programs: int) -> Iterator[None]:
    """So many other programs that never wait."""
    running = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def seconds_of(environment: list[str], options: list[str], output: Path) -> float:
    """Of the one query, by the record of the command, whose process loads the model first."""
    query = read_template(BUNDLED / "template" / TASK)[0].input
    command = ["env", *environment, sys.executable, "-m", "lavin_rt", "run", "--task", TASK, "--query", str(query)]
    command += ["-o", str(output), "--json", "--device", "cpu", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)["seconds"]["queries"]


def run(repeats: int) -> dict[str, Any]:
    """All choices in a random order of every round, beside none, one and as many programs as there are processors."""
    most, rows = processors(), []
    with tempfile.TemporaryDirectory() as folder:
        for programs in sorted({0, 1, most}):
            samples: dict[str, list[float]] = {name: [] for name in choices(most)}
            with busy(programs):
                for _ in range(repeats):
                    for name in random.sample(list(samples), len(samples)):
                        samples[name].append(seconds_of(*choices(most)[name], Path(folder) / "answer.png"))
            medians = {name: statistics.median(found) for name, found in samples.items()}
            best = min(medians.values())
            rows.append(
                {
                    "programs": programs,
                    "seconds": {name: Timing.of(found).as_dict() for name, found in samples.items()},
                    "auto_over_best": medians[AUTO] / best,
                }
            )
    return {"kind": "crowded", "header": header(), "task": TASK, "processor_time": processor_time(), "rows": rows}


@program
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lavin_bench.pipeline.crowded", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="runs of each choice (default: 7)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    options = parser.parse_args(arguments)
    at_least(options, repeats=1)
    if options.json:
        check_writable(options.json)
    record = run(options.repeats)
    print(header_line(record["header"]))
    for row in record["rows"]:
        found = ", ".join(f"{name} {timing['median']:.2f} s" for name, timing in row["seconds"].items())
        print(f"{row['programs']} other programs: {found}; auto over the best {row['auto_over_best']:.2f}")
    if options.json:
        write_record(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
