"""The command line: `lavin-rt run`, `serve`, `map`, `task`, `info`, `export` and `bench`.

Exit codes: 0 done, 1 the run failed, 2 something given cannot be used, 130 interrupted, 143 and 129 ended by TERM and
HUP. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from subprocess import SubprocessError

from lavin_rt.cli.options import (
    COMPILE_HELP,
    POSTERIORS,
    Parser,
    add_checkpoint,
    add_checkpoint_options,
    add_record_options,
    add_sampling_options,
)
from lavin_rt.cli.services import add_map, add_serve, add_task
from lavin_rt.errors import InputError
from lavin_rt.process import Terminated, settle_memory_and_waiting, settle_threads, sound_streams, terminating

OWN = ("run", "info", "serve", "map", "task")
COMMANDS = "lavin_rt.commands"
"""Entry points of other packages' commands: functions that are given what `add_subparsers` returned, and add theirs."""
CLIP_HELP = (
    "each query is a clip: a folder of frames or an animation, of 1 + 4k frames (1, 5, 9, ...), as many as the task's "
    "clips; those that come with the package have 5"
)


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(f"lavin-rt {version('lavin-rt')}")
        parser.exit()


def parser(others: bool = True) -> argparse.ArgumentParser:
    """The whole command line, or without the commands that other packages have registered."""
    root = Parser(
        prog="lavin-rt",
        description="Run LaVin-DiT: show it a few input-target pairs of a vision task, and it does the task.",
    )
    root.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _add_run(commands)
    _add_info(commands)
    add_serve(commands)
    add_map(commands)
    add_task(commands)
    if others:
        for entry in sorted(entry_points(group=COMMANDS), key=lambda entry: entry.name):
            entry.load()(commands)
    return root


def _bundled_tasks() -> list[str]:
    """Names of the tasks that come with the package, without importing what takes time."""
    folder = Path(__file__).parents[1] / "mini" / "template"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


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
    what.add_argument("--clip", action="store_true", help=CLIP_HELP)
    what.add_argument(
        "--frames", type=int, metavar="N", help="cut longer clips, of queries and task, to their first N frames"
    )
    add_checkpoint(what)
    how = run.add_argument_group("how to do it")
    add_sampling_options(how)
    how.add_argument("--repeats", action="store_true", help="choose pairs with repeats, as the published scripts do")
    how.add_argument("--posterior", default="mean", choices=POSTERIORS, help="of the VAE (default: mean)")
    how.add_argument("--batch-size", type=int, help="queries that run together (default: up to 4, as memory allows)")
    how.add_argument("--tile", type=int, help="VAE tile in pixels for pictures too large for memory; approximate")
    how.add_argument("--chunk", type=int, help="latent frames per VAE piece for clips too long for memory; approximate")
    how.add_argument("--compile", action="store_true", help=COMPILE_HELP)
    how.add_argument(
        "--allow-huge", action="store_true", help="read pictures of more than 178 megapixels, if memory allows"
    )
    how.add_argument("--no-graphs", action="store_true", help="on CUDA, run steps without CUDA graphs; the same bits")
    out = run.add_argument_group("output")
    out.add_argument("--grid", action="store_true", help="also write OUT-grid: context, query and result side by side")
    out.add_argument("--save-context", metavar="FILE", help="keep the encoded context as a .safetensors file")
    add_record_options(out)
    add_checkpoint_options(run)
    run.set_defaults(run="lavin_rt.cli.run:run")


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
    cost = info.add_argument_group("what the published 3.4 B model would take here, before it is downloaded")
    cost.add_argument("--size", help="N or HEIGHTxWIDTH: estimate a picture of this size (default: 512, with --pairs)")
    cost.add_argument("--pairs", type=int, help="and so many pairs (default: 4, with --size)")
    add_checkpoint_options(info)
    info.set_defaults(run="lavin_rt.cli.info:info")


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"lavin-rt: warning: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with sound_streams(), terminating(), warnings.catch_warnings():
        warnings.showwarning = _warn
        # About damage that either does not matter or is an error in a moment.
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        try:
            try:
                # Looking for other packages' commands takes a while: only where one may be meant.
                options = parser(others=not arguments or arguments[0] not in OWN).parse_args(arguments)
            finally:
                sys.stdout.flush()  # of --help
            if not getattr(options, "lasting", False):
                settle_memory_and_waiting()
            command = resolve_name(options.run)
            settle_threads(getattr(options, "threads", None))  # of PyTorch, which the command has imported
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
        except Exception as error:
            if not isinstance(error, RuntimeError | MemoryError | SubprocessError) and not _of_triton(error):
                raise
            return _fail(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, 1)
    return 0


def _of_triton(error: Exception) -> bool:
    """Whether it is one of Triton's own, which are of no common kind: told without importing Triton."""
    return any(kind.__module__.split(".")[0] == "triton" for kind in type(error).__mro__)


def _fail(message: str, code: int) -> int:
    print(f"lavin-rt: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
