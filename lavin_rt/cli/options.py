"""What the command line's parts share: the parser, and options that several commands have."""

from __future__ import annotations

import argparse
from typing import NoReturn

SPEED_HELP = (
    "exact, near, fast or fastest (default: exact): fewer evaluations of the network, of whose context and guidance "
    "less is computed; changes answers, by how much is unmeasured beside weights other than lavin-mini's"
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def add_checkpoint_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("checkpoint and machine")
    group.add_argument("--revision", help="revision of a Hugging Face id")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    group.add_argument("--impl", default="auto", help="auto, plain, torch or triton (default: auto)")
    group.add_argument("--strict", action="store_true", help="stop on unexpected tensors instead of warning")
    group.add_argument("--trust", action="store_true", help="run the code in an artifact that comes from a hub")
