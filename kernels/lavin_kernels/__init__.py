"""Fused operators of LaVin-DiT: Triton kernels on CUDA, their plain references on a CPU.

Public functions are loaded on first use, so that importing the package imports neither Triton nor a kernel. Where
Triton is not installed (it has no wheels beyond Linux) they are the references, which they run on a CPU anyway.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from lavin_kernels.table import OPERATORS

if TYPE_CHECKING:
    from lavin_kernels.branches import Branches
    from lavin_kernels.ops.ada_norm import ada_rms_norm, gated_residual, gated_residual_ada_rms_norm
    from lavin_kernels.ops.group_norm import group_norm_silu
    from lavin_kernels.ops.joint_attention import joint_attention, joint_attention_with_lse
    from lavin_kernels.ops.qk_norm_rope import qk_norm_rope
    from lavin_kernels.ops.qk_norm_rope_into import qk_norm_rope_into
    from lavin_kernels.ops.spatial_norm import spatial_norm_silu
    from lavin_kernels.ops.stream_linear import stream_linear
    from lavin_kernels.ops.swiglu import swiglu

__all__ = [
    "Branches",
    "ada_rms_norm",
    "gated_residual",
    "gated_residual_ada_rms_norm",
    "group_norm_silu",
    "joint_attention",
    "joint_attention_with_lse",
    "qk_norm_rope",
    "qk_norm_rope_into",
    "spatial_norm_silu",
    "stream_linear",
    "swiglu",
]


def __getattr__(name: str) -> Any:
    if name == "Branches":
        home = "branches"
    elif name not in OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    elif importlib.util.find_spec("triton") is None:
        home = f"reference.{OPERATORS[name].reference}"
    else:
        home = f"ops.{OPERATORS[name].module}"
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
