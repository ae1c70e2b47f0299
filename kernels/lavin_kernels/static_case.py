"""What a kernel module hands to a compiler that has no GPU: one case per kernel form, dtype and shape worth checking.

Every kernel module has a function `static_cases(capability: int) -> list[StaticCase]` for the model's shapes in
bfloat16 and float32 at the launch configuration that the capability gets by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class StaticCase:
    """One launch, described without tensors.

    Attributes:
        name: kernel and form, e.g. `joint_attention/pointer/bfloat16`.
        fn: the `@triton.jit` or `@gluon.jit` function.
        signature: type of every argument in order: `*bf16`, `*fp32`, `*i32`, `i32`, `fp32`, `constexpr`, ...
        constexprs: value of every `constexpr` argument.
        divisible: names of pointers and integers that a real launch finds divisible by 16.
        num_warps, num_stages: launch options; `options` holds any others, such as `maxnreg`.
        useful_flops: of the mathematics alone, without head padding and masked tiles.
        executed_flops: matrix work that one launch really executes.
        bytes: device memory that one launch has to move, every operand once.
        dtype: of the rows.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    useful_flops: int
    executed_flops: int
    bytes: int
    dtype: torch.dtype
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def compile(self, capability: int):
        """Compiles to machine code of a CUDA compute capability such as 90, without a GPU; returns Triton's kernel."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        if self.fn.is_gluon():
            from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
        names = list(self.signature)
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in self.divisible}
        source = ASTSource(self.fn, dict(self.signature), dict(self.constexprs), attributes)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
