"""The memory that a step is said to take against what its tensors take."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.layout import Shape
from lavin_rt.dit.model import JDiT, randomize_
from lavin_rt.sampling.denoisers import make_network


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are alive, now and at their most."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("impl", ["torch", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [DiTConfig(576, 2, 8, 4), DiTConfig(1152, 2, 16, 4)])
def test_a_step_takes_what_it_is_said_to(config, dtype, impl):
    network = make_network(randomize_(JDiT(config)).requires_grad_(False).to(dtype), impl)
    shape = Shape(queries=2, cond_frames=9, query_frames=1, target_frames=1, height=8, width=16, guided=True)
    step = network.step(shape)
    buffers = step.buffers()
    rows = [table[0] for table in network.table(torch.linspace(0, 1, 4))]
    with LiveBytes() as live, torch.no_grad():
        step(torch.randn(2, 16, 1, 8, 16), buffers, *rows)
    least = 0.7 if impl == "plain" else 0.85  # nothing is let go early in the oracle
    assert least * network.workspace(shape) <= live.peak <= network.workspace(shape)
