"""Checkpoint to OpenVINO artifact: the ONNX graphs of `to_onnx`, read by OpenVINO and written in its own form."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from lavin_export.networks.vae import clip_lengths
from lavin_export.options import common_options
from lavin_export.to_onnx import export as to_onnx
from lavin_export.to_openvino.int8 import import_nncf, quantize_denoiser
from lavin_export.to_openvino.shared import save_network, share_weights
from lavin_export.verify.artifact import verify_written
from lavin_export.writer import ArtifactWriter, Speeds, writing
from lavin_rt.artifact.manifest import KEPT, Manifest
from lavin_rt.artifact.openvino import core, import_openvino, precision
from lavin_rt.artifact.parts import Record, Target
from lavin_rt.artifact.speeds import named_speeds
from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.devices import resolve_device, resolve_dtype
from lavin_rt.errors import InputError, one_line
from lavin_rt.files import Progress, scratch
from lavin_rt.find.model import find_checkpoint
from lavin_rt.pictures.context import task_folders

CPU: Target = {"device": "cpu", "compute_capability": None}


def export_openvino(
    checkpoint: Checkpoint,
    output: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
    calibrate: str | os.PathLike | None = None,
    steps: Sequence[int] = (20,),
    speeds: Speeds = (),
    clip_frames: Sequence[int] = (),
    templates: bool = True,
    verify: bool = True,
    progress: Progress | None = None,
) -> Manifest:
    """Writes an OpenVINO artifact: a network is an XML file, and its weights in float32, every size dynamic.

    Weights go from file to file, none but the VAE's (0.9 GB) is held in memory; beside a network there is room on disk
    for its ONNX graph as long as it is made.

    Args:
        checkpoint: what `find_checkpoint` found.
        output: the artifact's folder; must not exist, or be empty.
        dtype: float32 or bfloat16, that it computes in where it is not asked for the other one.
        int8: the denoiser's products of weights, see `int8.quantize_denoiser`.
        calibrate: folder of tasks' folders to quantise with; by default the checkpoint's templates.
        steps: schedules to tabulate the modulation of.
        speeds: that it shall serve besides `exact`; see `lavin_export.writer.writing`.
        clip_frames: frame counts `1 + 4 k` of clips to export the VAE for, besides pictures.
        templates: copy the checkpoint's templates.
        verify: run the parts against the plain model; an artifact that fails leaves nothing behind.
        progress: `(bytes of weights written, bytes in all)` of the denoiser.

    Raises:
        InputError: what of these cannot be used, or a package that is missing.
        VerificationError: a result beyond its error budget.
    """
    openvino = import_openvino("exporting to OpenVINO")
    version = openvino.__version__.partition("-")[0]
    precision(dtype, output)
    lengths, tasks = clip_lengths(clip_frames), calibrate or checkpoint.templates
    keeping = [name for name, speed in named_speeds(speeds).items() if speed.keeps]
    if int8 and keeping:
        raise InputError(
            f"speed {keeping[0]} keeps keys and values of the context, which artifacts in int8 do not: leave out "
            "that speed, or --int8"
        )
    if int8:
        import_nncf()
        if tasks is None or not task_folders(tasks):
            raise InputError(
                f"int8 is calibrated on tasks, and {tasks or checkpoint.source} has none; expected a folder of tasks' "
                "folders: --calibrate DIR"
            )
    options: Record = {"clip_frames": list(clip_frames), "int8": int8}
    with (
        writing(output, "openvino", checkpoint, torch.float32, CPU, options, steps, templates, speeds) as artifact,
        scratch(artifact.folder.parent) as graphs,
    ):
        artifact.computes_in = dtype
        artifact.versions |= {"openvino": version}
        for part in to_onnx.graphs(artifact, graphs, lengths, progress):
            write_network(artifact, graphs, part)
        artifact.write_modulation()
        if int8 and tasks is not None:
            artifact.versions["nncf"] = import_nncf().__version__
            quantize_denoiser(artifact.write_manifest(), Path(tasks))
            artifact.parts["denoiser"]["quantized"] = "int8"
        if verify:
            verify_written(artifact)
    return Manifest.read(output)


def write_network(artifact: ArtifactWriter, graphs: Path, part: to_onnx.TracedPart) -> None:
    """Writes a graph that lies in `graphs` as a network of the artifact, and enters it; the graph's files go, but for
    weights that the next one names, too.
    """
    openvino = import_openvino("exporting to OpenVINO")
    version = artifact.versions["openvino"]
    network, weights = f"{part.name}.xml", f"{part.name}.bin"
    try:
        model = core(openvino).read_model(str(graphs / part.file))
    except Exception as error:  # OpenVINO's errors have no common type
        raise InputError(
            f"OpenVINO {version} cannot read the graph of the {part.name} ({one_line(error, 400)}); "
            "install a newer one: pip install -U 'lavin-rt[openvino]'"
        ) from error
    save_network(openvino, model, artifact.folder / network)
    del model  # which maps the files that go now
    (graphs / part.file).unlink()
    if not (part.name == "denoiser" and artifact.keeps):  # whose weights the next one names, too
        for name in part.weights:
            (graphs / name).unlink()
    if part.name == KEPT:
        share_weights(artifact.folder / network, artifact.folder / "denoiser.xml")
        weights = "denoiser.bin"
    artifact.add_part(part.name, network, [weights], part.inputs, part.outputs, part.ranges)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lavin-rt export openvino` that the other formats do not have."""
    parser.add_argument(
        "--int8", action="store_true", help="quantise the denoiser to int8, where a processor has fast products of it"
    )
    parser.add_argument(
        "--calibrate", metavar="DIR", help="folder of tasks' folders to quantise with (default: the checkpoint's own)"
    )


def from_arguments(arguments: argparse.Namespace) -> Manifest:
    """Runs `lavin-rt export openvino`."""
    from lavin_rt.console import Progress as Bars

    import_openvino("exporting to OpenVINO")
    device = resolve_device("cpu" if arguments.device == "auto" else arguments.device)
    if device.type != "cpu":
        raise InputError(f"OpenVINO artifacts run on a CPU; the device is {device}: leave --device out")
    checkpoint = find_checkpoint(arguments.checkpoint, revision=arguments.revision)
    with Bars(arguments.quiet).bar("writing weights", "B") as progress:
        return export_openvino(
            checkpoint,
            arguments.output,
            dtype=resolve_dtype("float32" if arguments.dtype == "auto" else arguments.dtype, device),
            int8=arguments.int8,
            calibrate=arguments.calibrate,
            progress=progress,
            **common_options(arguments),
        )
