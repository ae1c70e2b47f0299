"""Where an operator runs, and what the row-wise kernels share: the cut of a row into tiles, and their static cases."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
import triton

from lavin_kernels.static_case import StaticCase

P = ParamSpec("P")
R = TypeVar("R")
# Read once, as `@triton.jit` does when a kernel is defined; a compiled graph could not read it.
_INTERPRETED = triton.knobs.runtime.interpret


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors (`TRITON_INTERPRET=1`)."""
    return _INTERPRETED


def runs_kernel(device: torch.device) -> bool:
    """Whether tensors of a device go to the kernel (CUDA, or a CPU under Triton's interpreter) or to the reference."""
    return device.type == "cuda" or (device.type == "cpu" and interpreted())


@functools.cache
def driver_fault() -> str:
    """What keeps Triton from launching anything on a GPU here, one line; empty where nothing does.

    Its driver is C, built when it is first asked for: that takes a C compiler and Python's headers.
    """
    try:
        _ = triton.runtime.driver.active.utils
    except Exception as error:  # no compiler, a compiler's exit code, no libcuda, a folder that cannot be written
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def operator(
    name: str, reference: Callable[..., Any], mutates_args: Iterable[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes the operator `lavin::NAME` of a function that launches kernels.

    Where the device of its first argument runs none, the reference is called instead, with the same arguments.
    """

    def register(launch: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(launch)  # PyTorch reads the operator's schema and the kernels that it launches off `launch`
        def run(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            function: Callable[..., Any] = launch if runs_kernel(first.device) else reference
            return function(first, *args, **kwargs)

        return torch.library.triton_op(f"lavin::{name}", run, mutates_args=mutates_args)

    return register


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's GPU the current one, on which Triton launches, wherever tensors are; nothing in a trace."""
    real = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_cuda
    elsewhere = real and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else nullcontext()


class _Guarded:
    """A kernel that is launched on the device of its first argument, a tensor."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., Any]:
        def launch(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            with on_device(first):
                return self.kernel[grid](first, *args, **kwargs)

        return launch


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton`, which before torch 2.13 refuses a kernel that the interpreter runs, on the device of
    the first argument.
    """
    return kernel if interpreted() else _Guarded(torch.library.wrap_triton(kernel))


def pieces(width: int) -> tuple[int, int]:
    """Two powers of two that cover `width`, the first always full: 2304 = 2048 + 256, 72 = 64 + 8, 4096 = 2048 + 2048.

    One tile of 4096 for 2304 elements would leave 44 % of its lanes idle.
    """
    first = triton.next_power_of_2(width) // 2
    return first, triton.next_power_of_2(width - first)


def row_warps(width: int, num_warps: int, lane_elements: int) -> int:
    """Warps for one row: as configured, more where a lane would get more than `lane_elements` of `width` elements."""
    return min(max(num_warps, triton.next_power_of_2(triton.cdiv(width, 32 * lane_elements))), 32)


def row_case(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    constexprs: Mapping[str, int],
    num_warps: int,
    bytes: int,
    types: Mapping[str, str] | None = None,
) -> StaticCase:
    """The static case of a row-wise kernel, which does no matrix work.

    Arguments named `*_ptr` point to `dtype`, `eps` is a float32 and the others are int32, unless `types` says
    otherwise; pointers and strides are divisible by 16, as at the model's widths.
    """
    pointer = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    known = {"eps": "fp32", **dict.fromkeys(constexprs, "constexpr"), **(types or {})}
    signature = {
        argument: known.get(argument, pointer if argument.endswith("_ptr") else "i32") for argument in kernel.arg_names
    }
    return StaticCase(
        name=f"{name}/{str(dtype).removeprefix('torch.')}",
        fn=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(argument for argument in signature if argument.endswith(("_ptr", "_stride"))),
        num_warps=num_warps,
        num_stages=1,
        useful_flops=0,
        executed_flops=0,
        bytes=bytes,
        dtype=dtype,
    )
