"""The command line: `lavin-rt run`, `serve`, `map`, `task`, `info`, `export` and `bench`.

Exit codes: 0 done, 1 the run failed, 2 something given cannot be used, 130 interrupted, 143 and 129 ended by TERM and
HUP. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lavin_rt.errors import InputError
from lavin_rt.process import (
    Terminated,
    check_output_wanted,
    settle_threads,
    sound_streams,
    terminating,
)
from lavin_rt.serve.options import add_map, add_serve, add_task


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


_SPEED_HELP = (
    "exact, near, fast or fastest (default: exact): fewer evaluations of the network, of whose context and guidance "
    "less is computed; changes answers, by how much is unmeasured beside weights other than lavin-mini's"
)
_COMPILE_HELP = (
    "run the network through torch.compile: the first picture of every shape waits for it, on a CPU 25 to 75 seconds, "
    "for a gain of some per cent on all others"
)
_CLIP_HELP = (
    "each query is a clip: a folder of frames or an animation, of 1 + 4k frames (1, 5, 9, ...), as many as the task's "
    "clips; those that come with the package have 5"
)


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(f"lavin-rt {version('lavin-rt')}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = _Parser(
        prog="lavin-rt",
        description="Run LaVin-DiT: show it a few input-target pairs of a vision task, and it does the task.",
    )
    root.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_run(commands)
    _add_info(commands)
    _add_export(commands)
    _add_bench(commands)
    add_serve(commands, _add_checkpoint_options)
    add_map(commands, _add_checkpoint_options)
    add_task(commands, _Parser, _add_checkpoint_options)
    return root


def _bundled_tasks() -> list[str]:
    """Names of the tasks that come with the package, without importing what takes time."""
    folder = Path(__file__).parent / "mini" / "template"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _add_checkpoint_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("checkpoint and machine")
    group.add_argument("--revision", help="revision of a Hugging Face id")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    group.add_argument("--impl", default="auto", help="auto, plain, torch or triton (default: auto)")
    group.add_argument("--strict", action="store_true", help="stop on unexpected tensors instead of warning")
    group.add_argument("--trust", action="store_true", help="run the code in an artifact that comes from a hub")


def _add_run(commands) -> None:
    run = commands.add_parser(
        "run",
        help="answer queries with a task's context",
        description="Answers one or more queries with the task that the context shows.",
        epilog="example: lavin-rt run --checkpoint weights/ --task depth --query photo.jpg -o depth.png; "
        f"tasks by name, or a beginning of it: {', '.join(_bundled_tasks())}",
    )
    what = run.add_argument_group("what to do")
    what.add_argument(
        "--task",
        required=True,
        metavar="DIR|NAME|FILE",
        help="folder of *_input and *_target pictures, a task's name (in the checkpoint's templates, then the "
        "package's own), or a saved context",
    )
    what.add_argument(
        "--query", required=True, nargs="+", metavar="PICTURE", help="pictures, or folders of pictures; see --clip"
    )
    what.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="file (.png .jpg .webp, clips also .gif) for one query, else a folder",
    )
    what.add_argument("--clip", action="store_true", help=_CLIP_HELP)
    what.add_argument(
        "--frames", type=int, metavar="N", help="cut longer clips, of queries and task, to their first N frames"
    )
    what.add_argument(
        "--checkpoint",
        metavar="PATH|HUB-ID|ARTIFACT",
        help="folder with lavin_dit.safetensors and stvae.pt, weights.tar.gz, exported artifact, or Hugging Face id "
        "(default: mini, the small model that comes with the package)",
    )
    how = run.add_argument_group("how to do it")
    how.add_argument("--pairs", type=int, default=4, help="pairs chosen from the task's folder (default: 4)")
    how.add_argument("--repeats", action="store_true", help="choose pairs with repeats, as the published scripts do")
    how.add_argument("--size", help="N or HEIGHTxWIDTH, multiples of 16 (default: what the model was trained at)")
    how.add_argument("--speed", default="exact", metavar="NAME", help=_SPEED_HELP)
    how.add_argument("--steps", type=int, help="knots of the schedule at speed exact, even, 4 to 136 (default: 20)")
    how.add_argument("--guidance", type=float, default=1.5, help="guidance scale; 1.0 is faster (default: 1.5)")
    how.add_argument("--seed", type=int, default=0, help="of pairs and noise; query i uses SEED + i (default: 0)")
    how.add_argument("--posterior", default="mean", help="mean or sample (default: mean)")
    how.add_argument("--batch-size", type=int, help="queries that run together (default: up to 4, as memory allows)")
    how.add_argument("--tile", type=int, help="VAE tile in pixels for pictures too large for memory; approximate")
    how.add_argument("--chunk", type=int, help="latent frames per VAE piece for clips too long for memory; approximate")
    how.add_argument("--compile", action="store_true", help=_COMPILE_HELP)
    how.add_argument(
        "--allow-huge", action="store_true", help="read pictures of more than 178 megapixels, if memory allows"
    )
    how.add_argument("--no-graphs", action="store_true", help="on CUDA, run steps without CUDA graphs; the same bits")
    out = run.add_argument_group("output")
    out.add_argument("--keep-size", action="store_true", help="return pictures at each query's own size")
    out.add_argument("--grid", action="store_true", help="also write OUT-grid: context, query and result side by side")
    out.add_argument("--save-context", metavar="FILE", help="keep the encoded context as a .safetensors file")
    out.add_argument("--json", action="store_true", help="print a JSON record of the run on stdout, nothing else")
    out.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    _add_checkpoint_options(run)
    run.set_defaults(main="run")


def _add_info(commands) -> None:
    info = commands.add_parser(
        "info",
        help="what a checkpoint is and what this machine can run it with",
        description="Describes this machine and, where one is given, a checkpoint.",
    )
    info.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT|ARTIFACT", help="folder, archive or Hugging Face id")
    info.add_argument(
        "--self-check",
        action="store_true",
        help="compute known answers; with a checkpoint, also its packed step against its plain model",
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    _add_checkpoint_options(info)
    info.set_defaults(main="info")


def _add_export(commands) -> None:
    from lavin_export.cli import add_export

    add_export(commands, _Parser)


def _add_bench(commands) -> None:
    bench = commands.add_parser("bench", help="measure this machine", description="Measures this machine.")
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=_Parser)
    kernels = kinds.add_parser(
        "kernels",
        help="every operator at the model's shapes, against the best that PyTorch has",
        description="Checks every operator's result, then times it at the model's shapes, beside PyTorch's own.",
    )
    kernels.add_argument("--operator", default="", help="only operators whose name contains this")
    kernels.add_argument("--full", action="store_true", help="all sizes and pairs, with and without the null branch")
    kernels.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    kernels.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    kernels.add_argument("--repeats", type=int, default=15, help="samples per variant (default: 15)")
    kernels.add_argument("--json", metavar="FILE", help="write the figures to this file")
    kernels.add_argument(
        "--static", action="store_true", help="no timing: compile for all targets without a GPU, and check the results"
    )
    kernels.set_defaults(main="bench kernels")
    tune = kinds.add_parser(
        "tune",
        help="find the best kernel launches of the GPU at hand",
        description="Times every kernel's launch candidates on the GPU at hand and writes the device's file.",
    )
    tune.add_argument("--operator", default="", help="only operators whose name contains this")
    tune.add_argument("--device", default="auto", help="auto, cuda, cuda:1, ... (default: auto)")
    tune.add_argument("--repeats", type=int, default=15, help="samples per candidate (default: 15)")
    tune.add_argument(
        "-o", "--output", metavar="FILE", help="file to write (default: the installed package's, per device)"
    )
    tune.add_argument("--json", metavar="FILE", help="write all times to this file")
    tune.set_defaults(main="bench tune")
    pipeline = kinds.add_parser(
        "pipeline",
        help="whole samplings and whole calls, beside the way the authors run the model",
        description="Measures samplings from the authors' way to the fastest one, every variant one switch more.",
    )
    pipeline.add_argument("--size", type=int, nargs="+", default=[], help="pixels (default: 256 512; on a CPU 128)")
    pipeline.add_argument("--pairs", type=int, nargs="+", default=[], help="pairs (default: 1 4 8; on a CPU 4)")
    pipeline.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    pipeline.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    pipeline.add_argument("--repeats", type=int, help="samples per variant (default: 7)")
    pipeline.add_argument(
        "--error-steps", type=int, default=20, help="knots of the samplings that errors are taken of (default: 20)"
    )
    pipeline.add_argument("--threads", type=int, help="of a CPU (default: as many as PyTorch takes)")
    pipeline.add_argument(
        "--quick", action="store_true", help="a tiny model and picture, once: shows that it works, not how fast"
    )
    pipeline.add_argument(
        "-o", "--output", metavar="FILE", help="write the figures to this JSON file and the waterfall beside it as SVG"
    )
    pipeline.set_defaults(main="bench pipeline")
    startup = kinds.add_parser(
        "startup",
        help="from the start of a process to its first picture, part by part",
        description="Starts fresh processes and times them from the start to the first picture, cold and warm.",
    )
    startup.add_argument(
        "--checkpoint", help="folder, archive, hub id or artifact (default: a random one, made for this)"
    )
    startup.add_argument(
        "--model", default="auto", help="which random one: small, released, or auto: released on CUDA (default: auto)"
    )
    startup.add_argument("--size", type=int, help="pixels (default: 512; for the small model 128)")
    startup.add_argument("--pairs", type=int, default=4, help="pairs of the context (default: 4)")
    startup.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    startup.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    startup.add_argument("--impl", default="auto", help="auto, plain, torch or triton (default: auto)")
    startup.add_argument("--compile", action="store_true", help=_COMPILE_HELP)
    startup.add_argument("--threads", type=int, help="of a CPU (default: as many as PyTorch takes)")
    startup.add_argument("-o", "--output", metavar="FILE", help="write the figures to this JSON file")
    startup.set_defaults(main="bench startup")
    _add_bench_quality(kinds)
    _add_bench_serve(kinds)


def _add_bench_quality(kinds) -> None:
    quality = kinds.add_parser(
        "quality",
        help="how well a pipeline does the tasks of lavin-mini, on held-out scenes",
        description="Measures answers to held-out queries of lavin-mini's tasks, beside what needs no model.",
    )
    quality.add_argument(
        "--checkpoint",
        help="folder, archive, hub id or artifact (default: mini, the small model that comes with the package)",
    )
    quality.add_argument(
        "--against",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="also run a checkpoint (default: the same) in float32 and print the differences to it",
    )
    quality.add_argument(
        "--speed",
        nargs="+",
        metavar="NAME",
        help="instead hold these speeds (near, fast, fastest) against exact: measures, distance to the exact answer, "
        "FLOPs and seconds of every task",
    )
    quality.add_argument(
        "--task",
        metavar="DIR|NAME",
        help="with --speed: a folder of your own pairs instead of lavin-mini's tasks; each pair in turn is the query, "
        "others its context",
    )
    quality.add_argument("--tasks", nargs="+", metavar="TASK", help="by their full names (default: all)")
    quality.add_argument("--scenes", type=int, help="held-out queries a task (default: 64)")
    quality.add_argument("--pairs", type=int, nargs="+", help="of a context (default: 1 2 4)")
    quality.add_argument("--size", type=int, help="pixels (default: the checkpoint's own)")
    quality.add_argument("--steps", type=int, default=20, help="knots of the schedule (default: 20)")
    quality.add_argument("--guidance", type=float, default=1.5, help="guidance scale (default: 1.5)")
    quality.add_argument("--seed", type=int, default=0, help="of degradations, contexts and noise (default: 0)")
    quality.add_argument("--batch-size", type=int, default=8, help="queries that run together at most (default: 8)")
    quality.add_argument("--compile", action="store_true", help=_COMPILE_HELP)
    quality.add_argument("--threads", type=int, help="of a CPU (default: as many as PyTorch takes)")
    quality.add_argument("--quick", action="store_true", help="4 scenes and 2 pairs: shows that it works, not how well")
    quality.add_argument(
        "-o", "--output", metavar="FILE", help="write the figures to this JSON file and sheets of pictures beside it"
    )
    _add_checkpoint_options(quality)
    quality.set_defaults(main="bench quality")


def _add_bench_serve(kinds) -> None:
    load = kinds.add_parser(
        "serve",
        help="a service under many clients: what batches gain, right answers, memory",
        description="Starts a service of the small model on this machine's CPU and asks by one client and by many.",
    )
    load.add_argument("--clients", type=int, default=32, help="at once (default: 32)")
    load.add_argument("--requests", type=int, default=200, help="in all; 0 for --memory alone (default: 200)")
    load.add_argument("--alone", type=int, default=40, help="of them, also asked by one client (default: 40)")
    load.add_argument("--steps", type=int, default=20, help="knots of the schedule (default: 20)")
    load.add_argument("--check", type=int, default=200, help="answers held against the pipeline's (default: 200)")
    load.add_argument("--memory", type=int, default=1000, help="more requests, for memory; 0 none (default: 1000)")
    load.add_argument("-o", "--output", metavar="FILE", help="write the figures to this JSON file")
    load.set_defaults(main="bench serve")


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"lavin-rt: warning: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    with sound_streams(), terminating(), warnings.catch_warnings():
        warnings.showwarning = _warn
        # About damage that either does not matter or is an error in a moment.
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        try:
            try:
                options = parser().parse_args(arguments)
            finally:
                sys.stdout.flush()  # of --help
            if options.main == "run":
                from lavin_rt.run import run as command
            elif options.main == "info":
                from lavin_rt.info import info as command
            elif options.main == "serve":
                from lavin_rt.serve.command import serve as command
            elif options.main == "map":
                from lavin_rt.serve.fleet import run_map as command
            elif options.main == "task add":
                from lavin_rt.task_command import add as command
            elif options.main == "task show":
                from lavin_rt.task_command import show as command
            elif options.main == "export":
                from lavin_export.cli import export as command
            elif options.main == "bench tune":
                from lavin_bench.tune import bench_tune as command
            elif options.main == "bench pipeline":
                from lavin_bench.pipeline import bench_pipeline as command
            elif options.main == "bench startup":
                from lavin_bench.startup import bench_startup as command
            elif options.main == "bench serve":
                from lavin_bench.serve_load import bench_serve as command
            elif options.main == "bench quality":
                from lavin_bench.quality import bench_quality as command
            else:
                from lavin_bench.kernels import bench_kernels as command
            settle_threads()
            command(options)
            sys.stdout.flush()
        except InputError as error:
            return _fail(str(error), 2)
        except Terminated as stop:
            return _fail(str(stop), 128 + stop.number)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except BrokenPipeError:
            return 1
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{error.strerror or error}", 2)
        except (RuntimeError, MemoryError) as error:
            return _fail(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, 1)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"lavin-rt: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def print_json(record: dict) -> None:
    """A record on stdout."""
    check_output_wanted()
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    sys.exit(main())
