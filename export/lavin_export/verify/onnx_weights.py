"""The weights of an ONNX artifact: one after another, and widened to float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lavin_rt.artifact.manifest import MODULATION, Manifest
from lavin_rt.artifact.onnx_file import check_external_files
from lavin_rt.artifact.parts import Part, TensorSpec
from lavin_rt.errors import missing_extra

if TYPE_CHECKING:
    import onnx_ir

Stored = tuple[str, bool, bool, bytes]
"""A weight's name in the model, whether a matrix product takes it, whether it is float32, and its bytes."""


def stored_weights(manifest: Manifest, part: Part) -> Iterator[Stored]:
    """The weights of an ONNX graph, one in memory at a time.

    Raises:
        InputError: a graph that names other files.
    """
    try:
        import onnx_ir
    except ImportError:
        raise missing_extra("onnx_ir", "onnx", "verifying an ONNX artifact") from None
    for value in _external(_load(manifest, part["file"], part["weights"])):
        constant, (name, _, dtype) = value.const_value, described(value)
        assert constant is not None
        multiplied = any(use.node.op_type == "MatMul" for use in value.uses())
        yield name, multiplied, dtype == onnx_ir.DataType.FLOAT, constant.tobytes()


def widened(manifest: Manifest, folder: Path) -> Manifest:
    """A copy of a 16-bit artifact's graphs in float32, for a machine that cannot compute in 16 bits.

    Every value is exact; only arithmetic rounds less. One weight is in memory at a time.
    """
    import onnx_ir

    half = {torch.bfloat16: onnx_ir.DataType.BFLOAT16, torch.float16: onnx_ir.DataType.FLOAT16}[manifest.dtype]
    parts: dict[str, Part] = {}
    for name, part in manifest.parts.items():
        model = _load(manifest, part["file"], part["weights"])
        graph = model.graph
        for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
            if value.dtype == half:
                value.dtype = onnx_ir.DataType.FLOAT
        for node in graph:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == half:
                node.attributes["to"] = onnx_ir.AttrInt64("to", int(onnx_ir.DataType.FLOAT))
        data = folder / f"{part['file']}.data"
        with open(data, "xb") as file:
            for value in graph.initializers.values():
                constant = value.const_value
                assert constant is not None
                array, external = constant.numpy(), isinstance(constant, onnx_ir.ExternalTensor)
                if value.dtype == half:
                    array = array.astype("float32")
                    value.dtype = onnx_ir.DataType.FLOAT
                if not external:
                    value.const_value = onnx_ir.tensor(array, name=value.name)
                    continue
                offset, written = file.tell(), array.tobytes()
                file.write(written)
                named, shape, dtype = described(value)
                value.const_value = onnx_ir.ExternalTensor(
                    data.name, offset, len(written), dtype, shape=shape, name=named, base_dir=folder
                )
        onnx_ir.save(model, folder / part["file"])
        inputs: list[TensorSpec] = [{**tensor, "dtype": "float32"} for tensor in part["inputs"]]
        outputs: list[TensorSpec] = [{**tensor, "dtype": "float32"} for tensor in part["outputs"]]
        parts[name] = {**part, "inputs": inputs, "outputs": outputs, "weights": [data.name]}
    (folder / MODULATION).symlink_to((manifest.folder / MODULATION).resolve())
    return dataclasses.replace(manifest, folder=folder, dtype=torch.float32, parts=parts, stamps={})


def _load(manifest: Manifest, file: str, weights: list[str]) -> onnx_ir.Model:
    try:
        import onnx_ir
    except ImportError:
        raise missing_extra("onnx_ir", "onnx", "verifying an ONNX artifact") from None
    check_external_files(manifest.folder / file, weights)
    return onnx_ir.load(manifest.folder / file)


def _external(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    import onnx_ir

    values = model.graph.initializers.values()
    return [value for value in values if isinstance(value.const_value, onnx_ir.ExternalTensor)]


def described(value: onnx_ir.Value) -> tuple[str, onnx_ir.Shape, onnx_ir.DataType]:
    """Name, shape and dtype of a weight, which every weight has."""
    assert value.name is not None and value.shape is not None and value.dtype is not None
    return value.name, value.shape, value.dtype
