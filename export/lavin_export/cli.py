"""`lavin-rt export`: its options, and the way to the modules that do it, which are imported when one is asked for."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

FORMATS = {
    "onnx": ("to_onnx", "ONNX graphs, for ONNX Runtime on any machine and for other tools"),
    "tensorrt": ("to_tensorrt", "TensorRT plans for the GPU at hand"),
    "aoti": ("to_aoti", "ahead-of-time compiled PyTorch packages, for Python and the native runner"),
}


def add_export(commands: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    """Adds `export` to the command line's sub-commands; imports nothing heavy.

    Args:
        commands: what `add_subparsers` returned.
        parser_class: of the command line's parsers.
    """

    class FormatParser(parser_class):
        """A parser that asks its format's module for more options when it is used."""

        module: str | None = None

        def parse_known_args(self, args=None, namespace=None):
            module, self.module = self.module, None
            if module is not None:
                importlib.import_module(f"lavin_export.{module}").add_arguments(self)
            return super().parse_known_args(args, namespace)

    export = commands.add_parser(
        "export",
        help="compile a checkpoint into a folder that runs without it",
        description="Compiles a checkpoint into an artifact, a folder that runs without it, or verifies one.",
    )
    kinds = export.add_subparsers(dest="kind", required=True, metavar="FORMAT", parser_class=FormatParser)
    for name, (module, purpose) in FORMATS.items():
        command = kinds.add_parser(name, help=purpose, description=f"Exports a checkpoint as {purpose}.")
        command.module = module
        _add_common(command)
        command.set_defaults(main="export")
    verify = kinds.add_parser(
        "verify",
        help="hold an artifact against its checkpoint",
        description="Runs every part of an artifact, and a short sampling run, beside the checkpoint's plain model.",
    )
    verify.add_argument("artifact", metavar="DIR", help="the artifact")
    verify.add_argument("--checkpoint", metavar="PATH|HUB-ID", help="that it was exported from (default: mini)")
    verify.add_argument("--revision", help="revision of a Hugging Face id")
    verify.add_argument("--device", default="auto", help="auto (the artifact's), cpu, cuda, ... (default: auto)")
    verify.add_argument("--json", action="store_true", help="print errors and budgets as JSON")
    verify.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    verify.set_defaults(main="export")


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        metavar="PATH|HUB-ID",
        help="folder with lavin_dit.safetensors and stvae.pt, weights.tar.gz, or Hugging Face id (default: mini, the "
        "small model that comes with the package)",
    )
    command.add_argument("--revision", help="revision of a Hugging Face id")
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write; new, or empty")
    command.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto, which is cpu for onnx)"
    )
    command.add_argument(
        "--dtype",
        default="auto",
        help="auto, float32, bfloat16 or float16 (default: auto, which is float32 for onnx)",
    )
    command.add_argument(
        "--steps", type=int, nargs="+", default=[20], help="schedules that it shall know, in knots (default: 20)"
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
    return {name: getattr(arguments, name) for name in ("steps", "clip_frames", "templates", "verify")}


def export(options: argparse.Namespace) -> None:
    """Runs the command."""
    if options.kind == "verify":
        from lavin_export.verify import from_arguments, shown
        from lavin_rt.cli import print_json

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
    from lavin_rt.devices import gigabytes
    from lavin_rt.manifest import Manifest

    manifest = Manifest.read(options.output)
    if manifest.verification.get("passed"):
        from lavin_export.verify import shown

        print("\n".join(shown(manifest.verification)))
    else:
        print("not verified")
    size = sum(entry["bytes"] for entry in manifest.files.values())
    print(f"{options.output}  {options.kind}, {gigabytes(size)} GB")
