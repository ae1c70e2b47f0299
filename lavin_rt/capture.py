"""CUDA graphs of one device: one pool, one stream to capture on, and captures that fail without a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from lavin_rt.devices import causes, out_of_memory


class CaptureError(RuntimeError):
    """A function could not be captured into a CUDA graph, for another reason than a lack of memory."""


class Graphs:
    """Captures functions into CUDA graphs, to be replayed one at a time.

    All graphs share one pool, as no two replays run at the same time; what a function is to leave behind it writes into
    tensors that were there before. All are captured on one stream, on which nothing else ever runs: libraries keep a
    workspace for every stream that they have seen, and torch 2.12 and newer gives that of a graph's stream back when
    the graph goes. One that a warm-up had taken there would go back to the driver under the graphs that are left; one
    that a capture took lies in the pool, which lives as long as any of them.

    The device is the current one whenever this is used.
    """

    def __init__(self):
        self._stream: torch.cuda.Stream | None = None
        self._pool: tuple[int, int] | None = None

    def capture(self, function: Callable[[], object]) -> Callable[[], object]:
        """The replay of a function that has run before, so that kernels are compiled and libraries have their memory.

        Returns:
            what replays the graph on the current stream, and lets it go with its last reference.

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
        return graph.replay

    def release(self) -> None:
        """Lets the pool go, which ends with its last graph."""
        self._pool = None

    def _abandon(self) -> None:
        """Undoes what a capture that failed leaves behind in torch: it goes on recording allocations to the pool, holds
        on to it, and takes random numbers for a part of the capture. Where torch did undo it, it refuses, rightly.
        """
        index = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
        with contextlib.suppress(RuntimeError, AttributeError):
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state().graphsafe_get_state())
        self._stream = None  # one whose capture was invalidated is not tried again
