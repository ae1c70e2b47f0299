"""What a host process has set in PyTorch, put aside while this package computes and left as it was.

Settings of a thread (inference mode, gradients, autocast, the default device) are put aside by `own_state`. The default
dtype is the process's, which other threads read: every tensor is made with a dtype of its own instead.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch

CPU = torch.device("cpu")
_forked = False


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Without gradients, inference mode and autocast, and with the CPU as the default device, in this thread.

    What is made here outlives the caller's inference mode, outside of which it could not be written.
    """
    global _forked
    if _forked:
        _forked = False
        if torch.get_num_threads() > 1:
            torch.set_num_threads(1)
            warnings.warn(
                "this process was forked, and its parent's threads are not in it: computing on one; start workers with "
                'the method "spawn" to use more',
                stacklevel=4,
            )
    with contextlib.ExitStack() as stack:
        # Leaving inference mode turns gradients on.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != CPU:
            stack.enter_context(CPU)
        yield


def _note_fork() -> None:
    """OpenMP would wait for ever for threads that only the parent has."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


class _FullFloat32:
    """While any thread is in it, products and convolutions of float32 tensors are computed in float32, not in TF32 or
    bfloat16, which the process's settings allow cuBLAS, cuDNN and oneDNN.

    Settings are put aside and back by the names under which the host gave them: where the older names and the newer
    ones differ, PyTorch refuses to read them, in any thread.
    """

    def __init__(self):
        self._lock, self._inside = threading.Lock(), 0
        self._products: str | None = None
        self._convolutions = False
        self._others: list[tuple[Any, str]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            backends = torch.backends
            self._products = None
            with contextlib.suppress(RuntimeError):  # set by both names
                if torch.get_float32_matmul_precision() != "highest":
                    self._products = torch.get_float32_matmul_precision()
                    torch.set_float32_matmul_precision("highest")
            self._convolutions = backends.cudnn.conv.fp32_precision == "tf32"
            if self._convolutions:
                backends.cudnn.allow_tf32 = False
            products = backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv
            self._others = [(of, of.fp32_precision) for of in products if of.fp32_precision in ("tf32", "bf16")]
            for of, _ in self._others:
                of.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            for of, precision in self._others:
                of.fp32_precision = precision
            if self._convolutions:
                torch.backends.cudnn.allow_tf32 = True
            if self._products is not None:
                torch.set_float32_matmul_precision(self._products)


full_float32 = _FullFloat32()
