"""The error that rounding to 8 bits makes by itself: the measure of a denoiser in int8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lavin_rt.artifact.manifest import Manifest

ROWS_MOST, WEIGHTS_MOST = 127, 63  # weights have 7 bits, see `to_openvino.int8`


def in_int8(manifest: Manifest) -> bool:
    """Whether an artifact's denoiser is."""
    return manifest.parts["denoiser"].get("quantized") == "int8"


class EightBits(TorchFunctionMode):
    """Linears, while it is entered, of operands rounded to 8 bits and weights to 7: inputs by tensor, weights by output
    channel, each scaled to its largest value.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.linear:
            rows, weight, *bias = args
            args = rounded(rows, tuple(range(rows.dim())), ROWS_MOST), rounded(weight, -1, WEIGHTS_MOST), *bias
        return function(*args, **(kwargs or {}))


def rounded(tensor: torch.Tensor, dims: int | tuple[int, ...], most: int) -> torch.Tensor:
    """A tensor rounded to multiples of its largest absolute value over `dims` divided by `most`."""
    step = tensor.abs().amax(dims, keepdim=True).clamp_min(torch.finfo(tensor.dtype).tiny) / most
    return (tensor / step).round() * step
