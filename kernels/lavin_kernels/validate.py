"""Checks of arguments before any launch: one line that names the argument, what it is and what it should be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lavin_kernels.branches import Branches
from lavin_kernels.launch import runs_kernel

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)


def tensor(
    name: str,
    value: torch.Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: torch.device | None = None,
) -> None:
    """Checks type, dtype, rank, sizes (`None` stands for any), device, and that the last dimension is contiguous.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: anything else.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is of type {type(value).__name__}; expected a tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {_dtypes([value.dtype])}; expected {_dtypes(dtypes)}")
    if value.dim() != len(shape):
        raise ValueError(f"{name} has shape {_sizes(value.shape)}; expected {len(shape)} dimensions, {_sizes(shape)}")
    for size, expected in zip(value.shape, shape, strict=True):
        if expected is not None and size != expected:
            raise ValueError(f"{name} has shape {_sizes(value.shape)}; expected {_sizes(shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}; expected {device}, where the rows are")
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {value.stride(-1)} in its last dimension; expected 1, as .contiguous() gives"
        )


def rows(name: str, value: torch.Tensor, shape: Sequence[int | None]) -> None:
    """`tensor` for the rows that an operator works on, which decide where it runs and in which dtype.

    Raises:
        TypeError: not a tensor, or a dtype that the kernels (on a CPU: the references) do not take.
        ValueError: rank, sizes or strides, or a device that is neither CUDA nor CPU.
    """
    tensor(name, value, shape)
    if value.dtype not in KERNEL_DTYPES and runs_kernel(value.device):
        raise TypeError(f"{name} has dtype {_dtypes([value.dtype])}; kernels take {_dtypes(KERNEL_DTYPES)}")
    if value.device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(f"{name} is on {value.device}; expected a CUDA device or the CPU")


def alike(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Checks that `value` has the dtype of `other`."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} has dtype {_dtypes([value.dtype])}; expected {_dtypes([other.dtype])}, as {other_name} has"
        )


def split(value: int, rows: int) -> None:
    """Checks that the first row of the x stream lies in `[0, rows]`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"split is of type {type(value).__name__}; expected an int")
    if not 0 <= value <= rows:
        raise ValueError(f"split is {value}; expected 0 <= split <= {rows}, the number of rows")


def branches(value: Branches, cond_rows: int, x_rows: int, device: torch.device) -> None:
    """Checks that the branches cover exactly the rows of both streams and have their tables on the rows' device."""
    if not isinstance(value, Branches):
        raise TypeError(f"branches is of type {type(value).__name__}; expected Branches")
    if (sum(value.cond_lens), sum(value.x_lens)) != (cond_rows, x_rows):
        raise ValueError(
            f"branches cover {sum(value.cond_lens)} cond and {sum(value.x_lens)} x rows; "
            f"expected {cond_rows} and {x_rows}, as many as there are"
        )
    tensor("branches.table", value.table, (len(value.cond_lens), 5 if value.kept_lens else 4), (torch.int32,), device)
    for name in ("branch_rows", *(["key_rows"] if value.kept_lens else [])):
        tensor(f"branches.{name}", getattr(value, name), (cond_rows + x_rows,), (torch.int32,), device)


def _sizes(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def _dtypes(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
