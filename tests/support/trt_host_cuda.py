"""A machine without a GPU, seen as one with: `torch` whose CUDA memory is the host's."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class Device:
    """A CUDA device that compares equal to the CPU, where its tensors are."""

    type, index = "cuda", 0

    def __eq__(self, other: object) -> bool:
        return other is self or other == torch.device("cpu")

    __hash__ = None


class Stream:
    """A stream that keeps what it was told."""

    def __init__(self, device: Any = None, handle: int = 99):
        self.cuda_stream, self.waits = handle, []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)

    def synchronize(self) -> None:
        self.waits.append("host")


class Cuda:
    """`torch.cuda` with streams that a test chooses."""

    Stream = Stream

    def __init__(self):
        self.default, self.current, self.capturing = Stream(handle=0), Stream(handle=7), False
        self.synchronized = 0

    def current_stream(self, device: Any) -> Stream:
        return self.current

    def default_stream(self, device: Any) -> Stream:
        return self.default

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def synchronize(self, device: Any) -> None:
        self.synchronized += 1

    def device(self, device: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class Torch:
    """`torch` itself, with `cuda` as above and allocations on the host."""

    def __init__(self):
        self.cuda = Cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, device: Any, dtype: torch.dtype) -> torch.Tensor:
        return aligned(torch.empty(*shape, dtype=dtype))


def aligned(value: torch.Tensor) -> torch.Tensor:
    """A copy at an address that is a multiple of 256, as CUDA's allocator gives."""
    size = value.numel() * value.element_size()
    buffer = torch.empty(size + 256, dtype=torch.uint8)
    start = -buffer.data_ptr() % 256
    copy = buffer[start : start + size].view(value.dtype).view(value.shape)
    return copy.copy_(value)
