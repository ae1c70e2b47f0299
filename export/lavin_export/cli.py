"""`lavin-rt export`: its options, and the way to the modules that do it, which are imported when one is asked for."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from lavin_export.options import add_common
from lavin_rt.cli.options import Parser

FORMATS = {
    "onnx": ("to_onnx.export", "ONNX graphs, for ONNX Runtime on any machine and for other tools"),
    "tensorrt": ("to_tensorrt.export", "TensorRT plans for the GPU at hand"),
    "openvino": ("to_openvino.export", "OpenVINO networks for CPUs"),
    "aoti": ("to_aoti", "ahead-of-time compiled PyTorch packages, for Python and the native runner"),
}


def add_export(commands: Any) -> None:
    """Adds `export` to the command line's sub-commands; imports nothing heavy.

    Args:
        commands: what `add_subparsers` returned.
    """

    class FormatParser(Parser):
        """A parser that asks its format's module for more options when it is used."""

        module: str | None = None

        def parse_known_args(self, args=None, namespace=None):
            module, self.module = self.module, None
            if module is not None:
                importlib.import_module(f"lavin_export.{module}").add_arguments(self)
            return super().parse_known_args(args, namespace)

    formats = commands.add_parser(
        "export",
        help="compile a checkpoint into a folder that runs without it",
        description="Compiles a checkpoint into an artifact, a folder that runs without it, or verifies one.",
    )
    kinds = formats.add_subparsers(dest="kind", required=True, metavar="FORMAT", parser_class=FormatParser)
    for name, (module, purpose) in FORMATS.items():
        command = kinds.add_parser(name, help=purpose, description=f"Exports a checkpoint as {purpose}.")
        command.module = module
        add_common(command)
        command.set_defaults(run="lavin_export.cli:export")
    verify = kinds.add_parser(
        "verify",
        help="hold an artifact against its checkpoint",
        description="Runs every part of an artifact, and sampling runs, beside the checkpoint's plain model.",
    )
    verify.add_argument("artifact", metavar="DIR", help="the artifact")
    verify.add_argument("--checkpoint", metavar="PATH|HUB-ID", help="that it was exported from (default: mini)")
    verify.add_argument("--revision", help="revision of a Hugging Face id")
    verify.add_argument("--device", default="auto", help="auto (the artifact's), cpu, cuda, ... (default: auto)")
    verify.add_argument("--json", action="store_true", help="print errors and budgets as JSON")
    verify.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    verify.set_defaults(run="lavin_export.cli:export")


def export(options: argparse.Namespace) -> None:
    """Runs the command."""
    if options.kind == "verify":
        from lavin_export.verify.command import from_arguments, shown
        from lavin_rt.console import print_json

        verification = from_arguments(options)
        if options.json:
            print_json(verification)
        elif not options.quiet:
            print("\n".join(shown(verification)))
        return
    module = importlib.import_module(f"lavin_export.{FORMATS[options.kind][0]}")
    module.from_arguments(options)
    if options.quiet:
        return
    from lavin_rt.artifact.manifest import Manifest
    from lavin_rt.devices import gigabytes

    manifest = Manifest.read(options.output)
    if manifest.verification.get("passed"):
        from lavin_export.verify.command import shown

        print("\n".join(shown(manifest.verification)))
    else:
        print("not verified")
    size = sum(entry["bytes"] for entry in manifest.files.values())
    print(f"{options.output}  {options.kind}, {gigabytes(size)} GB")
