"""The blocks' linears on a CPU, their weights laid out once as oneDNN multiplies them.

PyTorch's linear lays a dense weight out anew in every call. The layout's operators are private to PyTorch, which uses
them where it freezes weights: they are tried out first, and where they are missing or refuse, weights stay dense.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import nn

from lavin_kernels.reference.dit import swiglu
from lavin_rt.dit.model import JDiT, Modulation

SAMPLES = 4096  # of every parameter: two trainings differ everywhere, and 3.4 billion values take long to read
ROWS = 512  # of a product: what layouts are chosen for, and what an MLP takes at a time
# Of a model for which it pays. Not in float32, which MKL multiplies as fast or faster: on an EPYC a step of width 2304
# takes 1.02 of the time with this layout, compiled 1.11, of width 576 0.99 and 1.07.
LEAST_WIDTH = 512
DTYPES = (torch.bfloat16, torch.float16)

_KEPT: WeakValueDictionary[int, PrepackedLinear] = WeakValueDictionary()
_keys = itertools.count()


class PrepackedLinear:
    """The weight `[2, out, in]` of a bias-free linear of both streams, in oneDNN's layout.

    Stands where a block's parameter was. Whoever indexes it like that gets a dense copy, which is slow and exact.
    """

    def __init__(self, weight: torch.Tensor):
        self._streams = [_reordered(of_stream) for of_stream in weight]
        self._out = weight.shape[1]
        self.shape, self.samples = weight.shape, _samples(weight).clone()
        self._key = torch.tensor(next(_keys))
        _KEPT[int(self._key)] = self

    def __call__(self, rows: torch.Tensor, stream: int) -> torch.Tensor:
        """`[rows, in]` of one stream to `[rows, out]`."""
        if torch.compiler.is_compiling():
            return _compiled_linear(rows, self._key, stream, self._out)
        return torch.ops.mkldnn._linear_pointwise(rows, self._streams[stream], None, "none", [], "")

    def both(self, rows: torch.Tensor, split: int) -> torch.Tensor:
        """Stream-major rows, the x stream's from `split` on."""
        if split == 0:
            return self(rows, 1)
        return torch.cat([self(rows[:split], 0), self(rows[split:], 1)])

    def dense(self) -> torch.Tensor:
        """The weight as it was, to the bit."""
        return torch.stack([of_stream.to_dense() for of_stream in self._streams])

    def __reduce__(self) -> tuple:
        """Copied and pickled as a dense weight: the layout is one of this machine, and torch copies none."""
        return type(self), (self.dense(),)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.dense()[index]


@torch.library.custom_op("lavin_rt::prepacked_linear", mutates_args=())
def _compiled_linear(rows: torch.Tensor, key: torch.Tensor, stream: int, out: int) -> torch.Tensor:
    """A compiled step's call. Its graph knows a weight by a key that it is handed, so that graphs of all shapes share
    one layout, and the compiler's cache serves other processes.
    """
    return _KEPT[int(key)](rows, stream)


@_compiled_linear.register_fake
def _(rows: torch.Tensor, key: torch.Tensor, stream: int, out: int) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], out)


def prepacked_mlp(rows: torch.Tensor, split: int, gate_up: PrepackedLinear, down: PrepackedLinear) -> torch.Tensor:
    """The SwiGLU of stream-major rows `[rows, D]`. Eagerly, a part of them at a time: the widest rows never lie in
    memory together.
    """
    if torch.compiler.is_compiling():
        return down.both(swiglu(gate_up.both(rows, split)), split)
    out = torch.empty_like(rows)
    for stream, of_stream in enumerate((slice(0, split), slice(split, None))):
        for part, into in zip(rows[of_stream].split(ROWS), out[of_stream].split(ROWS), strict=True):
            gate, up = gate_up(part, stream).chunk(2, dim=-1)
            into.copy_(down(F.silu(gate).mul_(up), stream))
    return out


def _reordered(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


def pays(dit: JDiT) -> bool:
    """Whether a model is wide enough and of a dtype that gains, on a device that has the layout."""
    gains = dit.config.hidden_size >= LEAST_WIDTH and dit.dtype in DTYPES
    return gains and bool(torch.backends.mkldnn.enabled) and can_prepack(dit.device, dit.dtype)


@functools.cache
def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch has the layout's operators for this device and dtype, and they compute what a linear does."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 32), (2, 48, 32)))
    try:
        with torch.no_grad():
            packed = PrepackedLinear(weight)
            wanted, found = rows.float() @ weight[1].float().T, packed(rows, 1).float()
            close = torch.allclose(found, wanted, rtol=0, atol=64 * torch.finfo(dtype).eps)
            return close and torch.equal(packed.dense(), weight)
    except (RuntimeError, AttributeError):
        return False


@torch.no_grad()
def prepack_(dit: JDiT) -> JDiT:
    """Lays the blocks' linears out, one after another, so that memory holds one of them twice.

    But for q, k and v of the last block, of which the cond stream takes a part.
    """
    for module, name in _linears(dit):
        weight = module._parameters[name]
        if weight is not None:
            module.__dict__[name] = PrepackedLinear(weight)
            module._parameters[name] = None  # keeps its place among the others
    return dit


@torch.no_grad()
def unpack_(dit: JDiT) -> JDiT:
    """Makes parameters of the linears again. No step may run meanwhile."""
    for module, name in _linears(dit):
        if name in module.__dict__:
            module._parameters[name] = nn.Parameter(module.__dict__[name].dense(), requires_grad=False)
            del module.__dict__[name]
    return dit


def parameter_samples(dit: JDiT) -> Iterator[tuple[str, torch.Size, torch.Tensor]]:
    """Of every parameter, laid out, in the checkpoint's file or neither, the name, the shape and some of the values:
    what tells models apart.
    """
    for of_module, module in dit.named_modules():
        for name in module._parameters:
            value = getattr(module, name)
            if value is not None and not isinstance(module, Modulation):
                samples = value.samples if isinstance(value, PrepackedLinear) else _samples(value.detach())
                yield f"{of_module}.{name}" if of_module else name, value.shape, samples
    for index in range(dit.config.depth):
        for name, value in zip(("weight", "bias"), dit.modulation_parameters(index), strict=True):
            yield f"blocks.{index}.modulation.{name}", value.shape, _samples(value.detach())


def _samples(weight: torch.Tensor) -> torch.Tensor:
    values = weight.flatten()
    return values[:: max(1, len(values) // SAMPLES)]


def prepacked(dit: JDiT) -> bool:
    """Whether any linear is laid out."""
    return any(name in module.__dict__ for module, name in _linears(dit))


def _linears(dit: JDiT) -> Iterator[tuple[nn.Module, str]]:
    for index, block in enumerate(dit.blocks):
        if index + 1 < dit.config.depth:
            yield block.attention, "qkv"
        yield from ((block.attention, "proj"), (block.mlp, "gate_up"), (block.mlp, "down"))
