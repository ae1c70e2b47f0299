"""Checkpoint to TensorRT artifact: plans built on the GPU at hand from the ONNX graphs of `to_onnx`.

Written against NVIDIA's Python bindings of TensorRT 10.16 and 11.4 and checked with them; the project has not yet built
an engine with the real libraries.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lavin_export.networks.denoiser import RANGES
from lavin_export.networks.vae import ROWS, clip_lengths
from lavin_export.options import common_options
from lavin_export.to_onnx import export as to_onnx
from lavin_export.to_tensorrt.build import BuildOptions, build_plan
from lavin_export.to_tensorrt.profiles import Profile, for_vae, parse, with_null_branches
from lavin_export.verify.artifact import verify_written
from lavin_export.writer import ArtifactWriter, Speeds, writing
from lavin_rt.artifact.manifest import Manifest
from lavin_rt.artifact.parts import Target
from lavin_rt.artifact.tensorrt_library import import_tensorrt, version_numbers
from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.devices import resolve_device, resolve_dtype
from lavin_rt.errors import InputError
from lavin_rt.files import Progress, check_writable, scratch
from lavin_rt.find.model import find_checkpoint

DEFAULT_PROFILE = "batch=1,pairs=4,height=512,width=512"
GIB = 2**30


def export_tensorrt(
    checkpoint: Checkpoint,
    output: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.bfloat16,
    profiles: Sequence[Profile] = (),
    options: BuildOptions | None = None,
    keep_onnx: bool = False,
    steps: Sequence[int] = (20,),
    speeds: Speeds = (),
    clip_frames: Sequence[int] = (),
    templates: bool = True,
    verify: bool = True,
    device: torch.device | str = "cuda",
    quiet: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Builds the plans of a checkpoint: denoiser, VAE encoder and VAE decoder.

    Engines are strongly typed: their dtypes are the graph's. Every attention operator may be taken apart where TensorRT
    has no fused kernel; `build.attention` of a manifest's part says how many are fused. Beside each plan lies
    `NAME.layers.json`, the layers that it consists of.

    Args:
        checkpoint: what `find_checkpoint` found.
        output: the artifact's folder; must not exist, or be empty.
        dtype: that the networks compute in.
        profiles: sizes to build for; 512 pixels and 4 pairs by default. Guidance's null branch gets one of its own for
            each.
        options: of the builder; see `BuildOptions`.
        keep_onnx: keep the graphs beside the plans.
        steps: schedules to tabulate the modulation of.
        speeds: that it shall serve besides `exact`; see `lavin_export.writer.writing`.
        clip_frames: frame counts `1 + 4 k` of clips to build the VAE for, besides pictures.
        templates: copy the checkpoint's templates.
        verify: run the parts against the plain model; an artifact that fails leaves nothing behind.
        device: the GPU to build on and for.
        quiet: no progress bars of the builder.
        progress: `(bytes of weights written, bytes in all)` of the denoiser's graph.

    Raises:
        InputError: what of these cannot be used, TensorRT or a GPU is missing, or the parser refuses a graph.
        VerificationError: a result beyond its error budget.
        RuntimeError: TensorRT cannot build an engine.
    """
    trt = import_tensorrt("exporting to TensorRT")
    device, options = resolve_device(device), options or BuildOptions()
    if device.type != "cuda":
        raise InputError(f"TensorRT builds on the GPU that the plan is for; the device is {device}; use --device cuda")
    lengths = clip_lengths(clip_frames)
    wanted = with_null_branches(profiles or [parse(DEFAULT_PROFILE)])
    _check_profiles(wanted)
    if options.timing_cache is not None:
        check_writable(options.timing_cache)
    target: Target = {"device": "cuda", "compute_capability": list(torch.cuda.get_device_capability(device))}
    with (
        torch.cuda.device(device),
        writing(output, "tensorrt", checkpoint, dtype, target, _record(options), steps, templates, speeds) as artifact,
        scratch(artifact.folder.parent) as graphs,
    ):
        artifact.versions |= {"tensorrt": trt.__version__, "gpu": torch.cuda.get_device_name(device)}
        folder = artifact.folder if keep_onnx else graphs
        for part in to_onnx.graphs(artifact, folder, lengths, progress):
            build_part(trt, artifact, part, folder, wanted, options, quiet=quiet)
            if not keep_onnx:
                for name in (part.file, *part.weights):
                    (folder / name).unlink()
        artifact.write_modulation()
        if verify:
            verify_written(artifact, device)
    return Manifest.read(output)


def _check_profiles(profiles: Sequence[Profile]) -> None:
    """Raises an `InputError` for sizes that the graphs do not take."""
    limits = {**RANGES, "height": (RANGES["height"][0], ROWS[1]), "width": (RANGES["width"][0], ROWS[1])}
    for profile in profiles:
        for name, (low, high) in limits.items():
            size = getattr(profile, name)
            if size.least < low or size.most > high:
                raise InputError(
                    f"a profile's {name} is {size.least} to {size.most}; the graph takes {low} to {high} (in latents)"
                )


def build_part(
    trt: ModuleType,
    artifact: ArtifactWriter,
    part: to_onnx.TracedPart,
    folder: Path,
    profiles: Sequence[Profile],
    options: BuildOptions,
    *,
    quiet: bool = False,
) -> None:
    """Builds the plan of one graph in `folder` and enters it into the artifact."""
    if version_numbers(trt.__version__)[:2] < part.support.tensorrt:
        needs = ".".join(map(str, part.support.tensorrt))
        raise InputError(f"{part.name} needs TensorRT {needs} or newer; {trt.__version__} is installed")
    wanted = profiles if part.name == "denoiser" else for_vae(profiles)
    report = build_plan(
        trt,
        folder / part.file,
        artifact.folder / f"{part.name}.plan",
        [profile.bounds(part.inputs) for profile in wanted],
        options,
        layer_file=artifact.folder / f"{part.name}.layers.json",
        quiet=quiet,
    )
    ranges = [profile.ranges(part.inputs) for profile in wanted]
    artifact.add_part(part.name, f"{part.name}.plan", [], part.inputs, part.outputs, ranges, build=report.as_dict())


def _record(options: BuildOptions) -> dict[str, Any]:
    """What the manifest keeps of the options; no path of this machine."""
    return {"optimization_level": options.optimization_level, "tf32": options.tf32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lavin-rt export tensorrt` that the other formats do not have."""
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument(
        "--profile",
        action="append",
        metavar="SIZES",
        help="sizes to build for, such as height=512,width=256:512:1024,pairs=2:4,batch=1:1:4: a number, LEAST:MOST "
        "(tuned for the most) or LEAST:TUNED:MOST, in pixels, context pairs (or cond_frames), target_frames and "
        f"queries; again for another profile (default: {DEFAULT_PROFILE})",
    )
    build = parser.add_argument_group("engine")
    build.add_argument("--keep-onnx", action="store_true", help="keep the ONNX graphs in the artifact")
    build.add_argument("--tf32", action="store_true", help="float32 products may round their inputs to TF32")
    build.add_argument(
        "--optimization-level",
        type=int,
        default=4,
        metavar="0..5",
        help="how long the build may look for fast kernels, 5 the longest (default: 4)",
    )
    build.add_argument(
        "--workspace", type=float, metavar="GIB", help="most scratch memory of a layer (default: TensorRT's)"
    )
    build.add_argument("--timing-cache", type=Path, metavar="FILE", help="kernel timings, read and written")


def from_arguments(arguments: argparse.Namespace) -> Manifest:
    """Runs `lavin-rt export tensorrt`."""
    from lavin_rt.console import Progress as Bars

    import_tensorrt("exporting to TensorRT")
    device = resolve_device("cuda" if arguments.device == "auto" else arguments.device)
    workspace = None if arguments.workspace is None else arguments.workspace * GIB
    if workspace is not None and not 1 <= workspace < 2**63:
        raise InputError(f"--workspace is {arguments.workspace} GiB; expected a positive number, less than 2^33")
    options = BuildOptions(
        optimization_level=arguments.optimization_level,
        workspace=None if workspace is None else int(workspace),
        tf32=arguments.tf32,
        timing_cache=arguments.timing_cache,
    )
    profiles = [parse(text) for text in arguments.profile or []]
    checkpoint = find_checkpoint(arguments.checkpoint, revision=arguments.revision)
    with Bars(arguments.quiet).bar("writing weights", "B") as progress:
        return export_tensorrt(
            checkpoint,
            arguments.output,
            dtype=resolve_dtype(arguments.dtype, device),
            profiles=profiles,
            options=options,
            keep_onnx=arguments.keep_onnx,
            device=device,
            quiet=arguments.quiet,
            progress=progress,
            **common_options(arguments),
        )
