"""Exported graphs in bfloat16, for which ONNX Runtime lacks some CUDA kernels."""

from __future__ import annotations

import onnx_ir
import pytest
import torch
from support.onnx_exports import assert_for_cuda, cuda_graphs

from lavin_export.networks import vae as vae_parts

FLOAT, BFLOAT16 = onnx_ir.DataType.FLOAT, onnx_ir.DataType.BFLOAT16


@pytest.mark.slow
def test_what_has_no_bfloat16_kernel_is_computed_in_float32(tmp_path):
    """Casts before and behind; weights are stored wide, as norms' are, and inputs and outputs stay in bfloat16."""
    for part, model in cuda_graphs(tmp_path, torch.bfloat16).items():
        assert_for_cuda(part, model, "BFLOAT16")
        if part == "denoiser":
            continue
        outputs = vae_parts.specification("decoder" if "decoder" in part else "encoder", "bfloat16")[1]
        assert [value.name for value in model.graph.outputs] == [output["name"] for output in outputs]
        assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {BFLOAT16}
        weights = {name: value for name, value in model.graph.initializers.items() if not name.startswith("constant.")}
        wide = {name for name, value in weights.items() if value.dtype == FLOAT}
        assert wide == {name for name in weights if ".upsamplers.0." in name or "norm" in name.split(".")[-2]}
