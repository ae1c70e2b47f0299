"""What the command line's parts share: the parser, and options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

Command = Callable[[argparse.Namespace], None]
"""Runs parsed options. A parser's default `load` gives it, so that its module is imported only when it is asked for."""

# As the modules that do the work know them, which are not imported here: that takes seconds.
DTYPES = ("auto", "float32", "bfloat16", "float16")
IMPLS = ("auto", "plain", "torch", "triton")
POSTERIORS = ("mean", "sample")
SPEEDS = ("exact", "near", "fast", "fastest")
SPEED_HELP = (
    "near, fast and fastest evaluate the network less often and compute less of its context and guidance; answers "
    "change, by how much is unmeasured beside weights other than lavin-mini's (default: exact)"
)
COMPILE_HELP = (
    "run the network through torch.compile: the first picture of every shape waits for it, on a CPU 25 to 75 seconds, "
    "for a gain of some per cent on all others"
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def add_checkpoint_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("checkpoint and machine")
    group.add_argument("--revision", help="revision of a Hugging Face id")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="of weights and arithmetic (default: auto, bfloat16 where it is fast, else float32)",
    )
    group.add_argument("--impl", default="auto", choices=IMPLS, help="what computes (default: auto)")
    group.add_argument("--strict", action="store_true", help="stop on unexpected tensors instead of warning")
    group.add_argument("--trust", action="store_true", help="run the code in an artifact that comes from a hub")
