"""Exported graphs against the table of ONNX Runtime's CUDA kernels."""

from __future__ import annotations

import onnx
import onnx.reference
import onnx_ir
import pytest
import torch
from support.onnx_exports import golden_checkpoint
from support.vae_shapes import SMALL

from lavin_export.networks import vae as vae_parts
from lavin_export.to_onnx import export as to_onnx
from lavin_export.to_onnx import graph as onnx_graph
from lavin_export.to_onnx.cuda import KERNELS, cuda_faults
from lavin_export.to_onnx.support import check_support
from lavin_export.writer import writing
from lavin_rt.vae.model import STVAE

FLOAT = onnx_ir.DataType.FLOAT


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """`graphs(dtype)`: every graph of dit_b and the VAE as ONNX files for CUDA, unverified, by part."""
    made: dict[torch.dtype, dict[str, onnx_ir.Model]] = {}

    def of(dtype: torch.dtype) -> dict[str, onnx_ir.Model]:
        if dtype not in made:
            folder = tmp_path_factory.mktemp("graphs")
            checkpoint = golden_checkpoint(folder / "checkpoint", "dit_b")
            with pytest.raises(KeyboardInterrupt), writing(folder / "a", "onnx", checkpoint, dtype) as artifact:
                parts = to_onnx.write_graphs(artifact, artifact.folder, [1, 5])
                made[dtype] = {part.name: onnx_ir.load(artifact.folder / part.file) for part in parts}
                raise KeyboardInterrupt
        return made[dtype]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_node_has_a_cuda_kernel(graphs, dtype):
    for name, model in graphs(dtype).items():
        assert not cuda_faults(model), name
        assert not check_support(model).faults, name
        operators = {node.op_type for node in model.graph}
        assert not operators & {"InstanceNormalization", "GroupNormalization"}
        described = [value.dtype.name.lower() for value in (*model.graph.inputs, *model.graph.outputs)]
        assert str(dtype).removeprefix("torch.").replace("float32", "float") in described
        casts = [node for node in model.graph if node.op_type == "Cast" and node.inputs[0].const_value is not None]
        assert not casts, "what is known is cast at export"
    wide = [node for node in graphs(dtype)["vae_decoder"].graph if node.op_type == "ConvTranspose"]
    expected = onnx_ir.DataType.FLOAT16 if dtype == torch.float16 else onnx_ir.DataType.FLOAT
    assert len(wide) == 3 and all(value.dtype == expected for node in wide for value in node.inputs)


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


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_what_has_no_bfloat16_kernel_is_computed_in_float32(part):
    """Casts before and behind; weights are stored wide, and inputs and outputs stay what the manifest says."""
    module = vae_parts.in_dtype(vae_parts.NETWORKS[part](STVAE(SMALL)), torch.bfloat16)
    module, values = onnx_graph.on_meta(module)
    examples = [tensor.to("meta") for tensor in vae_parts.example_inputs(part, torch.bfloat16)]
    described = vae_parts.specification(part, "bfloat16")[:2]
    graph = onnx_graph.trace(module, examples, vae_parts.dynamic_shapes(part), *described, cuda=True)
    assert not cuda_faults(graph.model)
    assert graph.widened == {name for name in values if ".upsamplers.0." in name}
    ends = (*graph.model.graph.inputs, *graph.model.graph.outputs)
    assert {value.dtype for value in ends} == {onnx_ir.DataType.BFLOAT16}
    assert [value.name for value in graph.model.graph.outputs] == [output["name"] for output in described[1]]
