"""SwiGLU on the joined gate and up projections of both streams."""

import torch
import triton
import triton.language as tl

from lavin_kernels import tuning, validate
from lavin_kernels.launch import operator, row_case, wrap_triton
from lavin_kernels.reference import dit as reference
from lavin_kernels.static_case import StaticCase

CANDIDATES = [
    {"block": block, "num_warps": num_warps}
    for block, num_warps in [(512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8)]
]


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, row_stride, INNER: tl.constexpr, BLOCK: tl.constexpr):
    blocks: tl.constexpr = (INNER + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = columns < INNER
    gate_ptrs = gate_up_ptr + row * row_stride + columns
    # Nothing reads the joined projection again; the product is what the next linear reads.
    gate = tl.load(gate_ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    up = tl.load(gate_ptrs + INNER, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(out_ptr + row * INNER + columns, gate * tl.sigmoid(gate) * up, mask=mask)


@operator("swiglu", reference.swiglu)
def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    if rows * inner:
        launch = tuning.config("swiglu", gate_up.device, gate_up.dtype)
        block = launch["block"]
        wrap_triton(_swiglu_kernel)[(rows * triton.cdiv(inner, block),)](
            gate_up, out, gate_up.stride(0), INNER=inner, BLOCK=block, num_warps=launch["num_warps"]
        )
    return out


def static_cases(capability: int) -> list[StaticCase]:
    """The launch at the model's shape: 10,240 + 3,072 rows (512 px, 4 pairs, two branches), inner width 6144."""
    rows, inner = 13_312, 6144
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        launch = tuning.default_config("swiglu", capability, dtype)
        constexprs = {"INNER": inner, "BLOCK": launch["block"]}
        bytes = 3 * rows * inner * dtype.itemsize
        cases.append(row_case("swiglu", _swiglu_kernel, dtype, constexprs, launch["num_warps"], bytes))
    return cases


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of the joined projection (LaVin-DiT, arXiv 2411.11505; SwiGLU, arXiv 2002.05202).

    Args:
        gate_up: `[rows, 2 * inner]`, gate first; bfloat16, float16 or float32 (float64 on a CPU); rows may be strided.

    Returns:
        `[rows, inner]`, contiguous, in the dtype of `gate_up`, rounded once from float32.

    Raises:
        TypeError: `gate_up` is no tensor or has another dtype.
        ValueError: its rank, an odd width, its device, or a last dimension that is not contiguous.
    """
    validate.rows("gate_up", gate_up, (None, None))
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has width {gate_up.shape[1]}; expected an even one, gate and up side by side")
    return _swiglu(gate_up)
