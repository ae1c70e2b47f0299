"""What the command line's parts share: the parser, and options that several commands have.

A command's parser has the default `run`, the name `module:function` of what is called with the parsed options: the
module is imported when its command is asked for.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

# As the modules that do the work know them, which are not imported here: that takes seconds.
DTYPES = ("auto", "float32", "bfloat16", "float16")
IMPLS = ("auto", "plain", "torch", "triton")
POSTERIORS = ("mean", "sample")
SPEEDS = ("exact", "near", "fast", "fastest")
SPEED_HELP = (
    "near, fast and fastest evaluate the network less often and compute less of its context and guidance; answers "
    "change. On the tasks that lavin-mini does, near keeps within 5 %% of exact's measure, fast within 4 %% but in "
    "depth (13 %%) and keypoints (7 %%), fastest within 4 %% in restorations, frames, negatives, hues and foreground "
    "masks, in other tasks it loses 5 to 170 %%; unmeasured beside other weights (default: exact)"
)
COMPILE_HELP = (
    "run the network through torch.compile: the first picture of every shape and speed waits for it, on a CPU up to "
    "two minutes, for a gain of some per cent on all others; needs a C++ compiler"
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def add_checkpoint(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--checkpoint",
        metavar="PATH|HUB-ID|ARTIFACT",
        help="folder with lavin_dit.safetensors and stvae.pt, weights.tar.gz, exported artifact, or Hugging Face id "
        "(default: mini, the small model that comes with the package)",
    )


def add_sampling_options(how: argparse._ActionsContainer) -> None:
    """How a task is made and its queries are answered."""
    how.add_argument("--pairs", type=int, default=4, help="pairs chosen from the task's folder (default: 4)")
    add_size(how)
    how.add_argument("--speed", default="exact", choices=SPEEDS, help=SPEED_HELP)
    how.add_argument("--steps", type=int, help="knots of the schedule at speed exact, even, 4 to 136 (default: 20)")
    how.add_argument("--guidance", type=float, default=1.5, help="guidance scale; 1.0 is faster (default: 1.5)")
    how.add_argument("--seed", type=int, default=0, help="of pairs and noise; query i uses SEED + i (default: 0)")
    how.add_argument("--keep-size", action="store_true", help="return pictures at each query's own size")


def add_size(command: argparse._ActionsContainer) -> None:
    command.add_argument("--size", help="N or HEIGHTxWIDTH, multiples of 16 (default: what the model was trained at)")


def add_record_options(out: argparse._ActionsContainer) -> None:
    out.add_argument("--json", action="store_true", help="print a JSON record on stdout, nothing else")
    out.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def add_device(command: argparse._ActionsContainer) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    command.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="of weights and arithmetic (default: auto, bfloat16 where it is fast, else float32)",
    )
    command.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="on a CPU (default: the processors that this process may keep busy; run and map answer with a small model "
        "on one, where other programs run on them)",
    )


def add_checkpoint_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("checkpoint and machine")
    group.add_argument("--revision", help="revision of a Hugging Face id")
    add_device(group)
    group.add_argument("--impl", default="auto", choices=IMPLS, help="what computes (default: auto)")
    group.add_argument("--strict", action="store_true", help="stop on unexpected tensors instead of warning")
    group.add_argument("--trust", action="store_true", help="run the code in an artifact that comes from a hub")
