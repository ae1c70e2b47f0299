"""What TensorRT's ONNX parser takes, as facts, and whether a graph keeps to it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir

FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
NUMBERS = FLOATS | {"INT32", "INT64"}
ANY = NUMBERS | {"BOOL"}
OLD = (10, 0)  # supported long before the versions that this package knows


@dataclasses.dataclass(frozen=True)
class Support:
    """TensorRT's support of an operator: the first version with it, the dtypes of its first input, and what else it
    asks for.
    """

    since: tuple[int, int]
    dtypes: frozenset[str]
    note: str = ""


# NVIDIA's operators.md and release notes, of the operators that our graphs use. BFLOAT16 throughout since 10.0.
OPERATORS = {
    "Add": Support(OLD, NUMBERS),
    "Attention": Support((10, 14), FLOATS, "4-D, output Y alone, no softcap, no softmax_precision"),
    "Cast": Support(OLD, ANY),
    "Clip": Support(OLD, FLOATS),
    "Concat": Support(OLD, ANY),
    "Conv": Support(OLD, FLOATS, "2-D or 3-D"),
    "ConvTranspose": Support(OLD, FLOATS, "2-D or 3-D"),
    "Div": Support(OLD, NUMBERS),
    "Expand": Support(OLD, ANY),
    "Gather": Support(OLD, ANY),
    "InstanceNormalization": Support(OLD, FLOATS, "rank 3 to 5, constant scale and bias"),
    "LayerNormalization": Support(OLD, FLOATS),
    "MatMul": Support(OLD, FLOATS),
    "Mul": Support(OLD, NUMBERS),
    "Pad": Support(OLD, NUMBERS),
    "Range": Support(OLD, frozenset({"FLOAT", "INT32", "INT64"})),
    "RMSNormalization": Support((10, 15), FLOATS),
    "ReduceMean": Support(OLD, NUMBERS, "constant axes"),
    "Reshape": Support(OLD, ANY),
    "Shape": Support(OLD, ANY),
    "Sigmoid": Support(OLD, FLOATS),
    "Slice": Support(OLD, ANY, "constant axes"),
    "Sqrt": Support(OLD, FLOATS),
    "Squeeze": Support(OLD, ANY, "constant axes"),
    "Sub": Support(OLD, NUMBERS),
    "Tile": Support(OLD, ANY),
    "Transpose": Support(OLD, ANY),
    "Unsqueeze": Support(OLD, ANY, "constant axes"),
}
CONSTANT_INPUTS = {
    "ReduceMean": (1,),
    "Slice": (3,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "InstanceNormalization": (1, 2),
    "Conv": (1,),
    "ConvTranspose": (1,),
}
MAX_RANK = 8
OPSET = 23


@dataclasses.dataclass(frozen=True)
class SupportReport:
    """What a graph asks of TensorRT.

    Attributes:
        operators: how often each occurs.
        tensorrt: the least version with all of them.
        faults: what TensorRT would not take, a line each.
    """

    operators: dict[str, int]
    tensorrt: tuple[int, int]
    faults: list[str]


def check_support(model: onnx_ir.Model) -> SupportReport:
    """Holds every node of a graph against the table: operator, dtype, rank, constant inputs, Attention's attributes."""
    constants = set(model.graph.initializers)
    faults = [] if model.opset_imports.get("", 0) >= OPSET else [f"opset {model.opset_imports}, expected {OPSET}"]
    since = OLD
    for node in model.graph:
        where = f"{node.op_type} {node.outputs[0].name}"
        known = OPERATORS.get(node.op_type)
        if known is None or node.domain not in ("", "ai.onnx"):
            faults.append(f"{where}: not among the operators that TensorRT is known to support")
            continue
        since = max(since, known.since)
        dtype = next((value.dtype for value in node.inputs if value is not None), None)
        if dtype is not None and dtype.name not in known.dtypes:
            faults.append(f"{where}: {dtype.name}, TensorRT takes {', '.join(sorted(known.dtypes))}")
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.shape is not None and len(value.shape) > MAX_RANK:
                faults.append(f"{where}: {len(value.shape)} dimensions, TensorRT takes {MAX_RANK}")
        for index in CONSTANT_INPUTS.get(node.op_type, ()):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and value.name not in constants:
                faults.append(f"{where}: input {index} is computed, TensorRT wants a constant")
        if node.op_type == "Attention":
            faults += [f"{where}: {fault}" for fault in _attention_faults(node)]
    counted = Counter(node.op_type for node in model.graph)
    return SupportReport(dict(sorted(counted.items())), since, faults)


def _attention_faults(node: Any) -> list[str]:
    """What of an Attention node TensorRT's parser refuses."""
    faults = []
    if len(node.outputs) != 1 or len(node.inputs) > 4:
        faults.append("past keys and values, or more outputs than one")
    softcap = node.attributes.get("softcap")
    if softcap is not None and softcap.as_float() != 0.0:
        faults.append("softcap")
    if "softmax_precision" in node.attributes:
        faults.append("softmax_precision")
    return faults
