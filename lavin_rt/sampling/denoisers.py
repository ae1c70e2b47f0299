"""What an executor runs: a network that gives the velocities of all branches of a step, on buffers it is handed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from lavin_rt.compiling import compiling
from lavin_rt.dit import cpu_operators
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.layout import REUSED, Form, Layout, Shape
from lavin_rt.dit.model import JDiT, KeptBlock, patchify
from lavin_rt.dit.modulation import modulation_table
from lavin_rt.dit.packed import PackedStep, padded_head_size, resolve_impl
from lavin_rt.dit.prepacked import pays, prepack_
from lavin_rt.errors import InputError
from lavin_rt.sampling.speeds import Speed

Tensors = tuple[torch.Tensor, ...]


class Step(Protocol):
    """One network at one shape, in one form."""

    def buffers(self) -> Tensors:
        """Room for the condition, constant over a run's steps, and for what a shape keeps; the same for all forms."""

    def fill(self, condition: Tensors, context: torch.Tensor, query: torch.Tensor) -> None:
        """Writes embedded frames (`Denoiser.embed`) into the buffers.

        Args:
            condition: what `buffers` made.
            context: `[1 or queries, context rows, ...]`; one context serves all queries.
            query: `[queries, query rows, ...]`.
        """

    def context(self, condition: Tensors) -> Tensors:
        """Of a shape that keeps any, the keys and values of the pairs in the buffers, of every block in turn, each
        `[queries, context rows, kv_heads, stored head size]`.
        """

    def __call__(self, latents: torch.Tensor, condition: Tensors, *rows: torch.Tensor) -> torch.Tensor:
        """Velocities `[branches of the form, 16, target frames, h, w]`, the conditional branches first, of latents
        `[queries, 16, target frames, h, w]` float32 and one evaluation's rows of `Denoiser.table`.
        """


class Denoiser(Protocol):
    """A denoiser on a device: the plain model, packed rows, or an artifact's engine.

    Attributes:
        impl: what runs, for records.
        capturable: whether a step may be captured into a CUDA graph.
        compiles: whether the first call of a step compiles it.
    """

    config: DiTConfig
    device: torch.device
    dtype: torch.dtype
    impl: str
    capturable: bool
    compiles: bool

    def table(self, knots: torch.Tensor) -> Tensors:
        """What the evaluations of a schedule `[n]` differ in, each `[n - 1, ...]`."""

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        """Clean latents `[n, 16, T, h, w]` as a step reads them, `[n, rows of T frames, ...]`."""

    def check(self, shape: Shape) -> None:
        """Raises an `InputError` for a shape that the network does not take."""

    def check_speed(self, speed: Speed) -> None:
        """Raises an `InputError` for a speed that the network does not have."""

    def step(self, shape: Shape, form: Form | None = None, once: bool = False) -> Step:
        """The network at one shape, in a form; the exact one by default. What runs only once is not compiled."""

    def workspace(self, shape: Shape) -> int:
        """Bytes that a step of this shape takes besides the weights, estimated from above."""

    def running(self) -> AbstractContextManager[object]:
        """Holds what has to be there while steps run."""


def fill_keys(step: Step, condition: Tensors, keys: Tensors | None) -> None:
    """Copies kept keys and values of a context, `[1 or queries, ...]` of every block, into a step's buffers.

    Raises:
        InputError: none, or those of other weights or another size.
    """
    targets = step.context(condition)
    wanted = [(*target.shape[1:], target.dtype) for target in targets]
    if keys is None or [(*part.shape[1:], part.dtype) for part in keys] != wanted:
        found = "none are given" if keys is None else f"{len(keys)} of {list(keys[0].shape)} {keys[0].dtype} are given"
        raise InputError(
            f"the speed takes the pairs' keys and values from the task, {found}; expected {len(targets)} of "
            f"{list(targets[0].shape)} {targets[0].dtype}: make them anew for these weights and this size"
        )
    for target, part in zip(targets, keys, strict=True):
        target.copy_(part)


def make_network(dit: JDiT, impl: str = "auto", compile: bool = False) -> Denoiser:
    """The network that `impl` names (`packed.resolve_impl`) over a model's parameters."""
    impl = resolve_impl(impl, dit.device, dit.config)
    return PlainNetwork(dit, compile) if impl == "plain" else PackedNetwork(dit, impl, compile)


class PackedNetwork:
    """One packed pass a step over a model's parameters, modulation from a table."""

    capturable = True

    def __init__(self, dit: JDiT, impl: str, compile: bool = False):
        self.dit, self.impl, self.compiles = dit, impl, compile
        self.config, self.device, self.dtype = dit.config, dit.device, dit.dtype

    def prepack(self) -> None:
        """Lays the model's weights out for the CPU that runs it, where that pays. In place: the model has to be this
        network's alone.
        """
        if self.impl == "torch" and pays(self.dit):
            prepack_(self.dit)

    def table(self, knots: torch.Tensor) -> Tensors:
        """`[n - 1, depth, 2, 4, D]` and `[n - 1, D]` of `modulation_table`."""
        table = modulation_table(self.dit, knots[:-1])
        return table.blocks, table.head_scale

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        """`[n, T * tokens, D]` in the model's dtype."""
        return self.dit.cond_embedder(patchify(latents.to(self.device, self.dtype)))

    def check(self, shape: Shape) -> None:
        """Takes every shape."""

    def check_speed(self, speed: Speed) -> None:
        """Has every speed."""

    def step(self, shape: Shape, form: Form | None = None, once: bool = False) -> _PackedOnBuffers:
        layout = Layout.make(self.config, shape, self.device, form)
        return _PackedOnBuffers(PackedStep(self.dit, layout, self.impl), self, self.compiles and not once)

    def workspace(self, shape: Shape) -> int:
        """Bytes of a step's condition and activations, and of the keys and values that the shape keeps.

        The most lives in SwiGLU, `D + 3 mlp_size` a row: the residual, gate and up, and their product. Its reference,
        which a GPU may run, has one of `mlp_size` more; a CPU's norms, `5 D` a row in and out, pass a part of the rows
        through float32 three times.
        """
        rows, size, on_cpu = shape.rows, self.dtype.itemsize, self.device.type == "cpu"
        hidden, inner = self.config.hidden_size, self.config.mlp_size
        step = rows * (hidden + (3 if on_cpu else 4) * inner) * size
        if on_cpu:
            step = max(step, 5 * rows * hidden * size + 12 * min(rows * hidden, cpu_operators.PART))
        return step * 17 // 16 + (self.kept_bytes(rows) if shape.kept else 0)

    def kept_bytes(self, rows: int) -> int:
        """Bytes of the keys and values of so many rows in all blocks."""
        stored = self.config.num_kv_heads * padded_head_size(self.config.head_size, self.impl)
        return 2 * self.config.depth * rows * stored * self.dtype.itemsize

    def running(self) -> AbstractContextManager[object]:
        return nullcontext()


class _PackedOnBuffers:
    def __init__(self, step: PackedStep, network: PackedNetwork, compile: bool):
        self.step, self.network = step, network
        self.run: Callable[..., torch.Tensor] = step.compiled() if compile else step

    def buffers(self) -> Tensors:
        config, shape = self.network.config, self.step.layout.shape
        kind: dict[str, Any] = {"dtype": self.network.dtype, "device": self.network.device}
        rows = torch.zeros(sum(shape.condition_frames) * shape.frame_tokens, config.hidden_size, **kind)
        if shape.guided:
            zeros = rows.new_zeros(1, config.in_channels, 1, shape.height, shape.width)
            self._null(rows)[:, : shape.frame_tokens] = self.network.embed(zeros)
        if not shape.kept:
            return (rows,)
        stored = shape.rows, config.num_kv_heads, self.step.padded_head_size
        return rows, *(torch.zeros(stored, **kind) for _ in range(2 * config.depth))

    def fill(self, condition: Tensors, context: torch.Tensor, query: torch.Tensor) -> None:
        rows, shape = condition[0], self.step.layout.shape
        conditional = rows[: shape.queries * shape.cond_frames * shape.frame_tokens].unflatten(0, (shape.queries, -1))
        conditional[:, : context.shape[1]] = context
        conditional[:, context.shape[1] :] = query
        if shape.guided:
            self._null(rows)[:, shape.frame_tokens :] = query

    def context(self, condition: Tensors) -> Tensors:
        shape = self.step.layout.shape
        of_pairs = (shape.cond_frames - shape.query_frames) * shape.frame_tokens
        of_branch = (shape.cond_frames + shape.target_frames) * shape.frame_tokens
        branches = (part[: shape.queries * of_branch].unflatten(0, (shape.queries, -1)) for part in condition[1:])
        return tuple(branch[:, :of_pairs] for branch in branches)

    def _null(self, rows: torch.Tensor) -> torch.Tensor:
        """The null conditions `[queries, (1 + query frames) * tokens, D]`: a zero frame, then the query."""
        shape = self.step.layout.shape
        return rows[shape.queries * shape.cond_frames * shape.frame_tokens :].unflatten(0, (shape.queries, -1))

    def __call__(self, latents: torch.Tensor, condition: Tensors, *rows: torch.Tensor) -> torch.Tensor:
        return self.run(latents, condition[0], *rows, *condition[1:])


class PlainNetwork:
    """Two passes of the plain model a step, modulation inside, as the published sampler runs it: the oracle."""

    impl = "plain"
    capturable = False  # reads modulation weights from the checkpoint's file while it runs

    def __init__(self, dit: JDiT, compile: bool = False):
        self.dit, self.compiles = dit, compile
        self.config, self.device, self.dtype = dit.config, dit.device, dit.dtype
        self.run: Callable[..., torch.Tensor] = dit
        if compile:
            with compiling("the model"):
                self.run = torch.compile(dit, dynamic=False)

    def table(self, knots: torch.Tensor) -> Tensors:
        """The times `[n - 1]` float32."""
        return (knots[:-1].to(self.device),)

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents with their frames as rows, `[n, T, 16, h, w]`."""
        return latents.to(self.device).transpose(1, 2)

    def check(self, shape: Shape) -> None:
        """Takes every shape."""

    def check_speed(self, speed: Speed) -> None:
        """Has every speed."""

    def step(self, shape: Shape, form: Form | None = None, once: bool = False) -> Step:
        form = Form.exact(shape) if form is None else form
        if shape.kept:
            return KeptCondition(shape, torch.float32, self.device, self._kept_velocity, form, self.config, self.dtype)
        return LatentCondition(shape, torch.float32, self.device, self._velocity, form)

    def _kept_velocity(
        self, latents: torch.Tensor, cond_latents: torch.Tensor, t: torch.Tensor, kept: KeptContext
    ) -> torch.Tensor:
        pairs = zip(kept.keys, kept.values, strict=True)
        blocks = [KeptBlock(keys, values, kept.reused) for keys, values in pairs]
        return self._velocity(latents, cond_latents, t, blocks)

    def _velocity(
        self,
        latents: torch.Tensor,
        cond_latents: torch.Tensor,
        t: torch.Tensor,
        kept: Sequence[KeptBlock] | None = None,
    ) -> torch.Tensor:
        with compiling("the model") if self.compiles else nullcontext():
            return self.run(latents, t.expand(len(latents)), cond_latents, kept)

    def workspace(self, shape: Shape) -> int:
        """Bytes of one pass's activations and of the keys and values that the shape keeps; the modulation linears,
        where they stayed in a file, come on top.
        """
        rows = shape.queries * (shape.cond_frames + shape.target_frames) * shape.frame_tokens
        width = 8 * self.config.hidden_size + 3 * self.config.mlp_size
        kept = 2 * self.config.depth * shape.rows * self.config.kv_size if shape.kept else 0
        return (rows * width * 17 // 16 + kept) * self.dtype.itemsize

    def running(self) -> AbstractContextManager[object]:
        """The modulation linears, read once for all steps of a run."""
        return self.dit.resident_modulation()


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCondition:
    """A step of a one-branch network that reads condition latents: one call a branch kind.

    Attributes:
        shape, dtype, device: of the condition's buffers.
        velocity: `(latents, cond_latents, *rows) -> [queries, 16, target frames, h, w]`.
        form: without a null branch one call, over the conditional one.
    """

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    velocity: Callable[..., torch.Tensor]
    form: Form

    def buffers(self) -> Tensors:
        """`[queries, 16, Tc, h, w]`, and where guided the null condition `[queries, 16, 1 + query frames, h, w]`."""
        shape = self.shape
        return tuple(
            torch.zeros(shape.queries, 16, frames, shape.height, shape.width, dtype=self.dtype, device=self.device)
            for frames in (shape.cond_frames, 1 + shape.query_frames)[: 1 + shape.guided]
        )

    def fill(self, condition: Tensors, context: torch.Tensor, query: torch.Tensor) -> None:
        conditional = condition[0].transpose(1, 2)
        conditional[:, : context.shape[1]] = context
        conditional[:, context.shape[1] :] = query
        for null in condition[1 : 1 + self.shape.guided]:
            null.transpose(1, 2)[:, 1:] = query

    def context(self, condition: Tensors) -> Tensors:
        """None: it keeps nothing of the pairs."""
        return ()

    def __call__(self, latents: torch.Tensor, condition: Tensors, *rows: torch.Tensor) -> torch.Tensor:
        run = condition[: 2 if self.form.null else 1]
        return torch.cat([self.velocity(latents, of_branch, *rows) for of_branch in run])


@dataclasses.dataclass(frozen=True, eq=False)
class KeptContext:
    """Keys and values of a branch's context, stored by one call and reused by later ones.

    Attributes:
        keys, values: `[depth, queries, context rows, kv_heads, head_size]`, keys after norm and rotary positions;
            stored in place.
        reused: whether they are read; else they are written.
    """

    keys: torch.Tensor
    values: torch.Tensor
    reused: bool


@dataclasses.dataclass(frozen=True, eq=False)
class KeptCondition(LatentCondition):
    """A step of a one-branch network that stores or reuses keys and values of the context.

    Attributes:
        velocity: as of `LatentCondition`, with the branch's `KeptContext` behind the rows; of one that is reused, the
            condition's first frames are not read.
        config: the network's.
        kept_dtype: of keys and values.
    """

    config: DiTConfig
    kept_dtype: torch.dtype

    def buffers(self) -> Tensors:
        """Those of `LatentCondition`, then of every branch kind keys and values
        `[depth, queries, context rows, kv_heads, head_size]`.
        """
        shape, config = self.shape, self.config
        context_frames = (shape.cond_frames - shape.query_frames, 1)[: 1 + shape.guided]
        kept = [
            torch.zeros(
                *(config.depth, shape.queries, frames * shape.frame_tokens, config.num_kv_heads, config.head_size),
                dtype=self.kept_dtype,
                device=self.device,
            )
            for frames in context_frames
            for _ in range(2)
        ]
        return (*super().buffers(), *kept)

    def context(self, condition: Tensors) -> Tensors:
        keys, values = condition[1 + self.shape.guided : 3 + self.shape.guided]
        return tuple(part for pair in zip(keys, values, strict=True) for part in pair)

    def __call__(self, latents: torch.Tensor, condition: Tensors, *rows: torch.Tensor) -> torch.Tensor:
        conditions, kept = condition[: 1 + self.shape.guided], condition[1 + self.shape.guided :]
        velocities = []
        for kind, source in enumerate((self.form.context, self.form.null)[: 2 if self.form.null else 1]):
            keys, values = kept[2 * kind : 2 * kind + 2]
            context = KeptContext(keys, values, source == REUSED)
            velocities.append(self.velocity(latents, conditions[kind], *rows, context))
        return torch.cat(velocities)
