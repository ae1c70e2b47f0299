"""Numbers as people hold them: Python's, NumPy's scalars, and arrays and tensors without a dimension."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from lavin_rt.errors import InputError

if TYPE_CHECKING:
    import torch


def whole(value: Any) -> int | None:
    """A whole number as Python's; None for anything else, truth values and arrays of one number among it."""
    if _is_truth(value) or getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def real(value: Any) -> float | None:
    """A real number as Python's; None for anything else, text and truth values among it."""
    if isinstance(value, str | bytes) or _is_truth(value) or getattr(value, "ndim", 0):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def floats(values: Any, name: str) -> torch.Tensor:
    """A tensor, array or nested list of numbers as a float32 tensor.

    Raises:
        InputError: anything else; `name` says what it was given as.
    """
    import torch

    try:
        return torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} is {type(values).__name__}; expected a tensor or an array of numbers") from None


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
