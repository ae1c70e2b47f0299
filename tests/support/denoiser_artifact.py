"""Artifacts of a golden transformer's denoisers alone, their VAE a name without a network, made in a fraction of the
time.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lavin_export.to_onnx.export import TracedPart, denoisers
from lavin_export.to_onnx.support import SupportReport
from lavin_export.writer import ArtifactWriter, writing
from lavin_rt.artifact.load import ArtifactNetwork, opener
from lavin_rt.artifact.manifest import KEPT, Manifest
from lavin_rt.sampling.speeds import Speed
from support.onnx_exports import golden_checkpoint

CPU = torch.device("cpu")
Speeds = Mapping[str, Speed]


def write_onnx(folder: Path, name: str, speeds: Speeds) -> Path:
    """Writes an ONNX artifact of a golden transformer into a folder that is not there; returns it."""

    def write(artifact: ArtifactWriter) -> None:
        for part in denoisers(artifact, artifact.folder, cuda=True):
            artifact.add_part(part.name, part.file, part.weights, part.inputs, part.outputs, part.ranges)

    return _write(folder, "onnx", name, speeds, write)


def write_openvino(folder: Path, name: str, speeds: Speeds, onnx: Path) -> Path:
    """Writes an OpenVINO artifact of the graphs of `write_onnx`'s; returns its folder."""
    from lavin_export.to_openvino.export import write_network
    from lavin_rt.artifact.openvino import import_openvino

    def write(artifact: ArtifactWriter) -> None:
        artifact.versions["openvino"] = import_openvino("a test").__version__
        graphs, parts = shutil.copytree(onnx, folder / "graphs"), Manifest.read(onnx).parts
        fields = [field.name for field in dataclasses.fields(TracedPart)]
        for part in ("denoiser", KEPT):
            known = {"name": part, "support": SupportReport({}, (10, 15), []), **parts[part]}
            write_network(artifact, graphs, TracedPart(**{field: known[field] for field in fields}))

    return _write(folder, "openvino", name, speeds, write)


def _write(folder: Path, kind: str, name: str, speeds: Speeds, write: Callable[[ArtifactWriter], None]) -> Path:
    checkpoint = golden_checkpoint(folder / "checkpoint", name)
    with writing(folder / "artifact", kind, checkpoint, torch.float32, speeds=speeds) as artifact:
        write(artifact)
        for part in ("vae_encoder", "vae_decoder"):
            (artifact.folder / part).write_bytes(part.encode())
            ends = [[{"name": end, "dtype": "float32", "shape": ["rows"]}] for end in ("x", "y")]
            artifact.add_part(part, part, [], *ends, {"rows": [1, 2]})
        artifact.write_modulation()
    return folder / "artifact"


def network_of(folder: Path) -> ArtifactNetwork:
    """An artifact's network, its VAE not opened."""
    manifest = Manifest.read(folder)
    open_part = opener(manifest, CPU)
    return ArtifactNetwork(manifest, CPU, open_part("denoiser"), open_part)
