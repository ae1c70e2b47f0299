"""Runs a Gluon kernel's source on a CPU, with stand-ins for the language: Triton's interpreter knows no Gluon.

What is real is the kernel's arithmetic and its protocol: partitions run as threads, barriers count arrivals and bytes
and have phases, shared memory starts as NaN, and products read their operands only when they are waited for, so that a
buffer given back too early can show as a wrong result, and a wait for nothing shows as a deadlock. What is not real are
layouts, registers and memory ordering; those only a compiler and a GPU can judge.
"""

from __future__ import annotations

import ast
import importlib.util
import threading
import types
from pathlib import Path

import torch

PATIENCE = 60.0  # seconds after which a partition counts as stuck


class Pointer:
    """A pointer into a tensor, or a tensor of pointers."""

    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset):
        return Pointer(self.tensor, self.offset + offset)


class Descriptor:
    """A bulk copy's view `[heads, rows, head_size]` of a tensor, zero beyond its edges."""

    def __init__(self, tensor, head_size, rows, width):
        self.tensor, self.head_size, self.rows, self.width = tensor, head_size, rows, width
        self.dtype, self.layout = tensor.dtype, None
        self.block_type = types.SimpleNamespace(shape=[1, rows, width], nbytes=rows * width * tensor.element_size())

    def read(self, head, row, column):
        tile = torch.zeros(1, self.rows, self.width, dtype=self.dtype)
        part = self.tensor[
            int(row) : int(row) + self.rows, int(head), column : min(column + self.width, self.head_size)
        ]
        tile[0, : part.shape[0], : part.shape[1]] = part
        return tile


class Shared:
    """Shared memory or a view of it; `.index` is the only way to a part of it."""

    def __init__(self, tensor):
        self.tensor = tensor

    shape = property(lambda self: list(self.tensor.shape))
    dtype = property(lambda self: self.tensor.dtype)

    def index(self, i):
        return Shared(self.tensor[int(i)])

    def reshape(self, shape):
        return Shared(self.tensor.view(shape))

    def permute(self, order):
        return Shared(self.tensor.permute(order))


class Barrier:
    """An mbarrier: a phase completes when all arrivals and all expected bytes are in."""

    def __init__(self):
        self.condition = threading.Condition()
        self.phase = self.arrived = self.bytes = 0
        self.count = None

    def change(self, arrivals, bytes):
        with self.condition:
            self.arrived += arrivals
            self.bytes += bytes
            assert self.arrived <= self.count, "more arrivals than the barrier was made for"
            if self.arrived == self.count and self.bytes == 0:
                self.phase, self.arrived = self.phase + 1, 0
            self.condition.notify_all()

    def wait(self, parity):
        with self.condition:
            assert self.condition.wait_for(lambda: self.phase & 1 != parity, PATIENCE), "deadlock"


class Barriers:
    def __init__(self, count):
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, i):
        return self.barriers[int(i)]


class Product:
    """A matrix product in flight, which reads its operands when it is waited for."""

    def __init__(self, a, b, acc, use_acc):
        self.operands = a, b, acc, use_acc

    def result(self):
        a, b, acc, use_acc = self.operands
        acc = acc.result() if isinstance(acc, Product) else acc
        a, b = (part.tensor if isinstance(part, Shared) else part for part in (a, b))
        assert acc.shape == (a.shape[0], b.shape[1])
        product = a.float() @ b.float()
        return acc + product if use_acc else product


def _wait_for_products(outstanding, deps):
    results = tuple(dep.result() if isinstance(dep, Product) else dep for dep in deps)
    return results[0] if len(results) == 1 else results


def _init(barrier, count):
    barrier.count = count


def _copy(descriptor, place, barrier, shared):
    shared.tensor.copy_(descriptor.read(*place))
    barrier.change(0, -descriptor.block_type.nbytes)


def _specialize(partitions, worker_warps, worker_registers):
    assert len(partitions) == len(worker_warps) + 1 == len(worker_registers) + 1
    errors = []

    def run(partition, args):
        try:
            partition(*args)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=work, daemon=True) for work in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
        assert not thread.is_alive(), "a partition does not end"
    if errors:
        raise errors[0]


def _load(pointer, mask=None, other=None):
    offset = torch.as_tensor(pointer.offset)
    valid = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.expand(offset.shape)
    values = pointer.tensor.flatten()[torch.where(valid, offset, 0)]
    return values if mask is None else torch.where(valid, values, other)


def _store(pointer, values, mask):
    mask = mask.expand(values.shape)
    pointer.tensor.view(-1)[pointer.offset.expand(values.shape)[mask].long()] = values[mask]


def language(program):
    """`gluon.language` for one program."""
    return types.SimpleNamespace(
        constexpr=lambda value: value,
        program_id=lambda axis: program,
        arange=lambda start, end, layout: torch.arange(start, end),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        where=lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
        sum=lambda values, axis: values.sum(axis),
        max=lambda values, axis: values.amax(axis),
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        cdiv=lambda a, b: (a + b - 1) // b,
        exp2=torch.exp2,
        log2=torch.log2,
        convert_layout=lambda values, layout: values,
        load=_load,
        store=_store,
        static_range=range,
        allocate_shared_memory=lambda dtype, shape, layout: (
            Barriers(shape[0]) if dtype == torch.int64 else Shared(torch.full(shape, float("nan"), dtype=dtype))
        ),
        warp_specialize=_specialize,
        float32=torch.float32,
        int32=torch.int32,
        int64=torch.int64,
        **dict.fromkeys(
            ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout"), lambda *args: None
        ),
    )


def kernel_of(source: str, name: str, program: int):
    """The function `name` of a Gluon module's source, as program number `program` of its grid runs it."""
    tree = ast.parse(source.replace(".type.layout", ".layout"))  # PyTorch's have one, too
    # Only the kernel: imports are replaced by the stand-ins, and functions of the host need the real ones.
    jitted = [node for node in tree.body if isinstance(node, ast.Assign) or getattr(node, "decorator_list", None)]
    namespace = {
        "gl": language(program),
        "gluon": types.SimpleNamespace(jit=lambda fn=None, **options: fn if fn else lambda fn: fn),
        "fence_async_shared": lambda: None,
        "mbarrier": types.SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=_init,
            expect=lambda barrier, bytes: barrier.change(1, bytes),
            arrive=lambda barrier: barrier.change(1, 0),
            wait=lambda barrier, parity: barrier.wait(int(parity)),
        ),
        "tma": types.SimpleNamespace(async_copy_global_to_shared=_copy),
        "warpgroup_mma": lambda a, b, acc, use_acc=True, is_async=False: Product(a, b, acc, use_acc),
        "warpgroup_mma_wait": _wait_for_products,
    }
    exec(compile(ast.Module(jitted, []), "<gluon kernel>", "exec", dont_inherit=True), namespace)
    return namespace[name]


def source(module: str) -> str:
    """Source text of a module of `lavin_kernels`, which need not be importable here."""
    return Path(importlib.util.find_spec(f"lavin_kernels.ops.{module}").origin).read_text()
