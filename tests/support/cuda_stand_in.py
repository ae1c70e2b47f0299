"""A stand-in for `torch.cuda` that keeps the books of streams, pools, workspaces and captures, on a CPU.

Work runs on the CPU at once. A capture records the operators with the tensors that they read and wrote, and a replay
runs them again into those very tensors, as a CUDA graph does. What it models of torch, as read in its sources up to
2.13:

* a library's workspace belongs to the stream that first asked for it, and lies in the capture's pool where that was in
  a capture;
* a graph that goes takes its stream's workspaces with it (2.12 and newer); memory of a pool that a live graph uses
  stays mapped, any other goes back to the driver;
* the host may not read a value during a capture;
* a graph keeps nothing alive that was there before it: a replay reads where its tensors once were;
* a capture that fails raises once more when it is ended, before its stream is left and before the allocator stops
  recording to the pool; that pool takes no other capture (seen with torch 2.11).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}
Pool = tuple[int, int]


class Stream:
    """A stream, known by its number."""

    numbers = itertools.count()

    def __init__(self, *_: object):
        self.number = self.cuda_stream = next(self.numbers)

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self) -> object:
        return object()


@dataclasses.dataclass(eq=False)
class Workspace:
    """Memory that a library holds for a stream: of a graph's pool, or of none."""

    pool: Pool | None
    freed: bool = False


class Outside:
    """A tensor that a capture found: what a graph knows of it is where it lies."""

    def __init__(self, tensor: torch.Tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.place = tensor.dtype, (tensor.storage_offset(), tensor.shape, tensor.stride())

    def tensor(self) -> torch.Tensor | None:
        """It, or None where its memory was let go."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return None if storage is None else torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Graph:
    """`torch.cuda.CUDAGraph`: the operators of a capture, with the tensors that they made."""

    def __init__(self, cuda: Cuda):
        self.cuda = cuda
        self.pool: Pool | None = None
        self.workspaces: list[Workspace] = []
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.made: set[int] = set()  # storages of the capture's own tensors
        self.stream: list[int] = []  # a list that outlives the graph
        cuda.graphs.add(self)
        weakref.finalize(self, _forget, cuda.workspaces, self.stream)

    def record(self, function: Any, arguments: tuple, options: dict, result: Any) -> None:
        given = {part.untyped_storage()._cdata for part in _tensors((arguments, options))}
        self.made |= {part.untyped_storage()._cdata for part in _tensors(result)} - given

        def kept(part: torch.Tensor) -> torch.Tensor | Outside:
            return part if part.untyped_storage()._cdata in self.made else Outside(part)

        self.calls.append((function, *tree_map_only(torch.Tensor, kept, (arguments, options, result))))

    def replay(self) -> None:
        pools = {graph.pool for graph in self.cuda.graphs}
        for workspace in self.workspaces:
            if workspace.freed and workspace.pool not in pools:
                self.cuda.faults.append(f"a graph replays on the freed workspace of stream {self.stream}")
        with torch.no_grad():
            for function, *parts in self.calls:
                if any(isinstance(part, Outside) and part.tensor() is None for part in tree_leaves(parts)):
                    self.cuda.faults.append(f"a graph replays {function} on memory that was let go")
                    continue
                arguments, options, result = tree_map_only(Outside, Outside.tensor, parts)
                for old, new in zip(tree_leaves(result), tree_leaves(function(*arguments, **options)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _tensors(parts: Any) -> list[torch.Tensor]:
    return [part for part in tree_leaves(parts) if isinstance(part, torch.Tensor)]


def _forget(workspaces: dict[int, Workspace], stream: list[int]) -> None:
    for number in stream:
        if number in workspaces:
            workspaces.pop(number).freed = True


class Cuda(TorchDispatchMode):
    """The books; as a context, it sees every operator.

    Attributes:
        streams: the current one last.
        workspaces: of every stream, by its number.
        recording: pools to which allocations of a capture are recorded.
        spoilt: pools of captures that failed.
        faults: what a GPU would have crashed on or read wrongly, in words.
        fail: exceptions that the next captures meet, each of which invalidates its capture.
        captures: how many succeeded.
    """

    def __init__(self):
        super().__init__()
        self.streams = [Stream()]
        self.workspaces: dict[int, Workspace] = {}
        self.recording: list[Pool] = []
        self.spoilt: set[Pool] = set()
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.faults: list[str] = []
        self.fail: list[BaseException] = []
        self.captures = 0
        self._capturing: Graph | None = None
        self._pools = itertools.count(1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        graph = self._capturing
        if func._overloadpacket in PRODUCTS:
            self._library_call()
        if graph is not None and func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        if graph is not None:
            graph.record(func, args, kwargs or {}, result)
        return result

    def _library_call(self) -> None:
        number, graph = self.streams[-1].number, self._capturing
        workspace = self.workspaces.get(number)
        if workspace is None:
            workspace = self.workspaces[number] = Workspace(graph and graph.pool)
        if graph is not None:
            graph.workspaces.append(workspace)

    @contextlib.contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before = list(self.streams)
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams[:] = before

    @contextlib.contextmanager
    def _graph(self, graph: Graph, pool: Pool, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "other threads could not use the device meanwhile"
        assert not self.recording, "the allocator still records to the pool of a capture that failed"
        if pool in self.spoilt:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.streams.append(stream)
        self.recording.append(pool)
        graph.pool, self._capturing = pool, graph
        graph.stream.append(stream.number)
        try:
            yield
            if self.fail:
                raise self.fail.pop(0)
        except RuntimeError as error:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from error
        finally:
            self._capturing = None
        self.recording.remove(pool)
        self.streams.pop()
        self.captures += 1

    def _end_allocate(self, device: int, pool: Pool) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)
        self.spoilt.add(pool)

    def install(self, monkeypatch: pytest.MonkeyPatch, *modules: types.ModuleType) -> None:
        """Takes the place of `torch.cuda` in modules that say `torch.cuda`."""
        names = types.SimpleNamespace(
            Stream=Stream,
            CUDAGraph=lambda: Graph(self),
            graph=self._graph,
            stream=self._on,
            current_stream=lambda *_: self.streams[-1],
            current_device=lambda: 0,
            graph_pool_handle=lambda: (0, next(self._pools)),
            synchronize=lambda *_: None,
            default_generators=[torch.Generator()],
        )
        bindings = types.SimpleNamespace(
            _cuda_endAllocateToPool=self._end_allocate, _cuda_releasePool=lambda device, pool: None
        )
        for module in modules:
            monkeypatch.setattr(module, "torch", _TorchWith(cuda=names, _C=bindings))


class _TorchWith:
    def __init__(self, **others: object):
        self.__dict__ |= others

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)
