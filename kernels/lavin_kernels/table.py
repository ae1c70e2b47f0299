"""The one table of operators: where each is, its reference, and the kernels that it launches."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Operator:
    """A row of the table.

    Attributes:
        module: in `lavin_kernels.ops`, with the public function, launch configurations worth timing (`CANDIDATES`) and,
            where some do not run everywhere, `fits(candidate, capability)`.
        reference: module in `lavin_kernels.reference` with the function of the same name.
        kernels: names under which launches are tuned, none where nothing is.
    """

    module: str
    reference: str = "dit"
    kernels: tuple[str, ...] = ()


OPERATORS = {
    "ada_rms_norm": Operator("ada_norm", kernels=("ada_rms_norm",)),
    "gated_residual": Operator("ada_norm", kernels=("gated_residual",)),
    "gated_residual_ada_rms_norm": Operator("ada_norm", kernels=("gated_residual_ada_rms_norm",)),
    "group_norm_silu": Operator("group_norm", "vae", ("channel_moments", "group_norm_silu")),
    "joint_attention": Operator("joint_attention", kernels=("joint_attention",)),
    "joint_attention_with_lse": Operator("joint_attention"),
    "qk_norm_rope": Operator("qk_norm_rope", kernels=("qk_norm_rope",)),
    "qk_norm_rope_into": Operator("qk_norm_rope_into"),
    "spatial_norm_silu": Operator("spatial_norm", "vae", ("spatial_norm_silu",)),
    "stream_linear": Operator("stream_linear"),
    "swiglu": Operator("swiglu", kernels=("swiglu",)),
}
# Every tuned kernel and the operator that launches it, in the order in which they are tuned.
KERNELS = {kernel: name for name, operator in OPERATORS.items() for kernel in operator.kernels}
