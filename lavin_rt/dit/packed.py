"""One guided sampling step on packed rows: what inference runs, on every device."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

import lavin_kernels
import lavin_kernels.reference.dit
from lavin_rt.compiling import compiling
from lavin_rt.dit import cpu_operators
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.layout import Layout
from lavin_rt.dit.model import (
    GATE_MLP,
    GATE_MSA,
    NORM_EPS,
    SCALE_MLP,
    SCALE_MSA,
    JDiT,
    JointAttention,
    patchify,
    unpatchify,
)
from lavin_rt.dit.prepacked import PrepackedLinear, prepacked_mlp
from lavin_rt.errors import InputError

IMPLEMENTATIONS = ("auto", "plain", "torch", "triton")
SHAPES_COMPILED = 64


def check_impl(impl: str) -> None:
    """Raises an `InputError` for a name that no implementation has."""
    if impl not in IMPLEMENTATIONS:
        raise InputError(f"impl is {impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}")


def resolve_impl(impl: str, device: torch.device, config: DiTConfig) -> str:
    """The implementation that `impl` names on this device; `"auto"` is Triton on CUDA of compute capability 8.0 or
    newer where the head size is a multiple of 8 up to 128 and Triton is installed, else torch. Where Triton is and
    cannot launch, it warns.

    Raises:
        InputError: an unknown name, Triton kernels for a head size that they do not cover, or where they cannot run.
    """
    check_impl(impl)
    fits = config.head_size % 8 == 0 and config.head_size <= 128
    if impl == "auto":
        # Older devices lack what the kernels are made for: bfloat16, asynchronous copies.
        modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        if not (modern and fits and _kernels_run_on(device)):
            return "torch"
        if fault := _driver_fault(device):
            warnings.warn(f"{fault}; impl='torch' runs instead, slower", stacklevel=1)
        return "torch" if fault else "triton"
    if impl == "triton" and not fits:
        raise InputError(
            f"impl is 'triton', whose kernels take head sizes that are a multiple of 8 up to 128; this model's is "
            f"{config.head_size}; use impl='torch'"
        )
    if impl == "triton" and not _kernels_run_on(device):
        raise InputError(
            f"impl is 'triton', whose kernels need a CUDA device and the package triton; the model is on {device}; "
            "use impl='torch'"
        )
    if impl == "triton" and (fault := _driver_fault(device)):
        raise InputError(f"impl is 'triton': {fault}, or use impl='torch'")
    return impl


def _kernels_run_on(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from lavin_kernels.launch import runs_kernel

    return runs_kernel(device)


def _driver_fault(device: torch.device) -> str:
    """Why Triton, which is installed, cannot launch kernels on this device and what to do; empty where it can."""
    from lavin_kernels.launch import driver_fault

    fault = driver_fault() if device.type == "cuda" else ""
    what = "; install a C compiler and Python's headers (Debian: apt-get install gcc python3-dev)"
    return f"Triton cannot launch kernels here: {fault}{what}" if fault else ""


def operators(impl: str, device: torch.device, compiled: bool = False) -> ModuleType:
    """The module whose functions a packed step calls, with the same signatures: the kernels, or what PyTorch computes,
    eagerly on a CPU in forms that take less time there.
    """
    if impl == "triton":
        return lavin_kernels
    return cpu_operators if device.type == "cpu" and not compiled else lavin_kernels.reference.dit


def padded_head_size(head_size: int, impl: str) -> int:
    """Width at which heads are stored. Tensor cores take 16 elements of a head at a time; zeros written once spare the
    attention kernel its masks.
    """
    return -(-head_size // 16) * 16 if impl == "triton" else head_size


class PackedStep:
    """The velocity of all branches of a step, on stream-major packed rows.

    What the mathematics does not need is not done: the modulation comes from a table, the condition comes embedded,
    both guidance branches run as one pass, and in the last block the cond stream stops at its keys and values.
    """

    def __init__(self, dit: JDiT, layout: Layout, impl: str):
        self.dit = dit
        self.layout = layout
        self.impl = impl
        self.ops: Any = operators(impl, layout.positions.device)
        self.padded_head_size = padded_head_size(dit.config.head_size, impl)

    def compiled(self) -> Callable[..., torch.Tensor]:
        """The step through `torch.compile`, once for every shape; torch's cache on disk outlives the process."""
        step = copy.copy(self)
        step.ops = operators(self.impl, self.layout.positions.device, compiled=True)
        with compiling("the step"):
            network = torch.compile(step.__call__, dynamic=False, fullgraph=True)

        def call(*arguments: torch.Tensor) -> torch.Tensor:
            # Every shape is a compilation of the same code, of which torch allows eight unless told otherwise.
            with compiling("the step"), torch._dynamo.config.patch(recompile_limit=SHAPES_COMPILED):
                return network(*arguments)

        return call

    def __call__(
        self,
        latents: torch.Tensor,
        cond_rows: torch.Tensor,
        modulation: torch.Tensor,
        head_scale: torch.Tensor,
        *kept: torch.Tensor,
    ) -> torch.Tensor:
        """Velocity of every branch.

        Args:
            latents: `[queries, 16, target frames, h, w]`.
            cond_rows: `[cond rows, D]` in the model's dtype, the embedded conditions of all branches, ordered as
                `Shape.condition_frames`; a null condition is a zero frame and the query's frames.
            modulation: `[depth, 2, 4, D]`, one evaluation of the modulation table.
            head_scale: `[D]`, likewise.
            kept: where the form stores or reuses any, the keys and the values of every block in turn,
                `[rows of all branches, kv_heads, padded_head_size]` branch-contiguous; written in place.

        Returns:
            `[branches, 16, target frames, h, w]` in the model's dtype, ordered as `Shape.condition_frames`, without the
            null branches where the form has none.
        """
        dit, ops, layout = self.dit, self.ops, self.layout
        shape, config, split = layout.shape, dit.config, layout.branches.split
        x_rows = dit.x_embedder(patchify(latents.to(dit.dtype))).flatten(0, 1)
        # All branches of a query start from the same latents.
        fresh = [cond_rows[first:end] for first, end in layout.cond_ranges]
        residual = torch.cat(fresh + [x_rows] * layout.branches_of_a_query)
        normed = ops.ada_rms_norm(residual, split, modulation[0, :, SCALE_MSA], NORM_EPS)
        for index, block in enumerate(dit.blocks):
            last = index + 1 == config.depth
            update = self._attend(block.attention, normed, last, kept[2 * index : 2 * index + 2])
            if last:
                residual, split = residual[split:], 0
            update = self._linear(update, split, block.attention.proj)
            residual, normed = ops.gated_residual_ada_rms_norm(
                residual, update, split, modulation[index, :, GATE_MSA], modulation[index, :, SCALE_MLP], NORM_EPS
            )
            # The MLP is where most memory is taken: none of it by what attention left.
            if isinstance(block.mlp.gate_up, PrepackedLinear) and isinstance(block.mlp.down, PrepackedLinear):
                update = prepacked_mlp(normed, split, block.mlp.gate_up, block.mlp.down)
            else:
                update = ops.stream_linear(normed, split, block.mlp.gate_up)
                del normed
                update = ops.swiglu(update)
                update = ops.stream_linear(update, split, block.mlp.down)
            next_scale = head_scale.expand(2, -1) if last else modulation[index + 1, :, SCALE_MSA]
            residual, normed = ops.gated_residual_ada_rms_norm(
                residual, update, split, modulation[index, :, GATE_MLP], next_scale, NORM_EPS
            )
        tokens = dit.head.linear(normed).unflatten(0, (layout.branches.table.shape[0], -1))
        return unpatchify(tokens, shape.target_frames, shape.height, shape.width)

    def _linear(self, rows: torch.Tensor, split: int, weight: torch.Tensor) -> torch.Tensor:
        if isinstance(weight, PrepackedLinear):
            return weight.both(rows, split)
        return self.ops.stream_linear(rows, split, weight)

    def _attend(
        self, attention: JointAttention, normed: torch.Tensor, last: bool, kept: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Joint attention's rows `[rows, D]`, in the last block those of the x stream alone.

        A function of its own so that projections, queries, keys and values, 3 D a row, are let go before the MLP.
        """
        ops, layout, config = self.ops, self.layout, self.dit.config
        split = layout.branches.split
        if last:
            cond = F.linear(normed[:split], attention.qkv[0, config.hidden_size :])
            x = F.linear(normed[split:], attention.qkv[1])
        else:
            qkv = attention.qkv
            if isinstance(qkv, PrepackedLinear):  # not joined, to be split again
                cond, x = qkv(normed[:split], 0), qkv(normed[split:], 1)
            else:
                cond, x = ops.stream_linear(normed, split, qkv).tensor_split((split,))
        rotation = (
            *(layout.branches, layout.positions, layout.cos, layout.sin),
            *(attention.q_norm, attention.k_norm, config.head_size, NORM_EPS),
        )
        if kept:
            # Without the null branches, whose rows come last, a step works on the beginning of the buffers.
            k, v = (part[: layout.branches.keys] for part in kept)
            q = ops.qk_norm_rope_into(cond, x, k, v, *rotation)
        else:
            q, k, v = ops.qk_norm_rope(cond, x, *rotation, self.padded_head_size)
        del cond, x
        return ops.joint_attention(q, k, v, layout.branches, config.head_size)
