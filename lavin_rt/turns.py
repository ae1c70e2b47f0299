"""Who may use a device now: one thread at a time, in PyTorch's state as this package wants it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from lavin_rt.devices import current_device
from lavin_rt.errors import InputError
from lavin_rt.host_state import full_float32, own_state
from lavin_rt.networks import Network


class Turns:
    """The turns of threads on a network's device.

    Args:
        network: whose device it is.
    """

    def __init__(self, network: Network):
        self._network = network
        self._last: torch.cuda.Event | None = None
        self._lock, self._busy, self._process = threading.RLock(), False, os.getpid()

    @property
    def inherited(self) -> bool:
        """Whether they are of the process that this one was forked from, where other threads may hold them."""
        return self._process != os.getpid()

    def behind_fork(self) -> Turns:
        """Turns of this process, instead of inherited ones.

        Raises:
            InputError: what runs the network cannot be used in a forked process.
        """
        network = self._network
        if network.device.type == "cuda" or not getattr(network, "forkable", True):
            raise InputError(
                f"the pipeline was made before this process forked, and {network.impl} on {network.device} cannot be "
                'used behind a fork; make it in the worker, or start workers with the method "spawn"'
            )
        return Turns(network)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for this thread's turn and holds it.

        Raises:
            InputError: the thread is in a callback of a run.
        """
        with self._lock:
            if self._busy:
                raise InputError("a callback may not use its pipeline while it samples; copy the latents for later")
            exact = full_float32 if self._network.dtype == torch.float32 else nullcontext()
            with current_device(self._network.device), own_state(), exact:
                # Threads may have streams of their own, which do not wait for one another.
                if self._last is not None:
                    torch.cuda.current_stream().wait_event(self._last)
                try:
                    yield
                finally:
                    if self._network.device.type == "cuda":
                        self._last = torch.cuda.current_stream().record_event()

    @contextmanager
    def run(self) -> Iterator[None]:
        """A turn in which this thread's callbacks get none."""
        with self.turn():
            self._busy = True
            try:
                yield
            finally:
                self._busy = False
