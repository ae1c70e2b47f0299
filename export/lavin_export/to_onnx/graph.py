"""From a module without weights to an ONNX file with them: traced, tidied, its weights streamed.

The exporter sees modules on the meta device only. Its optimiser must not fold what it takes for constants, which would
lose the weights' names: they are the graph's inputs while it works. Transposes of weights, which are left, are done
once, while the weights are written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lavin_export.to_onnx import cuda as onnx_cuda
from lavin_export.to_onnx.support import OPSET, SupportReport, check_support
from lavin_export.verify.onnx_weights import described
from lavin_rt.artifact.parts import TensorSpec
from lavin_rt.errors import missing_extra
from lavin_rt.files import Progress

if TYPE_CHECKING:
    import onnx_ir

ALIGNMENT = 4096  # a page: the runtime maps weights into memory
IR_VERSION = 11


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A traced graph whose weights have no values yet.

    Attributes:
        model: the intermediate representation.
        transposed: names of weights that are stored transposed.
        widened: names of bfloat16 weights that are stored in float32.
        support: what it asks of TensorRT.
    """

    model: onnx_ir.Model
    transposed: frozenset[str]
    widened: frozenset[str]
    support: SupportReport


def trace(
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    dynamic_shapes: Any,
    input_specification: Sequence[TensorSpec],
    output_specification: Sequence[TensorSpec],
    cuda: bool = False,
) -> Graph:
    """Traces a module on the meta device into a graph that TensorRT and ONNX Runtime both take.

    Args:
        module: parameters and buffers become initialisers of the same names.
        inputs: on the meta device.
        dynamic_shapes: of `torch.export.export`.
        input_specification, output_specification: names and shapes, see `lavin_rt.artifact.manifest.Manifest.parts`.
        cuda: every node has a kernel of ONNX Runtime's for CUDA; else norms are what TensorRT runs fastest.

    Raises:
        InputError: a package that is missing.
        RuntimeError: the graph holds something that the tables of `support` or `cuda` do not.
    """
    try:
        import onnx_ir
        import onnxscript.optimizer
    except ImportError as error:
        raise missing_extra(error.name or "onnxscript", "onnx", "exporting to ONNX") from None
    with _quiet(), torch.no_grad():
        exported = torch.export.export(module.eval(), tuple(inputs), dynamic_shapes=dynamic_shapes)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table={torch.ops.aten.group_norm.default: onnx_cuda.group_norm if cuda else _group_norm},
            input_names=[tensor["name"] for tensor in input_specification],
            output_names=[tensor["name"] for tensor in output_specification],
        )
        assert program is not None  # as of an exported program
        model = program.model
        weights = dict(model.graph.initializers)
        for name, value in weights.items():
            del model.graph.initializers[name]
            value.const_value = None
            model.graph.inputs.append(value)
        onnxscript.optimizer.optimize(model)
    given = len(input_specification)
    del model.graph.inputs[given:]
    names = set(weights)
    transposed = _without_transposes(model.graph, names)
    widened = onnx_cuda.cast_around(model.graph, names) if cuda else set()
    _name_constants(model.graph)
    for name, value in weights.items():
        if value.uses():
            model.graph.initializers[name] = value
    _name_sizes(model.graph, input_specification, output_specification)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "lavin-rt", None
    model.graph.name = type(module).__name__
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    unused = [name for name, value in weights.items() if not value.uses()]
    support = check_support(model)
    faults = support.faults + [f"the weight {name} is not used" for name in unused]
    faults += onnx_cuda.cuda_faults(model) if cuda else []
    if faults:
        raise RuntimeError(f"the traced graph is not one that runs everywhere: {'; '.join(faults[:5])}")
    return Graph(model, frozenset(transposed), frozenset(widened), support)


def write(
    graph: Graph,
    path: Path,
    weight: Callable[[str], torch.Tensor],
    progress: Progress | None = None,
) -> None:
    """Writes `path` and, beside it, its weights in `path.data`, one after another.

    Args:
        graph: of `trace`.
        path: ending in `.onnx`.
        weight: a weight by its name, of the module's shape and dtype, on the CPU; asked for once each, so that no more
            than one is in memory.
        progress: called with (bytes written, bytes in all).
    """
    import onnx_ir

    data = path.with_name(f"{path.name}.data")
    values = [value for value in graph.model.graph.initializers.values() if value.const_value is None]
    sizes = [int(math.prod(shape.numpy()) * dtype.itemsize) for _, shape, dtype in map(described, values)]
    done, total = 0, sum(sizes)
    with open(data, "xb") as file:
        for value, size in zip(values, sizes, strict=True):
            offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
            file.seek(offset)
            name, shape, dtype = described(value)
            tensor = weight(name)
            if name in graph.transposed:
                tensor = tensor.T
            if name in graph.widened:
                tensor = tensor.float()
            if tuple(tensor.shape) != shape.numpy() or tensor.nbytes != size:
                raise RuntimeError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}; the graph has {value}")
            file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
            value.const_value = onnx_ir.ExternalTensor(
                data.name, offset, size, dtype, shape=shape, name=name, base_dir=path.parent
            )
            done += size
            if progress is not None:
                progress(done, total)
    onnx_ir.save(graph.model, path)


def write_sharing(graph: Graph, path: Path, other: Graph) -> None:
    """Writes `path` with the weights of a graph that has been written beside it, in that one's file.

    Args:
        graph: of `trace`, whose weights are among the other's.
        path: ending in `.onnx`.
        other: of `trace`, behind `write`.

    Raises:
        RuntimeError: a weight that the other lacks, or has in another form.
    """
    import onnx_ir

    places = other.model.graph.initializers
    for value in graph.model.graph.initializers.values():
        if value.const_value is not None:
            continue
        name, shape, dtype = described(value)
        stored = places[name].const_value if name in places else None
        forms = [(name in one.transposed, name in one.widened) for one in (graph, other)]
        if not isinstance(stored, onnx_ir.ExternalTensor) or forms[0] != forms[1] or stored.shape != shape:
            raise RuntimeError(f"{path.name}: the weight {name} has another form in the graph that it is shared with")
        value.const_value = onnx_ir.ExternalTensor(
            stored.location, stored.offset, stored.length, dtype, shape=shape, name=name, base_dir=path.parent
        )
    onnx_ir.save(graph.model, path)


def on_meta(module: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The module moved to the meta device, and the values that its parameters and buffers had."""
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return module.to("meta"), {name: value.detach() for name, value in values.items()}


def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-05, cudnn_enabled=False):
    """Group norm without weights as an instance norm of the groups, `[N, groups, rest]`: an operator that TensorRT has
    had for long.
    """
    from onnxscript import opset23 as op

    if weight is not None or bias is not None:
        raise RuntimeError("group norms are traced without weights; multiply and add behind them")
    ones, zeros = op.Constant(value_floats=[1.0] * num_groups), op.Constant(value_floats=[0.0] * num_groups)
    split: Any = op.Constant(value_ints=[0, num_groups, -1])
    groups = op.Reshape(x, split)
    return op.Reshape(op.InstanceNormalization(groups, ones, zeros, epsilon=eps), op.Shape(x))


def _without_transposes(graph: onnx_ir.Graph, weights: set[str]) -> set[str]:
    """Takes transposes of weights out of a graph; returns the names of those that are then wanted transposed."""
    import onnx_ir

    transposed = set()
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.name not in weights or len(weight.uses()) != 1:
            continue
        if list(node.attributes["perm"].as_ints()) != [1, 0]:
            continue
        weight.shape = onnx_ir.Shape(tuple(reversed(described(weight)[1].numpy())))
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)
        transposed.add(weight.name)
    return transposed


def _name_constants(graph: onnx_ir.Graph) -> None:
    """Gives the small numbers that tracing left (axes, sizes) names that say what they are."""
    for value in list(graph.initializers.values()):
        constant, (named, _, dtype) = value.const_value, described(value)
        assert constant is not None
        array = constant.numpy()
        items = array.reshape(-1).tolist()
        text = f"{items[0]}_x{len(items)}" if len(items) > 8 and len(set(items)) == 1 else "_".join(map(str, items))
        kind = "scalar" if array.ndim == 0 else "list"
        del graph.initializers[named]
        value.name = constant.name = f"constant.{dtype.name.lower()}.{kind}.{text}".replace("-", "minus")
        if value.name in graph.initializers:  # the same value twice
            value.replace_all_uses_with(graph.initializers[value.name])
        else:
            graph.initializers[value.name] = value


def _name_sizes(graph: onnx_ir.Graph, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Names the sizes of inputs and outputs as the manifest does; shapes between keep only what is a number."""
    import onnx_ir

    named = {value.name: tensor["shape"] for value, tensor in zip(graph.inputs, inputs, strict=True)}
    named |= {value.name: tensor["shape"] for value, tensor in zip(graph.outputs, outputs, strict=True)}
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.name in named:
            value.shape = onnx_ir.Shape(named[value.name])
        elif value.shape is not None:
            value.shape = onnx_ir.Shape([size if isinstance(size, int) else None for size in value.shape])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what the exporter says to its developers."""
    logger = logging.getLogger("torch.onnx")
    children = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("torch.onnx")]
    levels = [(one, one.level) for one in (logger, *children)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for one, _ in levels:
                one.setLevel(logging.ERROR)
            yield
        finally:
            for one, level in levels:
                one.setLevel(level)
