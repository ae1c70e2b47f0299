"""Exported graphs against the table of ONNX Runtime's CUDA kernels; float32's are in `test_export_onnx`."""

from __future__ import annotations

import onnx
import onnx.reference
import onnx_ir
import pytest
import torch
from support.onnx_exports import assert_for_cuda, cuda_graphs

from lavin_export.to_onnx import graph as onnx_graph
from lavin_export.to_onnx.cuda import KERNELS, cuda_faults

FLOAT = onnx_ir.DataType.FLOAT


@pytest.mark.slow
def test_every_node_has_a_cuda_kernel(tmp_path):
    for part, model in cuda_graphs(tmp_path, torch.float16).items():
        assert_for_cuda(part, model, "FLOAT16")


def test_a_group_norm_from_means_is_a_group_norm():
    """To float32's precision, means far from zero among them, in ONNX's own evaluation."""
    x = torch.randn(2, 8, 5, 7) * 3 + 100
    norm = torch.nn.Sequential()
    norm.forward = lambda x: torch.nn.functional.group_norm(x, 4, eps=1e-6)
    described = [{"name": "x", "shape": list(x.shape)}], [{"name": "y", "shape": list(x.shape)}]
    graph = onnx_graph.trace(norm, [x.to("meta")], None, *described, cuda=True)
    assert not cuda_faults(graph.model)
    [result] = onnx.reference.ReferenceEvaluator(onnx_ir.serde.serialize_model(graph.model)).run(None, {"x": x.numpy()})
    truth = torch.nn.functional.group_norm(x.double(), 4, eps=1e-6)
    assert (torch.from_numpy(result).double() - truth).abs().max() <= 1e-4


def test_the_table_refuses():
    """An operator without a kernel, one of a version without one, and a dtype without one."""

    def faults(operator: str, dtype: onnx_ir.DataType, **attributes) -> list[str]:
        value = onnx_ir.Value(name="x", shape=onnx_ir.Shape([1, 2, 3]), type=onnx_ir.TensorType(dtype))
        node = onnx_ir.node(operator, [value], attributes)
        graph = onnx_ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 23})
        return cuda_faults(onnx_ir.Model(graph, ir_version=11))

    assert "kernel for it" in faults("Hardmax", FLOAT)[0]
    assert "version 22, ONNX Runtime's CUDA kernel is of 6" in faults("InstanceNormalization", FLOAT)[0]
    assert "BFLOAT16" in faults("Clip", onnx_ir.DataType.BFLOAT16)[0]
    assert not faults("Clip", onnx_ir.DataType.FLOAT16) and not faults("Sigmoid", onnx_ir.DataType.BFLOAT16)
    for name, kernel in KERNELS.items():
        version = onnx.defs.get_schema(name, 23).since_version
        assert kernel.serves(version) != (name == "InstanceNormalization"), name
