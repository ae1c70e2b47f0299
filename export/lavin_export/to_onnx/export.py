"""Checkpoint to ONNX artifact: graphs traced without weights, the weights streamed from the checkpoint behind them."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lavin_export.networks import denoiser as denoiser_part
from lavin_export.networks import kept_denoiser
from lavin_export.networks import vae as vae_parts
from lavin_export.networks.denoiser import BranchDenoiser
from lavin_export.networks.weights import denoiser_weights
from lavin_export.options import common_options
from lavin_export.to_onnx import graph as onnx_graph
from lavin_export.to_onnx.support import SupportReport
from lavin_export.verify.artifact import verify_written
from lavin_export.writer import ArtifactWriter, Speeds, writing
from lavin_rt.artifact.manifest import KEPT, Manifest
from lavin_rt.artifact.parts import Ranges, TensorSpec
from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.devices import resolve_device, resolve_dtype
from lavin_rt.dit.model import JDiT
from lavin_rt.errors import missing_extra
from lavin_rt.files import Progress
from lavin_rt.find.model import find_checkpoint


@dataclasses.dataclass(frozen=True, eq=False)
class TracedPart:
    """A network as an ONNX file.

    Attributes:
        name: in the manifest.
        file, weights: the file's name, and those of the files with its weights.
        inputs, outputs, ranges: as the manifest has them.
        support: what the graph asks of TensorRT.
    """

    name: str
    file: str
    weights: list[str]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    ranges: Ranges
    support: SupportReport


def export_onnx(
    checkpoint: Checkpoint,
    output: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    steps: Sequence[int] = (20,),
    speeds: Speeds = (),
    clip_frames: Sequence[int] = (),
    templates: bool = True,
    verify: bool = True,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Manifest:
    """Writes an ONNX artifact: opset 23, native Attention and RMSNormalization, every size dynamic.

    The transformer's weights go from file to file one at a time; the VAE's (0.9 GB) are held in memory.

    Args:
        checkpoint: what `find_checkpoint` found.
        output: the artifact's folder; must not exist, or be empty.
        dtype: float32, float16 or bfloat16 (which ONNX Runtime computes on CUDA only).
        steps: schedules to tabulate the modulation of.
        speeds: that it shall serve besides `exact`; see `lavin_export.writer.writing`.
        clip_frames: frame counts `1 + 4 k` of clips to export the VAE for, besides pictures.
        templates: copy the checkpoint's templates.
        verify: run the parts against the plain model; an artifact that fails leaves nothing behind.
        device: to verify on.
        progress: `(bytes of weights written, bytes in all)` of the denoiser.

    Raises:
        InputError: what of these cannot be used, or a package that is missing.
        VerificationError: a result beyond its error budget.
    """
    try:
        import onnx
        import onnxscript
    except ImportError as error:
        raise missing_extra(error.name or "onnx", "onnx", "exporting to ONNX") from None
    lengths = vae_parts.clip_lengths(clip_frames)
    options = {"clip_frames": list(clip_frames), "opset": onnx_graph.OPSET}
    with writing(output, "onnx", checkpoint, dtype, None, options, steps, templates, speeds) as artifact:
        artifact.versions |= {"onnx": onnx.__version__, "onnxscript": onnxscript.__version__}
        for part in write_graphs(artifact, artifact.folder, lengths, progress):
            needs = {"tensorrt": ".".join(map(str, part.support.tensorrt)), "operators": part.support.operators}
            artifact.add_part(part.name, part.file, part.weights, part.inputs, part.outputs, part.ranges, needs=needs)
        artifact.write_modulation()
        if verify:
            verify_written(artifact, device)
    return Manifest.read(output)


def write_graphs(
    artifact: ArtifactWriter, folder: Path, lengths: Sequence[int], progress: Progress | None = None
) -> list[TracedPart]:
    """Writes the denoiser and the VAE's networks, for clips of these numbers of frames, as ONNX files into a folder, of
    nodes that ONNX Runtime has kernels for on a CPU and on CUDA.
    """
    import onnx

    parts = list(graphs(artifact, folder, lengths, progress, cuda=True))
    for part in parts:
        onnx.checker.check_model(str(folder / part.file), full_check=True)
    return parts


def graphs(
    artifact: ArtifactWriter, folder: Path, lengths: Sequence[int], progress: Progress | None, cuda: bool = False
) -> Iterator[TracedPart]:
    """The graphs of `write_graphs` one after another, each written when it is asked for; with `cuda` ONNX Runtime has
    CUDA kernels for all of them.
    """
    yield from denoisers(artifact, folder, progress, cuda)
    for frames in lengths:
        for part in ("encoder", "decoder"):
            yield write_vae(artifact, folder, part, frames, cuda)


def denoisers(
    artifact: ArtifactWriter, folder: Path, progress: Progress | None = None, cuda: bool = False
) -> Iterator[TracedPart]:
    """Writes `denoiser.onnx` and `denoiser.onnx.data`, and where the artifact's speeds keep keys and values
    `denoiser_kept.onnx`, of the same weights; with `cuda` ONNX Runtime has CUDA kernels for all of it.
    """
    config, dtype = artifact.config, artifact.dtype
    specification = denoiser_part.specification(config, artifact.dtype_name)
    inputs, outputs, ranges = specification
    with torch.device("meta"):
        module = BranchDenoiser(JDiT(config).to(dtype))
    examples = [tensor.to("meta") for tensor in denoiser_part.example_inputs(config, dtype)]
    graph = onnx_graph.trace(module, examples, denoiser_part.dynamic_shapes(), inputs, outputs, cuda)
    weights = ["denoiser.onnx.data"]
    onnx_graph.write(graph, folder / "denoiser.onnx", denoiser_weights(artifact.file, config, dtype), progress)
    yield TracedPart("denoiser", "denoiser.onnx", weights, inputs, outputs, ranges, graph.support)
    if not artifact.keeps:
        return
    inputs, outputs, ranges = kept_denoiser.specification(config, artifact.dtype_name)
    kept = kept_denoiser.KeptDenoiser(module)
    examples = [tensor.to("meta") for tensor in kept_denoiser.example_inputs(config, dtype)]
    kept_graph = onnx_graph.trace(kept, examples, kept_denoiser.dynamic_shapes(), inputs, outputs, cuda)
    onnx_graph.write_sharing(kept_graph, folder / f"{KEPT}.onnx", graph)
    yield TracedPart(KEPT, f"{KEPT}.onnx", weights, inputs, outputs, ranges, kept_graph.support)


def write_vae(artifact: ArtifactWriter, folder: Path, part: str, frames: int, cuda: bool = False) -> TracedPart:
    """Writes the VAE's "encoder" or "decoder" for clips of so many frames; `cuda` as above."""
    name = vae_parts.part_name(part, frames)
    inputs, outputs, ranges = vae_parts.specification(part, artifact.dtype_name, frames)
    module, values = onnx_graph.on_meta(vae_module(artifact, part, frames))
    examples = [tensor.to("meta") for tensor in vae_parts.example_inputs(part, artifact.dtype, frames)]
    graph = onnx_graph.trace(module, examples, vae_parts.dynamic_shapes(part), inputs, outputs, cuda)
    onnx_graph.write(graph, folder / f"{name}.onnx", values.__getitem__)
    return TracedPart(name, f"{name}.onnx", [f"{name}.onnx.data"], inputs, outputs, ranges, graph.support)


def vae_module(artifact: ArtifactWriter, part: str, frames: int) -> torch.nn.Module:
    """The module that is traced, with its weights in the artifact's dtype."""
    return vae_parts.in_dtype(vae_parts.NETWORKS[part](artifact.vae(), frames), artifact.dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lavin-rt export onnx` that the other formats do not have: none."""


def from_arguments(arguments: argparse.Namespace) -> Manifest:
    """Runs `lavin-rt export onnx`."""
    from lavin_rt.console import Progress as Bars

    device = resolve_device("cpu" if arguments.device == "auto" else arguments.device)
    dtype = resolve_dtype("float32" if arguments.dtype == "auto" else arguments.dtype, device)
    checkpoint = find_checkpoint(arguments.checkpoint, revision=arguments.revision)
    with Bars(arguments.quiet).bar("writing weights", "B") as progress:
        return export_onnx(
            checkpoint,
            arguments.output,
            dtype=dtype,
            device=device,
            progress=progress,
            **common_options(arguments),
        )
