"""CUDA graphs of one device: one pool, one stream to capture on, and captures that fail without a trace."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch

from lavin_rt.console import log
from lavin_rt.devices import causes, out_of_memory


class CaptureError(RuntimeError):
    """A function could not be captured into a CUDA graph, for another reason than a lack of memory."""


class Graphs:
    """Captures functions into CUDA graphs, to be replayed one at a time.

    All graphs share one pool, as no two replays run at the same time (those that follow a capture that failed another
    one); what a function is to leave behind it writes into tensors that were there before. All are captured on one
    stream, on which nothing else ever runs: libraries keep a workspace for every stream that they have seen, and torch
    2.12 and newer gives that of a graph's stream back when the graph goes. One that a warm-up had taken there would go
    back to the driver under the graphs that are left; one that a capture took lies in the pool, which lives as long as
    any of them.

    The device is the current one whenever this is used.
    """

    def __init__(self):
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # torch's handle, of another type in every release

    def capture(self, function: Callable[[], object]) -> Callable[[], object]:
        """The replay of a function that has run before, so that kernels are compiled and libraries have their memory.

        Returns:
            what replays the graph on the current stream, and lets it go with its last reference. It holds the function,
            as the graph reads what that one holds.

        Raises:
            CaptureError: it cannot be captured; the thread and the device are as they were before.
        """
        self._stream = self._stream or torch.cuda.Stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # torch leaves the capture's stream only behind what may fail, so the outer context leaves it. Other threads
            # may go on using the device meanwhile.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                function()
        except RuntimeError as error:
            self._abandon()
            if out_of_memory(error):
                raise
            *_, first = causes(error)  # the last one says only that something failed before
            raise CaptureError(f"no CUDA graph: {' '.join(str(first).split())[:200]}") from error
        return partial(_replay, graph, function)

    def release(self) -> None:
        """Lets the pool go, which ends with its last graph."""
        self._pool = None

    def _abandon(self) -> None:
        """Undoes what a capture that failed leaves behind in torch: it goes on recording allocations to the pool, holds
        on to it, and takes random numbers for a part of the capture. Where torch did undo it, it refuses, rightly.

        Neither the stream, whose capture was invalidated, nor the pool is tried again: torch 2.11 takes the pool for
        one that is still recorded to.
        """
        index = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state().graphsafe_get_state())
        self._stream = self._pool = None


def _replay(graph: torch.cuda.CUDAGraph, function: Callable[[], object]) -> None:
    graph.replay()


@dataclasses.dataclass(eq=False)
class _Kept:
    """A function that has run, a meta tensor like its result, and where it is captured its buffers and replay."""

    stamp: list[tuple[object, int]]
    like: torch.Tensor
    source: torch.Tensor | None = None
    result: torch.Tensor | None = None
    replay: Callable[[], object] | None = None
    refused: bool = False


class Replays:
    """Functions of one tensor, run at the first call of every shape, captured at a later one and replayed from then on.

    Args:
        graphs: what captures.
        device: of the functions' results.
        kept: how many are kept; the one unused for longest goes first.
    """

    def __init__(self, graphs: Graphs, device: torch.device, kept: int):
        self._graphs, self._device, self._most = graphs, device, kept
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()

    def __call__(
        self,
        name: Hashable,
        function: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        stamp: list[tuple[object, int]],
        capture: bool = True,
    ) -> torch.Tensor:
        """`function(x)`, a tensor of its own.

        Args:
            name: of the function; another function has another name.
            function: without a host's doing but launches, and of one shape for every shape of `x`.
            x: on any device.
            stamp: (tensor, version) of what the function reads besides `x`: where one of them is another tensor or has
                changed, the function is captured anew.
            capture: whether now is a time to capture what has run before.
        """
        key = (name, x.shape, x.dtype)
        kept = self._kept.pop(key, None)
        if kept is None or not _same(kept.stamp, stamp):
            result = function(x)
            self._kept[key] = _Kept(stamp, result.to("meta"))
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
            return result
        if kept.replay is None and capture and not kept.refused:
            self._capture(name, function, x, kept)
        self._kept[key] = kept
        if kept.replay is None:
            return function(x)
        assert kept.source is not None and kept.result is not None  # made with the replay
        kept.source.copy_(x)
        kept.replay()
        return kept.result.clone()

    def _capture(
        self, name: Hashable, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, kept: _Kept
    ) -> None:
        kept.source = torch.empty_like(x, device=self._device)
        kept.result = torch.empty_like(kept.like, device=self._device)
        try:
            kept.replay = self._graphs.capture(partial(_into, kept.result, function, kept.source))
            log.debug("captured %s", name)
        except CaptureError as error:
            kept.source, kept.result, kept.refused = None, None, True
            warnings.warn(f"{name}: {error}; it runs without it", stacklevel=2)

    def release(self) -> None:
        """Lets all graphs and buffers go; what has run once has run."""
        for kept in self._kept.values():
            kept.source = kept.result = kept.replay = None


def _into(result: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], source: torch.Tensor) -> None:
    result.copy_(function(source))


def _same(one: list[tuple[object, int]], other: list[tuple[object, int]]) -> bool:
    return len(one) == len(other) and all(a[0] is b[0] and a[1] == b[1] for a, b in zip(one, other, strict=True))
