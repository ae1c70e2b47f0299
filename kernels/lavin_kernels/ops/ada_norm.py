"""Adaptive RMSNorm and the sandwich-normed, gated residual, on the rows of both streams in one launch."""

import torch
import triton
import triton.language as tl

from lavin_kernels import tuning, validate
from lavin_kernels.launch import operator, pieces, row_case, row_warps, wrap_triton
from lavin_kernels.reference import dit as reference
from lavin_kernels.static_case import StaticCase

# One warp for a row needs no shared memory and no barrier: both sums are shuffles. The released width gives every lane
# exactly nine 16-byte loads of bfloat16, and 17 rows in flight on a multiprocessor (see `static_cases`).
CANDIDATES = [{"num_warps": num_warps} for num_warps in (1, 2, 4, 8)]
# Of two float32 rows in one lane: 254 of its 255 registers.
LANE_ELEMENTS = 96


@triton.jit
def _load_row(row_ptr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, EVICTION: tl.constexpr):
    # MAIN < D, so only the tail can overrun.
    main = tl.load(row_ptr + tl.arange(0, MAIN), eviction_policy=EVICTION)
    columns = MAIN + tl.arange(0, TAIL)
    tail = tl.load(row_ptr + columns, mask=columns < D, other=0.0, eviction_policy=EVICTION)
    return main.to(tl.float32), tail.to(tl.float32)


@triton.jit
def _store_row(row_ptr, main, tail, D: tl.constexpr, EVICTION: tl.constexpr):
    tl.store(row_ptr + tl.arange(0, main.shape[0]), main, eviction_policy=EVICTION)
    columns = main.shape[0] + tl.arange(0, tail.shape[0])
    tl.store(row_ptr + columns, tail, mask=columns < D, eviction_policy=EVICTION)


@triton.jit
def _inverse_rms(main, tail, D: tl.constexpr, eps):
    return tl.rsqrt((tl.sum(main * main) + tl.sum(tail * tail)) / D + eps)


@triton.jit
def _load_gated_row(
    residual_ptr,
    update_ptr,
    gate_ptr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    eps,
):
    residual, residual_tail = _load_row(residual_ptr, D, MAIN, TAIL, "evict_first")
    # Keeps these loads ahead. Without it the assembler moves them behind the sum: two trips to memory instead of one.
    tl.debug_barrier()
    update, update_tail = _load_row(update_ptr, D, MAIN, TAIL, "evict_first")
    inverse = _inverse_rms(update, update_tail, D, eps)
    gate, gate_tail = _load_row(gate_ptr, D, MAIN, TAIL, "evict_last")
    return residual + update * inverse * gate, residual_tail + update_tail * inverse * gate_tail


@triton.jit(do_not_specialize=["split"])
def _ada_rms_norm_kernel(
    rows_ptr,  # [rows, D]
    scale_ptr,  # [2, D]
    out_ptr,  # [rows, D]
    split,
    row_stride,
    scale_stride,
    eps,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stream = (row >= split).to(tl.int64)
    main, tail = _load_row(rows_ptr + row * row_stride, D, MAIN, TAIL, "evict_first")
    inverse = _inverse_rms(main, tail, D, eps)
    scale, scale_tail = _load_row(scale_ptr + stream * scale_stride, D, MAIN, TAIL, "evict_last")
    _store_row(out_ptr + row * D, main * inverse * (1 + scale), tail * inverse * (1 + scale_tail), D, "")


@triton.jit(do_not_specialize=["split"])
def _gated_residual_kernel(
    residual_ptr,  # [rows, D]
    update_ptr,  # [rows, D]
    gate_ptr,  # [2, D]
    out_ptr,  # [rows, D]
    split,
    residual_stride,
    update_stride,
    gate_stride,
    eps,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stream = (row >= split).to(tl.int64)
    main, tail = _load_gated_row(
        residual_ptr + row * residual_stride,
        update_ptr + row * update_stride,
        gate_ptr + stream * gate_stride,
        D,
        MAIN,
        TAIL,
        eps,
    )
    _store_row(out_ptr + row * D, main, tail, D, "")


@triton.jit(do_not_specialize=["split"])
def _gated_residual_ada_rms_norm_kernel(
    residual_ptr,  # [rows, D]
    update_ptr,  # [rows, D]
    gate_ptr,  # [2, D]
    scale_ptr,  # [2, D]
    residual_out_ptr,  # [rows, D]
    normed_ptr,  # [rows, D]
    split,
    residual_stride,
    update_stride,
    gate_stride,
    scale_stride,
    eps,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stream = (row >= split).to(tl.int64)
    main, tail = _load_gated_row(
        residual_ptr + row * residual_stride,
        update_ptr + row * update_stride,
        gate_ptr + stream * gate_stride,
        D,
        MAIN,
        TAIL,
        eps,
    )
    # What is normalised is the residual as it is stored, so that the two results belong together in any dtype.
    main = main.to(residual_out_ptr.dtype.element_ty)
    tail = tail.to(residual_out_ptr.dtype.element_ty)
    # The residual is read after a whole attention or MLP, the normed rows by the very next linear: those keep the L2.
    _store_row(residual_out_ptr + row * D, main, tail, D, "evict_first")
    main, tail = main.to(tl.float32), tail.to(tl.float32)
    inverse = _inverse_rms(main, tail, D, eps)
    scale, scale_tail = _load_row(scale_ptr + stream * scale_stride, D, MAIN, TAIL, "evict_last")
    _store_row(normed_ptr + row * D, main * inverse * (1 + scale), tail * inverse * (1 + scale_tail), D, "")


def _tiles(kernel: str, rows: torch.Tensor) -> dict[str, int]:
    """Compile-time width and tiles of a row, and the warps for it."""
    width = rows.shape[1]
    main, tail = pieces(width)
    num_warps = tuning.config(kernel, rows.device, rows.dtype)["num_warps"]
    return {"D": width, "MAIN": main, "TAIL": tail, "num_warps": row_warps(width, num_warps, LANE_ELEMENTS)}


@operator("ada_rms_norm", reference.ada_rms_norm)
def _ada_rms_norm(rows: torch.Tensor, split: int, scale: torch.Tensor, eps: float) -> torch.Tensor:
    out = rows.new_empty(rows.shape)
    if rows.shape[0]:
        wrap_triton(_ada_rms_norm_kernel)[(rows.shape[0],)](
            rows, scale, out, split, rows.stride(0), scale.stride(0), eps, **_tiles("ada_rms_norm", rows)
        )
    return out


@operator("gated_residual", reference.gated_residual)
def _gated_residual(
    residual: torch.Tensor, update: torch.Tensor, split: int, gate: torch.Tensor, eps: float
) -> torch.Tensor:
    out = residual.new_empty(residual.shape)
    if residual.shape[0]:
        wrap_triton(_gated_residual_kernel)[(residual.shape[0],)](
            *(residual, update, gate, out, split),
            *(rows.stride(0) for rows in (residual, update, gate)),
            eps,
            **_tiles("gated_residual", residual),
        )
    return out


@operator("gated_residual_ada_rms_norm", reference.gated_residual_ada_rms_norm)
def _gated_residual_ada_rms_norm(
    residual: torch.Tensor, update: torch.Tensor, split: int, gate: torch.Tensor, scale: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, normed = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    if residual.shape[0]:
        wrap_triton(_gated_residual_ada_rms_norm_kernel)[(residual.shape[0],)](
            *(residual, update, gate, scale, out, normed, split),
            *(rows.stride(0) for rows in (residual, update, gate, scale)),
            eps,
            **_tiles("gated_residual_ada_rms_norm", residual),
        )
    return out, normed


def _check_rows(name: str, rows: torch.Tensor) -> None:
    validate.rows(name, rows, (None, None))
    if rows.shape[1] < 8:
        raise ValueError(f"{name} has width {rows.shape[1]}; expected at least 8")


def _check_residual(residual: torch.Tensor, update: torch.Tensor, split: int) -> None:
    _check_rows("residual", residual)
    validate.tensor("update", update, residual.shape, device=residual.device)
    validate.alike("update", update, "residual", residual)
    validate.split(split, residual.shape[0])


def static_cases(capability: int) -> list[StaticCase]:
    """The three launches at the model's shape, 10,240 + 3,072 rows (512 px, 4 pairs, two branches) of 2304.

    Scales and gates are float32, as the modulation table is; they are 18 KB that stay in the caches.
    """
    rows, width = 13_312, 2304
    main, tail = pieces(width)
    kernels = [
        ("ada_rms_norm", _ada_rms_norm_kernel, 2),
        ("gated_residual", _gated_residual_kernel, 3),
        ("gated_residual_ada_rms_norm", _gated_residual_ada_rms_norm_kernel, 4),
    ]
    return [
        row_case(
            name,
            kernel,
            dtype,
            {"D": width, "MAIN": main, "TAIL": tail},
            row_warps(width, tuning.default_config(name, capability, dtype)["num_warps"], LANE_ELEMENTS),
            row_operands * rows * width * dtype.itemsize,
            {name: "*fp32" for name in ("gate_ptr", "scale_ptr") if name in kernel.arg_names},
        )
        for name, kernel, row_operands in kernels
        for dtype in (torch.bfloat16, torch.float32)
    ]


def ada_rms_norm(rows: torch.Tensor, split: int, scale: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Adaptive RMSNorm, `rms(rows) * (1 + scale[stream])` (LaVin-DiT, arXiv 2411.11505, section 3.3).

    No learned weight. Computed in float32 from one read of the rows and rounded once. On a CPU the reference runs.

    Args:
        rows: `[rows, D]`, stream-major, D >= 8; bfloat16, float16 or float32 (float64 on a CPU); rows may be strided.
        split: rows of the cond stream, the first row of the x stream; 0 <= split <= rows. A run-time value.
        scale: `[2, D]`, cond then x, in any of those dtypes; any stride between the two, so that it can be a slice of a
            modulation table or an expanded vector.
        eps: added to the mean of squares.

    Returns:
        `[rows, D]`, contiguous, in the dtype of `rows`.

    Raises:
        TypeError: an argument is no tensor or has a dtype that is not listed.
        ValueError: rank, width, device, a last dimension that is not contiguous, or a split outside of the rows.
    """
    _check_rows("rows", rows)
    validate.split(split, rows.shape[0])
    validate.tensor("scale", scale, (2, rows.shape[1]), device=rows.device)
    return _ada_rms_norm(rows, split, scale, eps)


def gated_residual(
    residual: torch.Tensor, update: torch.Tensor, split: int, gate: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """Sandwich-normed residual, `residual + gate[stream] * rms(update)` (LaVin-DiT, arXiv 2411.11505, section 3.3).

    Computed in float32 from one read of both inputs and rounded once. On a CPU the reference runs instead.

    Args:
        residual, update: `[rows, D]`, stream-major, D >= 8, of one dtype: bfloat16, float16 or float32 (float64 on a
            CPU); rows may be strided.
        split: rows of the cond stream; 0 <= split <= rows. A run-time value.
        gate: `[2, D]`, cond then x, tanh already applied, in any of those dtypes and with any stride between the two.
        eps: added to the mean of squares.

    Returns:
        `[rows, D]`, contiguous, in the dtype of `residual`.

    Raises:
        TypeError: an argument is no tensor, has a dtype that is not listed, or the two inputs differ in theirs.
        ValueError: rank, sizes, device, a last dimension that is not contiguous, or a split outside of the rows.
    """
    _check_residual(residual, update, split)
    validate.tensor("gate", gate, (2, residual.shape[1]), device=residual.device)
    return _gated_residual(residual, update, split, gate, eps)


def gated_residual_ada_rms_norm(
    residual: torch.Tensor,
    update: torch.Tensor,
    split: int,
    gate: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_residual` and the `ada_rms_norm` that follows it, in one pass over memory.

    The norm is of the residual as it is returned, rounded to its dtype. On a CPU the reference runs instead.

    Args:
        residual, update, split, gate: as in `gated_residual`.
        scale: `[2, D]`, as in `ada_rms_norm`.
        eps: added to both means of squares.

    Returns:
        `(residual + gate * rms(update), rms(of that) * (1 + scale))`, both `[rows, D]`, contiguous, in the dtype of
        `residual`.

    Raises:
        TypeError: an argument is no tensor, has a dtype that is not listed, or the two inputs differ in theirs.
        ValueError: rank, sizes, device, a last dimension that is not contiguous, or a split outside of the rows.
    """
    _check_residual(residual, update, split)
    validate.tensor("gate", gate, (2, residual.shape[1]), device=residual.device)
    validate.tensor("scale", scale, (2, residual.shape[1]), device=residual.device)
    return _gated_residual_ada_rms_norm(residual, update, split, gate, scale, eps)
