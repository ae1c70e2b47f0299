"""Other engines of a CPU as rungs: the benchmark's model as an artifact, run by the same executor."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from lavin_rt.checkpoint.load import save_dit, save_vae
from lavin_rt.dit.model import JDiT
from lavin_rt.find.model import find_checkpoint
from lavin_rt.pipeline import Pipeline
from lavin_rt.vae.model import STVAE


@dataclasses.dataclass(frozen=True)
class Peer:
    """An engine by the kind of its artifact, and what it computes in."""

    kind: str
    dtype: torch.dtype


class Peers:
    """A model's artifacts in a folder of their own, each exported when it is first asked for.

    Args:
        dit, vae: float32.
        steps: schedules that are asked of them.
    """

    def __init__(self, dit: JDiT, vae: STVAE, steps: Sequence[int]):
        self.dit, self.vae, self.steps = dit, vae, tuple(dict.fromkeys(steps))
        self._folder = tempfile.TemporaryDirectory(prefix="lavin-rt-peers-")

    def pipeline(self, peer: Peer) -> Pipeline:
        """The model by an engine.

        Raises:
            InputError: a package that it needs is missing.
        """
        from lavin_export.to_onnx.export import export_onnx
        from lavin_export.to_openvino.export import export_openvino

        checkpoint, artifact = (Path(self._folder.name) / name for name in ("checkpoint", peer.kind))
        if not (checkpoint / "stvae.safetensors").exists():
            checkpoint.mkdir(exist_ok=True)
            save_dit(self.dit, checkpoint / "lavin_dit.safetensors")
            save_vae(self.vae, checkpoint / "stvae.safetensors")
        if not artifact.exists():
            # What it answers is held against the truth like every other rung.
            export = export_onnx if peer.kind == "onnx" else export_openvino
            export(find_checkpoint(checkpoint), artifact, steps=self.steps, verify=False)
        # Of the two, OpenVINO computes in the dtype that it is asked for.
        dtype = peer.dtype if peer.kind == "openvino" else "auto"
        return Pipeline.from_pretrained(artifact, device="cpu", dtype=dtype)


def peers_of(dtype: torch.dtype) -> dict[str, Peer]:
    """The engines that have this dtype on a CPU, by the names of their rungs; ONNX Runtime computes in float32."""
    found = {"OpenVINO": Peer("openvino", dtype)} if dtype in (torch.float32, torch.bfloat16) else {}
    return found | ({"ONNX Runtime": Peer("onnx", dtype)} if dtype == torch.float32 else {})
