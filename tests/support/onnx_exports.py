"""Real exports of the golden models, made once for the tests that look at them."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir
import pytest
import torch

from lavin_export.to_onnx.cuda import cuda_faults
from lavin_export.to_onnx.export import export_onnx, write_graphs
from lavin_export.to_onnx.support import check_support
from lavin_export.writer import writing
from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.find.model import find_checkpoint
from support.golden import GOLDEN


def golden_checkpoint(folder: Path, name: str) -> Checkpoint:
    """A checkpoint folder with one of the golden transformers and the golden VAE."""
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / f"{name}.safetensors", folder / "lavin_dit.safetensors")
    shutil.copy(GOLDEN / "stvae.pt", folder)
    return find_checkpoint(folder)


def exported(folder: Path, name: str, dtype: torch.dtype, **options) -> tuple[Path, Checkpoint]:
    """The verified ONNX artifact of a golden model, and the checkpoint that it was made of."""
    checkpoint = golden_checkpoint(folder / "checkpoint", name)
    export_onnx(checkpoint, folder / "artifact", dtype=dtype, **options)
    return folder / "artifact", checkpoint


def cuda_graphs(folder: Path, dtype: torch.dtype) -> dict[str, onnx_ir.Model]:
    """Every graph of dit_b and the VAE, for pictures and clips of five frames, unverified, by part."""
    checkpoint = golden_checkpoint(folder / "checkpoint", "dit_b")
    with pytest.raises(KeyboardInterrupt), writing(folder / "artifact", "onnx", checkpoint, dtype) as artifact:
        parts = write_graphs(artifact, artifact.folder, [1, 5])
        graphs = {part.name: onnx_ir.load(artifact.folder / part.file) for part in parts}
        raise KeyboardInterrupt
    return graphs


def assert_for_cuda(part: str, model: onnx_ir.Model, dtype: str) -> None:
    """ONNX Runtime has CUDA kernels for all of a part's graph, whose inputs or outputs are of `dtype`, and no work is
    left in it that an export could have done.
    """
    assert not cuda_faults(model)
    assert not check_support(model).faults
    assert not {node.op_type for node in model.graph} & {"InstanceNormalization", "GroupNormalization"}
    assert dtype in [value.dtype.name for value in (*model.graph.inputs, *model.graph.outputs)]
    upsampling = [node for node in model.graph if node.op_type == "ConvTranspose"]
    assert len(upsampling) == (3 if "decoder" in part else 0)
    wide = "FLOAT" if dtype == "BFLOAT16" else dtype
    assert all(value.dtype.name == wide for node in upsampling for value in node.inputs)
    casts = [node for node in model.graph if node.op_type == "Cast" and node.inputs[0].const_value is not None]
    assert not casts, "what is known is cast at export"
