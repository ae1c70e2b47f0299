"""What ONNX Runtime's CUDA provider has kernels for, as facts, and graphs that keep to it.

A node without a kernel falls to the CPU, which takes a copy there and back, and makes ONNX Runtime refuse to capture
the graph at all.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lavin_export.to_onnx.support import OPSET

if TYPE_CHECKING:
    import onnx_ir

FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
WITHOUT_BFLOAT16 = frozenset({"FLOAT", "FLOAT16"})
NUMBERS = FLOATS | {"INT32", "INT64"}
ANY = NUMBERS | {"BOOL"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A registration: the operator's versions from `first` to `last`, and the dtypes of its first input.

    A registration without an end, `last` None, serves its first version alone: ONNX Runtime does not take a kernel for
    an operator that has changed since.
    """

    first: int
    last: int | None
    dtypes: frozenset[str]

    def serves(self, version: int) -> bool:
        return version == self.first if self.last is None else self.first <= version <= self.last


# docs/OperatorKernels.md of ONNX Runtime, "Operators implemented by CUDAExecutionProvider", with opset 23 and later;
# InstanceNormalization is here for what it lacks, a kernel of version 22.
KERNELS = {
    "Add": Kernel(14, None, NUMBERS),
    "Attention": Kernel(23, 23, FLOATS),
    "Cast": Kernel(23, 24, ANY),
    "Clip": Kernel(13, None, WITHOUT_BFLOAT16 | {"INT64"}),
    "Concat": Kernel(13, None, ANY),
    "Conv": Kernel(22, None, FLOATS),
    "ConvTranspose": Kernel(22, None, WITHOUT_BFLOAT16),
    "Div": Kernel(14, None, NUMBERS),
    "Expand": Kernel(13, None, ANY),
    "Gather": Kernel(13, None, ANY),
    "InstanceNormalization": Kernel(6, None, WITHOUT_BFLOAT16),
    "LayerNormalization": Kernel(17, None, FLOATS),
    "MatMul": Kernel(13, None, FLOATS),
    "Mul": Kernel(14, None, NUMBERS),
    "Pad": Kernel(23, 23, WITHOUT_BFLOAT16 | {"BOOL"}),
    "RMSNormalization": Kernel(23, None, FLOATS),
    "Range": Kernel(11, 26, frozenset({"FLOAT", "INT32", "INT64"})),
    "ReduceMean": Kernel(18, None, WITHOUT_BFLOAT16 | {"INT32"}),
    "Reshape": Kernel(23, 24, ANY),
    "Shape": Kernel(23, 24, ANY),
    "Sigmoid": Kernel(13, None, FLOATS),
    "Slice": Kernel(13, None, ANY),
    "Sqrt": Kernel(13, None, FLOATS),
    "Squeeze": Kernel(23, 23, ANY),
    "Sub": Kernel(14, None, NUMBERS),
    "Tile": Kernel(13, None, NUMBERS),
    "Transpose": Kernel(23, 24, ANY),
    "Unsqueeze": Kernel(23, 23, ANY),
}


def cuda_faults(model: onnx_ir.Model) -> list[str]:
    """The nodes that would not run on CUDA, a line each: no kernel, none of the operator's version, or of the dtype."""
    import onnx

    faults = []
    for node in model.graph:
        where, kernel = f"{node.op_type} {node.outputs[0].name}", KERNELS.get(node.op_type)
        if kernel is None or node.domain not in ("", "ai.onnx"):
            faults.append(f"{where}: ONNX Runtime is not known to have a CUDA kernel for it")
            continue
        version = onnx.defs.get_schema(node.op_type, model.opset_imports.get("", OPSET)).since_version
        if not kernel.serves(version):
            faults.append(f"{where}: version {version}, ONNX Runtime's CUDA kernel is of {kernel.first}")
        dtype = next((value.dtype for value in node.inputs if value is not None), None)
        if dtype is not None and dtype.name not in kernel.dtypes:
            faults.append(f"{where}: {dtype.name}, ONNX Runtime's CUDA kernel takes {', '.join(sorted(kernel.dtypes))}")
    return faults


def group_norm(x, num_groups, weight=None, bias=None, eps=1e-05, cudnn_enabled=False):
    """Group norm without weights from means and products: of InstanceNormalization and GroupNormalization the CUDA
    provider has no kernels of the versions that opset 23 has. A translation of `aten.group_norm`.
    """
    from onnxscript import opset23 as op

    if weight is not None or bias is not None:
        raise RuntimeError("group norms are traced without weights; multiply and add behind them")
    split: Any = op.Constant(value_ints=[0, num_groups, -1])
    groups = op.Reshape(x, split)
    last: Any = op.Constant(value_ints=[-1])
    centred = op.Sub(groups, op.ReduceMean(groups, last, keepdims=1))
    variance = op.ReduceMean(op.Mul(centred, centred), last, keepdims=1)
    normed = op.Div(centred, op.Sqrt(op.Add(variance, op.Constant(value_float=eps))))
    return op.Reshape(normed, op.Shape(x))


def cast_around(graph: onnx_ir.Graph, weights: set[str]) -> set[str]:
    """Computes in float32 what has no bfloat16 kernel: casts before and behind it.

    Args:
        graph: whose nodes are changed.
        weights: names of values that have none yet.

    Returns:
        those of the weights that are now wanted in float32, so that nothing casts them again and again.
    """
    import onnx_ir

    half, single = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT
    widened: set[str] = set()
    for node in list(graph):
        kernel, result = KERNELS.get(node.op_type), node.outputs[0]
        read = node.inputs[0]
        if kernel is None or half.name in kernel.dtypes or read is None or read.dtype != half:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != half:
                continue
            if value.name in weights and len(value.uses()) == 1:
                value.dtype = single
                widened.add(value.name)
                continue
            node.replace_input_with(index, _wide(graph, node, value))
        uses, name = list(result.uses()), result.name
        cast = onnx_ir.node("Cast", [result], {"to": half})
        graph.insert_after(node, cast)
        narrow = cast.outputs[0]
        narrow.dtype, narrow.shape, result.dtype, result.name, narrow.name = (
            half,
            result.shape,
            single,
            f"{name}_wide",
            name,
        )
        for user, index in uses:
            user.replace_input_with(index, narrow)
        for index, output in enumerate(graph.outputs):
            if output is result:
                graph.outputs[index] = narrow
    return widened


def _wide(graph: onnx_ir.Graph, node: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value:
    """A value in float32, ahead of a node: a constant made anew, anything else cast."""
    import onnx_ir

    if value.const_value is not None:
        name = f"{value.name}_wide"
        wide = onnx_ir.Value(name=name, shape=value.shape, type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
        wide.const_value = onnx_ir.tensor(value.const_value.numpy().astype("float32"), name=name)
        graph.initializers[name] = wide
        return wide
    cast = onnx_ir.node("Cast", [value], {"to": onnx_ir.DataType.FLOAT})
    cast.outputs[0].dtype, cast.outputs[0].shape = onnx_ir.DataType.FLOAT, value.shape
    graph.insert_before(node, cast)
    return cast.outputs[0]
