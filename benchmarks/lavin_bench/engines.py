"""`lavin-rt bench engines`: one model by every engine that a CPU has, each in a process of its own.

What an export takes and how large it is, the time from nothing to a picture, and single calls of engines that have
answered before, in turn: from a query's pixels to its answer's, the context encoded. An engine whose latents differ
from those of the packed step gets no times. Everything in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lavin_bench.pipeline.startup import make_checkpoint
from lavin_bench.record import write_record
from lavin_bench.timing import header, header_line, in_turn, use_threads
from lavin_rt.errors import InputError
from lavin_rt.pictures.images import check_writable, save_picture
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.self_check import relative_error

TOLERANCE = 1e-4  # relative error of a whole sampling
STEPS, GUIDANCE, PAIRS, SIZE = 20, 1.5, 4, 128
LIMIT_SECONDS = 1800  # of one process
LAVIN = [sys.executable, "-m", "lavin_rt.cli.main"]


@dataclass(frozen=True)
class CpuEngine:
    """A way to run the model.

    Attributes:
        export: the kind of artifact, `lavin-rt export KIND`; None runs the checkpoint.
        compile: compile the step at run time.
        native: run by the native runner.
        needs: modules that the export or the run needs.
    """

    export: str | None = None
    compile: bool = False
    native: bool = False
    needs: tuple[str, ...] = ()


ENGINES = {
    "packed, eager": CpuEngine(),
    "packed, compiled": CpuEngine(compile=True),
    "AOTInductor": CpuEngine("aoti"),
    "native runner": CpuEngine("aoti", native=True),
    "ONNX Runtime": CpuEngine("onnx", needs=("onnx", "onnxscript", "onnxruntime")),
    "OpenVINO": CpuEngine("openvino", needs=("openvino",)),
}
TRUTH = "packed, eager"


class Bench:
    """A model, its pictures and its artifacts in a folder.

    Args:
        folder: empty.
        native: the native runner's program; None where there is none.
        threads: of every process.
        quick: a tiny model.
    """

    def __init__(self, folder: Path, native: Path | None, threads: int, quick: bool = False):
        self.folder, self.native, self.quick = folder, native, quick
        self.checkpoint, self.task, self.query = folder / "checkpoint", folder / "task", folder / "query.png"
        self.noise, self.size = folder / "noise.safetensors", 32 if quick else SIZE
        self.threads = threads
        self.told = ["--task", self.task, "--query", self.query, "-o", folder / "picture.png", "--size", self.size]
        self.told += ["--steps", STEPS, "--guidance", GUIDANCE, "--pairs", PAIRS]
        # What is compiled at run time is compiled once, and not before.
        self.setting = ["env", f"OMP_NUM_THREADS={threads}", f"MKL_NUM_THREADS={threads}"]
        self.setting += [f"TORCHINDUCTOR_CACHE_DIR={folder / 'compiled'}"]

    def make(self) -> None:
        """Writes the model and the pictures."""
        from safetensors.torch import save_file

        for folder in (self.checkpoint, self.task):
            folder.mkdir()
        make_checkpoint(self.checkpoint, "tiny" if self.quick else "small", torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        names = [self.task / f"{pair}_{role}.png" for pair in range(PAIRS) for role in ("input", "target")]
        for name in [*names, self.query]:
            picture = torch.randint(256, (3, self.size, self.size), generator=generator)
            save_picture(picture.to(torch.uint8), name)
        side = self.size // 8
        save_file({"noise": torch.randn(1, 16, 1, side, side, generator=generator)}, self.noise)

    def missing(self, engine: CpuEngine) -> str | None:
        """Why an engine cannot run; None where it can."""
        absent = [name for name in engine.needs if find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} is not installed"
        return "no --native PROGRAM" if engine.native and self.native is None else None

    def model(self, engine: CpuEngine) -> Path:
        """The folder that an engine runs."""
        return self.checkpoint if engine.export is None else self.folder / engine.export

    def export(self, engine: CpuEngine) -> float | None:
        """Exports what an engine runs and returns the seconds of the whole command, its verification included; None
        where it runs the checkpoint.
        """
        if engine.export is None:
            return None
        options = ["--checkpoint", self.checkpoint, "-o", self.model(engine), "--device", "cpu", "--dtype", "float32"]
        return self._timed([*LAVIN, "export", engine.export, *options, "-q"])

    def first(self, engine: CpuEngine) -> float:
        """Seconds of a process from nothing to a picture on disk."""
        if engine.native:
            return self._timed([*self._native(engine), "-q"])
        run = [*LAVIN, "run", "--checkpoint", self.model(engine), "--device", "cpu", "--dtype", "float32"]
        return self._timed([*run, *self.told, "-q", *(["--compile"] if engine.compile else [])])

    def answer(self, name: str) -> torch.Tensor:
        """The latents that an engine makes of the noise."""
        from safetensors.torch import load_file

        engine, latents = ENGINES[name], self.folder / "latents.safetensors"
        if engine.native:
            self._run([*self._native(engine), "--noise", self.noise, "--save-latents", latents, "-q"])
        else:
            with self.worker(engine) as ask:
                ask(str(latents))
        return load_file(latents)["latents"]

    @contextmanager
    def worker(self, engine: CpuEngine) -> Iterator[Callable[[str], float]]:
        """A process that has answered once: `ask(FILE)` answers again and returns the seconds of it; the latents are
        written, unless the file is "".
        """
        told = {"model": str(self.model(engine)), "compile": engine.compile, "task": str(self.task)}
        told |= {"query": str(self.query), "noise": str(self.noise), "size": self.size, "threads": self.threads}
        command = [*self.setting, sys.executable, "-m", "lavin_bench.engines", "--worker", json.dumps(told)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            asked, said = process.stdin, process.stdout
            assert asked is not None and said is not None  # as both are pipes

            def ask(latents: str) -> float:
                try:
                    print(latents, file=asked, flush=True)
                    return float(said.readline())
                except (OSError, ValueError):  # it is gone, which it has told on standard error
                    ended = f"the process that runs {self.model(engine).name} ended with {process.wait()}"
                    raise RuntimeError(ended) from None

            try:
                yield ask
            finally:
                with suppress(BrokenPipeError):
                    asked.close()

    def calls(self, engine: CpuEngine, stack: ExitStack) -> Callable[[], float]:
        """A call that answers once and returns its seconds, of an engine that has answered before."""
        if not engine.native:
            ask = stack.enter_context(self.worker(engine))
            return lambda: ask("")
        # A process answers three times: what the first answer alone does (pages of the weights, threads) is start-up.
        return lambda: json.loads(self._run([*self._native(engine), "--time", "--repeat", 3]))["query"][-1]

    def _native(self, engine: CpuEngine) -> list[Any]:
        return [self.native, "--artifact", self.model(engine), *self.told]

    def _timed(self, command: list[Any]) -> float:
        began = time.perf_counter()
        self._run(command)
        return time.perf_counter() - began

    def _run(self, command: list[Any]) -> str:
        words = list(map(str, command))
        done = subprocess.run([*self.setting, *words], capture_output=True, text=True, timeout=LIMIT_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words[:5])} failed: {' '.join(done.stderr.split())[-300:]}")
        return done.stdout


def bytes_of(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def compare(bench: Bench, names: list[str], repeats: int) -> dict[str, Any]:
    """A row for every engine that runs, and why the others do not."""
    rows: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    exported: dict[str | None, float | None] = {}
    truth = None
    for name in names:
        engine = ENGINES[name]
        reason = bench.missing(engine)
        if reason:
            skipped[name] = reason
            continue
        try:
            if engine.export not in exported:
                exported[engine.export] = bench.export(engine)
            first = bench.first(engine)
            latents = bench.answer(name)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            if name == TRUTH:
                raise
            skipped[name] = str(error)
            continue
        truth = latents if truth is None else truth
        error_of = relative_error(latents, truth)
        print(f"{name}: first picture after {first:.1f} s, error {error_of:.1e}", flush=True)
        if not error_of <= TOLERANCE:
            raise RuntimeError(f"{name}: no times, its latents differ by {error_of:.1e}; at most {TOLERANCE}")
        size = bytes_of(bench.model(engine))
        rows[name] = {"engine": name, "export_seconds": exported[engine.export], "bytes": size, "first_seconds": first}
        rows[name] |= {"relative_error": error_of}
    again = in_turn({name: partial(bench.first, ENGINES[name]) for name in rows}, 1 if bench.quick else 3)
    with ExitStack() as stack:
        calls = {name: bench.calls(ENGINES[name], stack) for name in rows}
        for call in calls.values():
            call()
        timings = in_turn(calls, repeats)
    for name, row in rows.items():
        samples = sorted(timings[name].samples)
        row |= {"again_seconds": again[name].as_dict(), "call_seconds": timings[name].as_dict()}
        row |= {"p50": statistics.median(samples), "p95": samples[round(0.95 * (len(samples) - 1))]}
    return {"rows": list(rows.values()), "skipped": skipped}


def work(told: dict[str, Any]) -> None:
    """A worker: answers once for every line of its standard input, and prints the seconds."""
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(told["threads"])
    pipe = Pipeline.from_pretrained(told["model"], "cpu", "float32", compile=told["compile"])
    task = pipe.task(told["task"], pairs=PAIRS, size=told["size"])
    noise = load_file(told["noise"])["noise"]
    task(told["query"], steps=STEPS, guidance=GUIDANCE)
    for line in sys.stdin:
        began = time.perf_counter()
        [result] = task.run([told["query"]], steps=STEPS, guidance=GUIDANCE, noise=noise)
        assert result.image is not None  # a call ends with a picture
        seconds = time.perf_counter() - began
        if line.strip():
            save_file({"latents": result.latents.contiguous()}, line.strip())
        print(seconds, flush=True)


def bench_engines(options: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        InputError: an engine that there is none of, a program that is none, or a file that cannot be written.
        RuntimeError: an engine whose result is wrong.
    """
    names = [name for name in ENGINES if options.engine.lower() in name.lower() or name == TRUTH]
    if names == [TRUTH] and options.engine.lower() not in TRUTH:
        raise InputError(f"--engine is {options.engine!r}; expected a part of one of: {'; '.join(ENGINES)}")
    if options.repeats < 1:
        raise InputError(f"--repeats is {options.repeats}; expected at least 1")
    native = Path(options.native).resolve() if options.native else None
    if native is not None and not (native.is_file() and os.access(native, os.X_OK)):
        raise InputError(f"--native {options.native} is no program; expected a built lavin-native")
    if options.output:
        check_writable(options.output)
    use_threads(options.threads)
    record: dict[str, Any] = {"kind": "engines", "header": {**header(), "dtype": "float32"}}
    print(header_line(record["header"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="lavin-rt-engines-") as folder:
        bench = Bench(Path(folder), native, torch.get_num_threads(), options.quick)
        bench.make()
        record["setting"] = f"{bench.size} px, {PAIRS} pairs, {STEPS} knots, guidance {GUIDANCE}"
        record |= compare(bench, names, 2 if options.quick else options.repeats)
    for row in record["rows"]:
        print(line(row))
    for name, reason in record["skipped"].items():
        print(f"{name}: left out, {reason}")
    if options.output:
        write_record(options.output, record)


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    export = "" if row["export_seconds"] is None else f"export {row['export_seconds']:.0f} s, "
    return (
        f"{row['engine']:18}{export}{row['bytes'] / 1e6:.0f} MB, first picture {row['first_seconds']:.1f} s, again "
        f"{row['again_seconds']['median']:.1f} s; a call {row['p50']:.3f} s, p95 {row['p95']:.3f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="lavin_bench.engines", description="A worker of `lavin-rt bench engines`.")
    parser.add_argument("--worker", required=True, type=json.loads, metavar="JSON", help="what to run; see `worker`")
    work(parser.parse_args().worker)
