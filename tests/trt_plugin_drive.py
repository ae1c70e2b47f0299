"""Takes a plugin through NVIDIA's own `tensorrt.plugin` classes, as a builder would, without a builder.

Stood in for: the plugin registry and the builder of dimension expressions, both of which live in TensorRT's libraries.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import trt_bindings


class Expression:
    """An `IDimensionExpr`: a number, or a function of named sizes."""

    def __init__(self, value: Callable[[Mapping[str, int]], int], constant: int | None = None):
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant is not None

    def get_constant_value(self) -> int | None:
        return self.constant

    def is_size_tensor(self) -> bool:
        return False


class Expressions:
    """An `IExprBuilder`."""

    def __init__(self, trt: ModuleType):
        kinds = trt.DimensionOperation
        self.operations = {
            kinds.SUM: operator.add,
            kinds.SUB: operator.sub,
            kinds.PROD: operator.mul,
            kinds.MAX: max,
            kinds.MIN: min,
            kinds.FLOOR_DIV: operator.floordiv,
            kinds.CEIL_DIV: lambda one, other: -(-one // other),
        }

    def constant(self, value: int) -> Expression:
        return Expression(lambda sizes: value, value)

    def operation(self, kind: Any, one: Expression, other: Expression) -> Expression:
        function = self.operations[kind]
        constant = None
        if one.constant is not None and other.constant is not None:
            constant = function(one.constant, other.constant)
        return Expression(lambda sizes: function(one.value(sizes), other.value(sizes)), constant)


class Registry:
    """An `IPluginRegistry`."""

    def __init__(self):
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators.get((name, version, namespace))


@dataclasses.dataclass
class Tactic:
    """What a plugin hands over for one tactic: kernel, PTX and launch at given sizes."""

    name: str
    ptx: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    integers: list[int]


@dataclasses.dataclass
class Driven:
    shapes: list[tuple[int, ...]]
    dtypes: list[Any]
    tactics: list[Tactic]


def prepare(trt: ModuleType) -> Registry:
    """`tensorrt.plugin` on stand-ins; to be called before anything registers."""
    registry = Registry()
    trt.IDimensionExpr = Expression
    trt.get_plugin_registry = lambda: registry
    trt.DimsExprs = lambda length: [None] * length
    trt.ISymExpr = type("ISymExpr", (), {"__init__": lambda self: None})
    trt_bindings.import_plugin()
    return registry


def drive(
    trt: ModuleType,
    registry: Registry,
    name: str,
    inputs: Sequence[tuple[Sequence[int | str], Any]],
    sizes: Mapping[str, int],
    attributes: Mapping[str, Any],
) -> Driven:
    """One plugin from its ONNX attributes to its kernels.

    Args:
        inputs: shape, with names for sizes that vary, and dtype of every input.
        sizes: values of those names at run time.
        attributes: as the ONNX parser passes them: a float as FLOAT32, an int as INT32, each an array of one element.
    """
    creator = registry.get_creator(name, "1", "lavin")
    kinds = {float: (np.float32, trt.PluginFieldType.FLOAT32), int: (np.int32, trt.PluginFieldType.INT32)}
    given = {field.name for field in creator.field_names}
    assert given == set(attributes), f"{name} has fields {given}; the node has {set(attributes)}"
    arrays = {key: np.array([value], kinds[type(value)][0]) for key, value in attributes.items()}
    fields = [trt.PluginField(key, arrays[key], kinds[type(value)][1]) for key, value in attributes.items()]
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    collection = trt.PluginFieldCollection(fields)
    plugin = creator.create_plugin(name, "lavin", collection, trt.TensorRTPhase.BUILD, request)
    builder = Expressions(trt)
    expressions = [
        [builder.constant(n) if isinstance(n, int) else Expression(lambda s, n=n: s[n]) for n in shape]
        for shape, _ in inputs
    ]
    dtypes = plugin.get_output_data_types([dtype for _, dtype in inputs], [len(shape) for shape, _ in inputs])
    symbolic = plugin.get_output_shapes(expressions, [], builder)
    shapes = [tuple(size.value(sizes) for size in shape) for shape in symbolic]
    in_out = [_described(trt, shape, dtype) for shape, dtype in inputs]
    for shape, dtype in zip(symbolic, dtypes, strict=True):
        known = [size.constant if size.constant is not None else "varies" for size in shape]
        in_out.append(_described(trt, known, dtype))
    count = len(inputs)
    combinations = plugin.get_supported_format_combinations(in_out, count)
    assert len(combinations) % len(in_out) == 0
    offered = [combination.type for combination in combinations[: len(in_out)]]
    assert offered == [description.desc.type for description in in_out], offered
    plugin.configure_plugin(in_out[:count], in_out[count:])
    tactics = []
    for tactic in sorted(plugin.get_valid_tactics()):
        plugin.set_tactic(tactic)
        launch, integers = _Launch(), _Integers()
        plugin.get_launch_params(expressions, in_out, count, launch, integers, builder)
        descriptions = [description.desc for description in in_out]
        entry, ptx = plugin.get_kernel(descriptions[:count], descriptions[count:])
        extra = [integers[index] for index in range(integers.nbSymExprs)]
        assert all(one.dtype == trt.PluginArgDataType.INT32 for one in extra)
        tactics.append(
            Tactic(
                name=entry,
                ptx=ptx.decode(),
                grid=tuple(_value(size, sizes) for size in (launch.grid_x, launch.grid_y, launch.grid_z)),
                threads=_value(launch.block_x, sizes) * _value(launch.block_y, sizes) * _value(launch.block_z, sizes),
                shared=_value(launch.shared_mem, sizes),
                integers=[_value(one, sizes) for one in extra],
            )
        )
    return Driven(shapes, dtypes, tactics)


class _Launch:
    pass


class _Integers(dict):
    nbSymExprs = 0


def _value(number: Any, sizes: Mapping[str, int]) -> int:
    return number.expr.value(sizes)


def _described(trt: ModuleType, shape: Sequence[int | str], dtype: Any) -> Any:
    numbers = [size if isinstance(size, int) else -1 for size in shape]
    tensor, dynamic = trt.PluginTensorDesc(), trt.DynamicPluginTensorDesc()
    tensor.dims, tensor.type, tensor.format = trt.Dims(numbers), dtype, trt.TensorFormat.LINEAR
    dynamic.desc = tensor
    dynamic.min = dynamic.opt = dynamic.max = trt.Dims([max(number, 1) for number in numbers])
    return dynamic
