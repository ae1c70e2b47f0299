"""The row-wise kernels of `lavin_kernels` in the form that TensorRT's ahead-of-time plugins take, compiled to PTX.

TensorRT passes a kernel the pointers of the inputs, then 32-bit integers, then the pointers of the outputs, and nothing
else: everything that is known when the engine is built becomes a constant. Compiling needs no GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping

import triton
import triton.language as tl

from lavin_kernels.ada_norm import LANE_ELEMENTS, _ada_rms_norm_kernel, _gated_residual_ada_rms_norm_kernel
from lavin_kernels.launch import pieces, row_warps
from lavin_kernels.qk_norm_rope import LANE_ELEMENTS as QK_LANE_ELEMENTS
from lavin_kernels.qk_norm_rope import _qk_norm_rope_kernel, _tiles
from lavin_kernels.swiglu import _swiglu_kernel

# TensorRT documents no way to ask for more dynamic shared memory than every launch has.
MOST_SHARED = 48 * 1024
# The newest PTX that a driver of the first CUDA release with that capability reads; a driver refuses newer text.
PTX_VERSIONS = {75: 78, 80: 78, 86: 78, 89: 78, 90: 80, 100: 86, 103: 88, 120: 87, 121: 88}


@triton.jit
def lavin_ada_rms_norm(
    rows_ptr,  # [..., D]
    scale_ptr,  # [D]
    out_ptr,  # [..., D]
    EPS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    _ada_rms_norm_kernel(rows_ptr, scale_ptr, out_ptr, 0, D, 0, EPS, D, MAIN, TAIL)


@triton.jit
def lavin_gated_residual_ada_rms_norm(
    residual_ptr,  # [..., D]
    update_ptr,  # [..., D]
    gate_ptr,  # [D]
    scale_ptr,  # [D]
    residual_out_ptr,  # [..., D]
    normed_ptr,  # [..., D]
    EPS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    _gated_residual_ada_rms_norm_kernel(
        residual_ptr, update_ptr, gate_ptr, scale_ptr, residual_out_ptr, normed_ptr, 0, D, D, 0, 0, EPS, D, MAIN, TAIL
    )


@triton.jit
def lavin_swiglu(
    gate_up_ptr,  # [..., 2 * INNER]
    out_ptr,  # [..., INNER]
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _swiglu_kernel(gate_up_ptr, out_ptr, 2 * INNER, INNER, BLOCK)


@triton.jit
def lavin_qk_norm_rope(
    cond_ptr,  # [batch, cond rows, Q + 2 KV] or [batch, cond rows, 2 KV]
    x_ptr,  # [batch, x rows, Q + 2 KV]
    branch_rows_ptr,  # [rows]
    positions_ptr,  # [rows, 3]
    cos_ptr,  # [TABLE_ROWS, SIZE / 6]
    sin_ptr,
    q_weight_ptr,  # [2, Q]
    k_weight_ptr,  # [2, KV]
    split,  # batch * cond rows
    q_ptr,  # [batch, cond rows + x rows, HEADS, SIZE], or the x rows alone
    k_ptr,  # [batch, cond rows + x rows, KV_HEADS, SIZE]
    v_ptr,
    EPS: tl.constexpr,
    COND_QUERIES: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    x_width: tl.constexpr = (HEADS + 2 * KV_HEADS) * SIZE
    cond_width: tl.constexpr = x_width if COND_QUERIES else 2 * KV_HEADS * SIZE
    query_start = 0 if COND_QUERIES else split
    _qk_norm_rope_kernel(
        cond_ptr,
        x_ptr,
        branch_rows_ptr,
        branch_rows_ptr,
        positions_ptr,
        cos_ptr,
        sin_ptr,
        q_weight_ptr,
        k_weight_ptr,
        q_ptr,
        k_ptr,
        v_ptr,
        split,
        query_start,
        TABLE_ROWS,
        cond_width,
        x_width,
        HEADS * SIZE,
        KV_HEADS * SIZE,
        EPS,
        HEADS,
        KV_HEADS,
        GROUP,
        KV_GROUP,
        SIZE,
        PADDED,
        MAIN,
        TAIL,
    )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel ready for TensorRT.

    Attributes:
        name: of the entry in the PTX.
        ptx: whose parameters are those that TensorRT passes.
        threads: of a block.
        shared: bytes of shared memory of a block.
    """

    name: str
    ptx: str
    threads: int
    shared: int


def norm_constants(width: int, eps: float) -> dict[str, float]:
    """The constants of both norm kernels for rows of a width."""
    main, tail = pieces(width)
    return {"EPS": eps, "D": width, "MAIN": main, "TAIL": tail}


def norm_warps(width: int, num_warps: int) -> int:
    return row_warps(width, num_warps, LANE_ELEMENTS)


def qk_constants(
    heads: int, kv_heads: int, head_size: int, table_rows: int, cond_queries: bool, group: int, eps: float
) -> dict[str, float]:
    """The constants of `lavin_qk_norm_rope`; `group` heads at a time are held in registers."""
    sizes = _tiles(heads, kv_heads, head_size, head_size, group)
    return {"EPS": eps, "COND_QUERIES": cond_queries, "TABLE_ROWS": table_rows, **sizes}


def qk_warps(width: int, num_warps: int) -> int:
    return row_warps(width, num_warps, QK_LANE_ELEMENTS)


def compile_kernel(
    kernel: triton.JITFunction,
    types: Mapping[str, str],
    constants: Mapping[str, float],
    capability: int,
    num_warps: int,
) -> Kernel:
    """Compiles a kernel to PTX for a compute capability such as 90.

    Args:
        kernel: one of this file.
        types: Triton's type of every argument that is no constant: `*bf16`, `*fp32`, `*i32`, `i32`.
            Pointers are taken to be divisible by 16, as TensorRT's are.
        constants: values of the other arguments.
        capability: of the GPU; engines for Ampere and newer take 80.
        num_warps: of a block.

    Raises:
        ValueError: the kernel needs more than 48 KiB of shared memory, or scratch memory, which a plugin cannot have.
    """
    return _compile(kernel, tuple(types.items()), tuple(constants.items()), capability, num_warps)


@functools.cache
def _compile(kernel, types: tuple, constants: tuple, capability: int, num_warps: int) -> Kernel:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**dict(types), **{name: "constexpr" for name, _ in constants}}
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind[0] == "*"}
    known = max((key for key in PTX_VERSIONS if key <= capability), default=75)
    options = {"num_warps": num_warps, "num_stages": 1, "ptx_version": PTX_VERSIONS[known]}
    source = ASTSource(kernel, signature, dict(constants), aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    metadata = compiled.metadata
    if metadata.shared > MOST_SHARED:
        raise ValueError(f"{metadata.name} needs {metadata.shared} bytes of shared memory; a plugin has {MOST_SHARED}")
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    if scratch:
        raise ValueError(f"{metadata.name} needs {scratch} bytes of scratch memory, which a plugin cannot have")
    ptx = without_hidden_parameters(without_debug_lines(compiled.asm["ptx"]), metadata.name, len(types))
    return Kernel(metadata.name, ptx, 32 * metadata.num_warps, metadata.shared)


def without_debug_lines(ptx: str) -> str:
    """PTX without the source files, lines and debug sections, which name folders of the machine that made it."""
    ptx = re.sub(r"^\s*\.(?:file|loc)\b.*\n", "", ptx, flags=re.MULTILINE)
    return re.sub(r"^\s*\.section\s+\.debug_\w+\s*\{.*?\}\s*\n", "", ptx, flags=re.MULTILINE | re.DOTALL)


def without_hidden_parameters(ptx: str, name: str, count: int) -> str:
    """PTX whose entry `name` has its first `count` parameters only.

    Triton appends the pointers of its two scratch areas, which TensorRT does not pass: a launch with too few parameters
    fails.

    Raises:
        ValueError: there is no such entry with that many parameters, or the code reads one that would go.
    """
    head = re.search(rf"(\.visible\s+\.entry\s+{re.escape(name)}\s*\()([^)]*)(\))", ptx)
    if head is None:
        raise ValueError(f"the PTX has no entry {name}")
    parameters = [text.strip() for text in head.group(2).split(",")]
    if len(parameters) < count:
        raise ValueError(f"{name} has {len(parameters)} parameters; expected {count}")
    body = ptx[head.end() :]
    for text in parameters[count:]:
        parameter = re.search(r"(\w+)$", text).group(1)
        if re.search(rf"\b{parameter}\b", body):
            raise ValueError(f"{name} reads {parameter}, which a plugin does not pass")
    kept = ",\n".join(f"\t{text}" for text in parameters[:count])
    return f"{ptx[: head.end(1)]}\n{kept}\n{ptx[head.start(3) :]}"
