"""Our row-wise kernels as TensorRT's ahead-of-time Python plugins, namespace `lavin`.

An engine with them holds the compiled kernels themselves: to run it needs neither Python nor this package. Written
against `tensorrt.plugin` of 10.16 and 11.4 and driven through it in tests; the project has not yet built an engine with
the real libraries.

TensorRT reads annotations and names of arguments at run time, so that this file does not postpone their evaluation and
every function spells its signature out.
"""

from types import ModuleType
from typing import Any

import numpy as np

from lavin_export import trt_kernels as kernels
from lavin_export.plugin_graph import DOMAIN
from lavin_kernels.ada_norm import CANDIDATES as NORM_CANDIDATES
from lavin_kernels.qk_norm_rope import CANDIDATES as QK_CANDIDATES
from lavin_kernels.swiglu import CANDIDATES as SWIGLU_CANDIDATES

# A scalar attribute arrives as an array of one element; declared as a number, 10.16 fails on it with numpy 2.4.
FLOAT = np.ndarray[Any, np.dtype[np.float32]]
INT = np.ndarray[Any, np.dtype[np.int32]]

_registered: list[int] = []


def register(trt: ModuleType, capability: int) -> None:
    """Registers the plugins with TensorRT, compiled for a compute capability such as 90 (80 for Ampere and newer).

    Raises:
        ValueError: they are registered in this process for another capability.
    """
    if _registered:
        if _registered != [capability]:
            raise ValueError(f"the plugins are registered for capability {_registered[0]}; {capability} was asked for")
        return
    import tensorrt.plugin as trtp

    table = Types(trt)
    _register_ada_rms_norm(trtp, table, capability)
    _register_gated_residual_ada_rms_norm(trtp, table, capability)
    _register_swiglu(trtp, table, capability)
    for name, cond_queries in (("LavinQkNormRope", True), ("LavinKeyNormRope", False)):
        _register_qk_norm_rope(trtp, table, capability, name, cond_queries)
    _registered.append(capability)


class Types:
    """TensorRT's dtypes in the words of Triton and of TensorRT's own autotuner."""

    def __init__(self, trt: ModuleType):
        names = ("BF16", "bf16"), ("HALF", "fp16"), ("FLOAT", "fp32"), ("INT32", "i32")
        self._triton = {getattr(trt.DataType, name): short for name, short in names}
        self._tuned = {"bf16": "BF16", "fp16": "FP16", "fp32": "FP32", "i32": "INT32"}

    def pointers(self, names: list[str], tensors: Any) -> dict[str, str]:
        """Triton's pointer types of kernel arguments."""
        return {name: f"*{self._triton[tensor.dtype]}" for name, tensor in zip(names, tensors, strict=True)}

    def combination(self, trtp: ModuleType, tensors: Any, candidates: int) -> list:
        """All tensors as they are, row-major, with one tactic per launch configuration, counted from 1."""
        text = ", ".join(self._tuned[self._triton[tensor.dtype]] for tensor in tensors)
        return [trtp.AutoTuneCombination(text, "LINEAR", list(range(1, candidates + 1)))]


def _launch(trtp: ModuleType, kernel: kernels.Kernel, blocks: Any, integers: tuple = ()) -> tuple:
    """What an ahead-of-time implementation returns."""
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x = blocks
    parameters.block_x = kernel.threads
    parameters.shared_mem = kernel.shared
    return kernel.name, kernel.ptx, parameters, trtp.SymIntExprs.from_tuple(list(integers))


def _compiled_norm(
    trtp: ModuleType, kernel: Any, pointers: dict[str, str], rows: Any, epsilon: Any, capability: int, tactic: int
) -> tuple:
    """What the ahead-of-time implementations of both norms return; `rows` is one of the tensors `[..., D]`."""
    width = rows.shape[rows.ndim - 1]
    constants = kernels.norm_constants(width, float(epsilon[0]))
    warps = kernels.norm_warps(width, NORM_CANDIDATES[tactic - 1]["num_warps"])
    compiled = kernels.compile_kernel(kernel, pointers, constants, capability, warps)
    return _launch(trtp, compiled, rows.shape_expr.numel() // width)


def _register_ada_rms_norm(trtp: ModuleType, types: Types, capability: int) -> None:
    name = f"{DOMAIN}::LavinAdaRmsNorm"

    @trtp.register(name)
    def describe(rows: trtp.TensorDesc, scale: trtp.TensorDesc, epsilon: FLOAT) -> trtp.TensorDesc:
        return rows.like()

    @trtp.autotune(name)
    def tactics(
        rows: trtp.TensorDesc, scale: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]
    ) -> list[trtp.AutoTuneCombination]:
        return types.combination(trtp, (rows, scale, *outputs), len(NORM_CANDIDATES))

    @trtp.aot_impl(name)
    def compiled(
        rows: trtp.TensorDesc, scale: trtp.TensorDesc, epsilon: FLOAT, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        pointers = types.pointers(["rows_ptr", "scale_ptr", "out_ptr"], (rows, scale, *outputs))
        return _compiled_norm(trtp, kernels.lavin_ada_rms_norm, pointers, rows, epsilon, capability, tactic)


def _register_gated_residual_ada_rms_norm(trtp: ModuleType, types: Types, capability: int) -> None:
    name = f"{DOMAIN}::LavinGatedResidualAdaRmsNorm"

    @trtp.register(name)
    def describe(
        residual: trtp.TensorDesc,
        update: trtp.TensorDesc,
        gate: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        epsilon: FLOAT,
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        return residual.like(), residual.like()

    @trtp.autotune(name)
    def tactics(
        residual: trtp.TensorDesc,
        update: trtp.TensorDesc,
        gate: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        return types.combination(trtp, (residual, update, gate, scale, *outputs), len(NORM_CANDIDATES))

    @trtp.aot_impl(name)
    def compiled(
        residual: trtp.TensorDesc,
        update: trtp.TensorDesc,
        gate: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        epsilon: FLOAT,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        names = ["residual_ptr", "update_ptr", "gate_ptr", "scale_ptr", "residual_out_ptr", "normed_ptr"]
        pointers = types.pointers(names, (residual, update, gate, scale, *outputs))
        function = kernels.lavin_gated_residual_ada_rms_norm
        return _compiled_norm(trtp, function, pointers, residual, epsilon, capability, tactic)


def _register_swiglu(trtp: ModuleType, types: Types, capability: int) -> None:
    name = f"{DOMAIN}::LavinSwiglu"
    tuned = SWIGLU_CANDIDATES

    @trtp.register(name)
    def describe(gate_up: trtp.TensorDesc) -> trtp.TensorDesc:
        *leading, joined = gate_up.shape_expr
        return trtp.from_shape_expr((*leading, joined // 2), dtype=gate_up.dtype)

    @trtp.autotune(name)
    def tactics(gate_up: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]) -> list[trtp.AutoTuneCombination]:
        return types.combination(trtp, (gate_up, *outputs), len(tuned))

    @trtp.aot_impl(name)
    def compiled(
        gate_up: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        joined = gate_up.shape[gate_up.ndim - 1]
        block, warps = (tuned[tactic - 1][key] for key in ("block", "num_warps"))
        arguments = types.pointers(["gate_up_ptr", "out_ptr"], (gate_up, *outputs))
        constants = {"INNER": joined // 2, "BLOCK": block}
        kernel = kernels.compile_kernel(kernels.lavin_swiglu, arguments, constants, capability, warps)
        blocks_in_row = -(-(joined // 2) // block)
        return _launch(trtp, kernel, gate_up.shape_expr.numel() // joined * blocks_in_row)


def _register_qk_norm_rope(trtp: ModuleType, types: Types, capability: int, op: str, cond_queries: bool) -> None:
    name = f"{DOMAIN}::{op}"
    tuned = QK_CANDIDATES

    @trtp.register(name)
    def describe(
        cond: trtp.TensorDesc,
        x: trtp.TensorDesc,
        branch_rows: trtp.TensorDesc,
        positions: trtp.TensorDesc,
        cos: trtp.TensorDesc,
        sin: trtp.TensorDesc,
        q_weight: trtp.TensorDesc,
        k_weight: trtp.TensorDesc,
        epsilon: FLOAT,
        head_size: INT,
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc]:
        size = int(head_size[0])
        batch, of_x = x.shape_expr[0], x.shape_expr[1]
        length = cond.shape_expr[1] + of_x
        heads, kv_heads = q_weight.shape_expr[1] // size, k_weight.shape_expr[1] // size
        shapes = [(batch, length if cond_queries else of_x, heads, size), *[(batch, length, kv_heads, size)] * 2]
        return tuple(trtp.from_shape_expr(shape, dtype=x.dtype) for shape in shapes)

    @trtp.autotune(name)
    def tactics(
        cond: trtp.TensorDesc,
        x: trtp.TensorDesc,
        branch_rows: trtp.TensorDesc,
        positions: trtp.TensorDesc,
        cos: trtp.TensorDesc,
        sin: trtp.TensorDesc,
        q_weight: trtp.TensorDesc,
        k_weight: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        tensors = (cond, x, branch_rows, positions, cos, sin, q_weight, k_weight, *outputs)
        return types.combination(trtp, tensors, len(tuned))

    @trtp.aot_impl(name)
    def compiled(
        cond: trtp.TensorDesc,
        x: trtp.TensorDesc,
        branch_rows: trtp.TensorDesc,
        positions: trtp.TensorDesc,
        cos: trtp.TensorDesc,
        sin: trtp.TensorDesc,
        q_weight: trtp.TensorDesc,
        k_weight: trtp.TensorDesc,
        epsilon: FLOAT,
        head_size: INT,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        size = int(head_size[0])
        heads, kv_heads = q_weight.shape[1] // size, k_weight.shape[1] // size
        names = ["cond", "x", "branch_rows", "positions", "cos", "sin", "q_weight", "k_weight", "q", "k", "v"]
        tensors = (cond, x, branch_rows, positions, cos, sin, q_weight, k_weight, *outputs)
        arguments = {**types.pointers([f"{one}_ptr" for one in names], tensors), "split": "i32"}
        candidate = tuned[tactic - 1]
        constants = kernels.qk_constants(
            heads, kv_heads, size, cos.shape[0], cond_queries, candidate["group"], float(epsilon[0])
        )
        warps = kernels.qk_warps((heads + 2 * kv_heads) * size, candidate["num_warps"])
        kernel = kernels.compile_kernel(kernels.lavin_qk_norm_rope, arguments, constants, capability, warps)
        split = cond.shape_expr[0] * cond.shape_expr[1]
        return _launch(trtp, kernel, split + x.shape_expr[0] * x.shape_expr[1], (trtp.SymInt32(split),))
