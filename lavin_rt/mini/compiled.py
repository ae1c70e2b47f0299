"""Compiled training steps that never stop a run: what does not compile, or was not compiled before, runs as it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lavin_rt.mini.training import autocast

LIMIT = 64  # shapes that one function may be compiled for


class Compiled:
    """A function of a network and tensors, compiled for the shapes that `warm_up` was called with.

    Args:
        network: the first argument; its gradients are cleared by `warm_up`.
        function: `(network, *tensors)` to a loss, or to a tuple with the loss first.
        enabled: without it nothing is compiled.
        blocks: submodules to compile each by itself, which takes less time where they are alike; without them the
            whole function is.
    """

    def __init__(
        self, network: nn.Module, function: Callable[..., Any], enabled: bool, blocks: nn.ModuleList | None = None
    ):
        self.network, self.function, self.enabled = network, function, enabled
        self.shapes: set[tuple] = set()
        self.whole = function
        if enabled:
            torch._dynamo.config.recompile_limit = LIMIT
            torch._dynamo.config.accumulated_recompile_limit = 16 * LIMIT
            if blocks is None:
                self.whole = torch.compile(function, dynamic=False)
            else:
                for block in blocks:
                    block.compile(dynamic=False)

    def warm_up(self, *tensors: torch.Tensor) -> float:
        """Compiles forward and backward for these shapes; returns the seconds it took. A failure is a warning."""
        if not self.enabled:
            return 0.0
        tensors = tuple(map(_plain, tensors))
        began = time.monotonic()
        try:
            with autocast(tensors[0].device):
                results = self.whole(self.network, *tensors)
            (results[0] if isinstance(results, tuple) else results).mean().backward()
            if tensors[0].is_cuda:
                torch.cuda.synchronize()
            self.shapes.add(_shapes(tensors))
        except torch.OutOfMemoryError:
            print("warning: out of memory while compiling for a shape", file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
        except Exception as error:
            self._give_up(error)
        self.network.zero_grad(set_to_none=True)
        return time.monotonic() - began

    def __call__(self, *tensors: torch.Tensor) -> Any:
        if self.enabled and _shapes(tensors) in self.shapes:
            try:
                return self.whole(self.network, *map(_plain, tensors))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._give_up(error)
        with torch.compiler.set_stance("force_eager"):
            return self.function(self.network, *tensors)

    def _give_up(self, error: Exception) -> None:
        """Compilers fail in many ways, none of which is worth a training run."""
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        print(f"warning: not compiled, slower from here on: {reason}", file=sys.stderr, flush=True)
        self.enabled = False


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in plain memory, strides of size-1 dimensions included: others would be compiled for again."""
    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").stride()
    return (
        tensor
        if tensor.stride() == plain
        else torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)
    )


def _shapes(tensors: tuple[torch.Tensor, ...]) -> tuple:
    return tuple(tuple(tensor.shape) for tensor in tensors)
