"""A model of PyTorch's CUDA caching allocator: what it reserves and what is live, for operators run on meta tensors.

Blocks up to 1 MiB are cut from segments of 2 MiB, larger ones from segments of 20 MiB or of their own size; a block is
the smallest free one that fits, the rest of it stays free, and neighbours join when both are free. A private pool has
segments of its own, which emptying the cache leaves alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
LEAST, SMALL, SMALL_SEGMENT, LARGE_SEGMENT = 512, MIB, 2 * MIB, 20 * MIB
OWN_SEGMENT, ROUND = 10 * MIB, 2 * MIB  # from so many bytes on a segment is the block's, rounded up to ROUND


@dataclasses.dataclass(eq=False)
class MemoryBlock:
    """A part of a segment, between its neighbours."""

    size: int
    owner: set[MemoryBlock]
    before: MemoryBlock | None = None
    behind: MemoryBlock | None = None
    free: bool = True


class Allocator:
    """The books.

    Attributes:
        reserved, allocated: bytes now.
        peak_reserved, peak_allocated: the most so far.
    """

    def __init__(self):
        self.reserved = self.allocated = self.peak_reserved = self.peak_allocated = 0
        self._free: dict[tuple[str, bool], set[MemoryBlock]] = {}

    def allocate(self, size: int, pool: str = "") -> MemoryBlock:
        """A block of at least so many bytes from a pool, "" being the ordinary one."""
        size = max(LEAST, -(-size // LEAST) * LEAST)
        small = size <= SMALL
        blocks = self._free.setdefault((pool, small), set())
        block = min((one for one in blocks if one.size >= size), key=lambda one: one.size, default=None)
        if block is None:
            segment = SMALL_SEGMENT if small else LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // ROUND) * ROUND
            block = MemoryBlock(segment, blocks)
            self.reserved += segment
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        else:
            blocks.remove(block)
        rest = block.size - size
        if rest >= LEAST if small else rest > SMALL:
            behind = MemoryBlock(rest, blocks, block, block.behind)
            if block.behind is not None:
                block.behind.before = behind
            block.size, block.behind = size, behind
            blocks.add(behind)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: MemoryBlock) -> None:
        """Frees a block."""
        self.allocated -= block.size
        block.free = True
        for first, second in ((block.before, block), (block, block.behind)):
            if first is None or second is None or not (first.free and second.free):
                continue
            other = first if second is block else second
            block.owner.remove(other)
            block.size += other.size
            if other is first:
                block.before = other.before
                if other.before is not None:
                    other.before.behind = block
            else:
                block.behind = other.behind
                if other.behind is not None:
                    other.behind.before = block
        block.owner.add(block)

    def empty_cache(self) -> None:
        """Hands segments of the ordinary pool back that are free as a whole."""
        for (pool, _), blocks in self._free.items():
            for block in list(blocks) if not pool else []:
                if block.before is None and block.behind is None:
                    self.reserved -= block.size
                    blocks.remove(block)


class Modelled(TorchDispatchMode):
    """While active, every storage that an operator makes on the meta device is a block of an allocator's."""

    def __init__(self, allocator: Allocator):
        super().__init__()
        self.allocator, self.pool = allocator, ""
        self._known: dict[int, MemoryBlock] = {}

    @contextlib.contextmanager
    def in_pool(self, pool: str) -> Iterator[None]:
        """Takes what is made meanwhile from a private pool."""
        before, self.pool = self.pool, pool
        try:
            yield
        finally:
            self.pool = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self._track(tensor.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        self._known[key] = self.allocator.allocate(storage.nbytes(), self.pool)
        weakref.finalize(storage, self._freed, key).atexit = False

    def _freed(self, key: int) -> None:
        self.allocator.release(self._known.pop(key))
