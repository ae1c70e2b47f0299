"""Options that all formats of `lavin-rt export` have."""

from __future__ import annotations

import argparse
from typing import Any

from lavin_rt.cli.options import DTYPES, SPEEDS


def add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        metavar="PATH|HUB-ID",
        help="folder with lavin_dit.safetensors and stvae.pt, weights.tar.gz, or Hugging Face id (default: mini, the "
        "small model that comes with the package)",
    )
    command.add_argument("--revision", help="revision of a Hugging Face id")
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write; new, or empty")
    command.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1, ... (default: auto, which is cpu for onnx and openvino)",
    )
    command.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="of weights and arithmetic (default: auto, which is float32 for onnx, openvino and CPUs)",
    )
    command.add_argument(
        "--steps", type=int, nargs="+", default=[20], help="schedules that it shall know, in knots (default: 20)"
    )
    command.add_argument(
        "--speed",
        dest="speeds",
        nargs="+",
        default=[],
        choices=SPEEDS,
        metavar="SPEED",
        help=f"speeds that it shall serve besides exact: {', '.join(SPEEDS[1:])} (default: none)",
    )
    command.add_argument(
        "--clip-frames", type=int, nargs="+", default=[], help="lengths 1 + 4 k of clips that it shall take too"
    )
    command.add_argument(
        "--no-templates", dest="templates", action="store_false", help="leave the checkpoint's templates behind"
    )
    command.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not run the result beside the plain model"
    )
    command.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def common_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of the options that all formats have goes to a format's `export_...` function by name and as it is."""
    return {name: getattr(arguments, name) for name in ("steps", "speeds", "clip_frames", "templates", "verify")}
