"""Compiled training steps that never stop a run: what does not compile, or was not compiled before, runs as it is."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lavin_rt.mini.train.trainer import autocast

LIMIT = 64  # shapes that one function may be compiled for
PIECES = 8  # that a batch goes through the plain function in, for comparison
AGREEMENT = 0.35  # relative difference of compiled and plain gradients, of which 16 bits leave some hundredths


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
        self, network: nn.Module, function: Callable[..., Any], enabled: bool, blocks: Iterable[nn.Module] | None = None
    ):
        self.network, self.function, self.enabled = network, function, enabled
        self.shapes: set[tuple] = set()
        self.whole = function
        if enabled:
            torch._dynamo.config.recompile_limit = LIMIT
            torch._dynamo.config.accumulated_recompile_limit = 16 * LIMIT
            inductor = importlib.import_module("torch._inductor.config")
            if hasattr(inductor.triton, "mix_order_reduction"):
                inductor.triton.mix_order_reduction = False  # young, and at work in the gradients of norms
            if blocks is None:
                self.whole = torch.compile(function, dynamic=False)
            else:
                # torch 2.11 on an H200: fused, gradients of queries and keys come out ten thousand times too large;
                # each operation by itself is right, in 29 ms where eager takes 48 (two of the mini's blocks).
                on_gpu = next(network.parameters()).device.type == "cuda"
                for block in blocks:
                    block.compile(dynamic=False, options={"max_fusion_size": 1} if on_gpu else None)

    def warm_up(self, *tensors: torch.Tensor) -> float:
        """Compiles forward and backward for these shapes; returns the seconds it took.

        What comes out, results and gradients, is compared with the plain function's on random numbers, with parameters
        that are no longer zero; where they differ nothing runs compiled. That and any failure is a warning.
        """
        if not self.enabled:
            return 0.0
        began, kept = time.monotonic(), [p.detach().clone() for p in self.network.parameters()]
        generator = torch.Generator(tensors[0].device).manual_seed(0)
        tensors = tuple(torch.empty(t.shape, device=t.device).uniform_(generator=generator) for t in tensors)
        try:
            with torch.no_grad():
                for parameter in self.network.parameters():
                    noise = torch.empty(parameter.shape, device=parameter.device).normal_(generator=generator)
                    parameter.add_(noise, alpha=0.02)
            compiled = self._gradients(self.whole, tensors)
            with torch.compiler.set_stance("force_eager"):
                plain = self._gradients(self.function, tensors, PIECES)
            usual = sum(float(value.norm()) for value in plain.values()) / len(plain)
            apart = {
                name: float((compiled[name] - value).norm() / (value.norm() + 0.1 * usual))
                for name, value in plain.items()
            }
            worst = sorted(apart, key=apart.__getitem__, reverse=True)[:5]
            if apart[worst[0]] < AGREEMENT:
                self.shapes.add(_shapes(tensors))
            else:
                self._give_up(RuntimeError(f"results differ: {', '.join(f'{n} {apart[n]:.2g}' for n in worst)}"))
        except torch.OutOfMemoryError:
            print("warning: out of memory while compiling for a shape", file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
        except Exception as error:
            self._give_up(error)
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.network.parameters(), kept, strict=True):
                    parameter.copy_(value)
            self.network.zero_grad(set_to_none=True)
        return time.monotonic() - began

    def _gradients(
        self, function: Callable[..., Any], tensors: tuple[torch.Tensor, ...], pieces: int = 1
    ) -> dict[str, torch.Tensor]:
        """The gradients of the mean of the function's first result, by the parameters' names, and that result.

        The batch may go through in pieces, as what is not compiled takes more memory.
        """
        self.network.zero_grad(set_to_none=True)
        found = []
        for part in zip(*(tensor.chunk(pieces) for tensor in tensors), strict=True):
            with autocast(tensors[0].device):
                results = function(self.network, *part)
            share = len(part[0]) / len(tensors[0])
            result = results[0] if isinstance(results, tuple) else results
            (share * result.mean()).backward()
            found.append(result.detach().float() if result.dim() else share * result.detach().float())
        whole = torch.cat(found) if result.dim() else torch.stack(found).sum()
        gradients = {name: p.grad.float() for name, p in self.network.named_parameters() if p.grad is not None}
        return gradients | {"result": whole}

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

    def stop(self) -> None:
        """Runs everything as it is from now on."""
        self.enabled = False

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
