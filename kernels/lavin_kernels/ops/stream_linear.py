"""Bias-free linear of each stream with its own weight, both into one output."""

from __future__ import annotations

import torch

from lavin_kernels import validate
from lavin_kernels.reference import dit as reference


def stream_linear(rows: torch.Tensor, split: int, weight: torch.Tensor) -> torch.Tensor:
    """Bias-free linear of each stream, `rows @ weight[stream].T`.

    There is no kernel behind it: two products of the library (cuBLAS on CUDA), each written straight into its slice of
    the output. Where a graph is traced (`torch.compile`, `torch.export`) or a gradient is wanted, it is two linears and
    a concatenation, whose copy a compiler plans away and eager PyTorch would not.

    Args:
        rows: `[rows, K]`, stream-major; bfloat16, float16 or float32 (float64 on a CPU); rows may be strided.
        split: rows of the cond stream; 0 <= split <= rows.
        weight: `[2, N, K]`, cond then x, in the dtype of `rows`.

    Returns:
        `[rows, N]`, contiguous, in the dtype of `rows`.

    Raises:
        TypeError: an argument is no tensor, or a dtype that is not listed or that differs between the two.
        ValueError: rank, sizes, device, a last dimension that is not contiguous, or a split outside of the rows.
    """
    validate.rows("rows", rows, (None, None))
    validate.split(split, rows.shape[0])
    validate.tensor("weight", weight, (2, None, rows.shape[1]), device=rows.device)
    validate.alike("weight", weight, "rows", rows)
    return reference.stream_linear(rows, split, weight)
