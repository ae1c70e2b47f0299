"""Sampling on static buffers: one guided Euler step, captured once per shape and replayed for every evaluation.

On CUDA the step is a CUDA graph; on a CPU, or with `graphs=False`, the same function runs on the same buffers, so that
results are the same to the bit. What changes between runs (noise, context, query, schedule, guidance) is copied into
the buffers and never asks for another capture.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import TypeVar

import torch

from lavin_rt.console import log
from lavin_rt.devices import gigabytes, let_go, memory_at_hand, out_of_memory, release_cached
from lavin_rt.dit.layout import STORED, Form, Shape
from lavin_rt.errors import InputError, NonFiniteError, TooLittleMemory
from lavin_rt.sampling.capture import CaptureError, Graphs, Replays
from lavin_rt.sampling.denoisers import Denoiser, Step, Tensors, fill_keys
from lavin_rt.sampling.fitting import describe, what_fits
from lavin_rt.sampling.guided_step import Schedule, guided_step
from lavin_rt.sampling.speeds import CONTEXT_TIME, TASK, Speed
from lavin_rt.sampling.turns import Turns

T = TypeVar("T")
Callback = Callable[[int, int, torch.Tensor], None]
"""`(evaluations done, evaluations in all, latents)`, after every step; an exception raised in it ends the run."""

# Room in the schedule's buffers from the beginning: the published schedules have 20, 30 and 40 knots. A longer one
# makes them grow, and every shape be captured again, once.
EVALUATIONS = 39
SHAPES = 8
SCHEDULES = 4
EXACT = Speed()


@dataclasses.dataclass(eq=False)
class _Plan:
    """Everything of one shape.

    Attributes:
        step: in one of the forms, whose buffers are those of all.
        latents: `[queries, 16, target frames, h, w]` float32, the sampler's state.
        difference: of both branches' velocities, held between evaluations, likewise.
        condition: the step's buffers.
        advances: by form, one guided Euler step on these buffers, eager or a graph's replay.
        captured: the forms whose step is a graph.
    """

    step: Step
    latents: torch.Tensor
    difference: torch.Tensor
    condition: Tensors
    advances: dict[Form, Callable[[], object]]
    captured: set[Form]


class Executor:
    """Answers one sampling request after another on one device.

    Requests from several threads are served in turn. A run that failed or was cancelled leaves nothing behind: every
    run writes all the buffers it reads.

    Args:
        network: what gives the velocities.
        graphs: capture steps into CUDA graphs, where the device and the network can; False runs the same step eagerly.
        shapes: how many shapes keep their buffers and graphs; the one unused for longest goes first.

    Attributes:
        captures: CUDA graphs captured so far.
        replays: CUDA graphs replayed so far.
    """

    def __init__(self, network: Denoiser, graphs: bool = True, shapes: int = SHAPES):
        if shapes < 1:
            raise InputError(f"shapes is {shapes}; expected at least 1")
        self.network = network
        self.graphs = graphs and network.capturable and network.device.type == "cuda"
        self.captures = self.replays = 0
        self._shapes = shapes
        self._plans: OrderedDict[Shape, _Plan] = OrderedDict()
        self._schedule: Schedule | None = None
        # The network's tables of the last few schedules, by their knots.
        self._table = lru_cache(SCHEDULES)(lambda key: network.table(torch.tensor(key, dtype=torch.float32)))
        self._captured = Graphs()
        self._replays = Replays(self._captured, network.device, shapes)
        self._warned = False
        self._turns = Turns(network)

    def turn(self) -> AbstractContextManager[None]:
        """Waits for this thread's turn on the device and holds it."""
        return self._own_turns().turn()

    def _own_turns(self) -> Turns:
        if self._turns.inherited:
            self._turns = self._turns.behind_fork()
            # Another thread of the parent may have been at the buffers.
            self.release()
            self._schedule = None
        return self._turns

    def _run_of(self, shape: Shape, work: Callable[[], T]) -> T:
        """Work in a turn for one shape. What fails in it leaves the device idle; out of memory is said in a user's
        words.
        """
        with self._own_turns().run(), self.network.running():
            try:
                return work()
            except BaseException as error:
                if self.network.device.type == "cuda":
                    torch.cuda.synchronize()
                if not out_of_memory(error):
                    raise
                # The frames of the work hold the very buffers that the message is to count as free.
                let_go(error)
            self.release()
            raise self._too_large(shape)

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        """Clean latents `[n, 16, T, h, w]` as `sample` takes them, to be kept for any number of runs."""
        with self.turn():
            return self.network.embed(latents)

    def replayed(
        self, name: Hashable, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, stamp: list
    ) -> torch.Tensor:
        """Another network's `function(x)` in this thread's turn, as `capture.Replays` has it, in the memory of the
        steps' graphs, which are captured first, as they need larger pieces; as it is where nothing is captured.
        """
        return self._replays(name, function, x, stamp, bool(self._plans)) if self.graphs else function(x)

    def prepare(self, shape: Shape, knots: torch.Tensor, speed: Speed = EXACT) -> None:
        """Makes a shape ready: buffers, compilation, capture, and the schedule's table.

        Raises:
            InputError: too little memory, naming what would fit, or a shape or schedule that the network does not take.
        """

        def work() -> None:
            self._load_schedule(knots)
            self._plan(shape, speed.forms(shape, len(knots) - 1))

        self._run_of(shape, work)

    def sample(
        self,
        shape: Shape,
        context: torch.Tensor,
        query: torch.Tensor,
        noise: torch.Tensor,
        knots: torch.Tensor,
        guidance: float,
        callback: Callback | None = None,
        speed: Speed = EXACT,
        keys: Tensors | None = None,
    ) -> torch.Tensor:
        """Integrates the flow from noise (t = 0) to data (t = 1) along the knots, with explicit Euler steps.

        Args:
            shape: of the run; `shape.guided` False runs the conditional branch alone.
            context: embedded context frames `[1 or queries, ...]` of `embed`.
            query: embedded query frames `[queries, ...]` of `embed`.
            noise: `[queries, 16, target frames, h, w]`.
            knots: `[n]` float32 of `schedule(n)`.
            guidance: scale of `null + guidance * (cond - null)`.
            callback: `(evaluations done, evaluations in all, latents)` after every step; the latents are the state
                itself, to be copied by whoever keeps them. An exception raised in it ends the run.
            speed: whose grid the knots are; `shape.kept` says whether it keeps the context's keys and values.
            keys: of `context_keys`, where the speed takes them from the task.

        Returns:
            latents `[queries, 16, target frames, h, w]` float32, on the network's device.

        Raises:
            InputError: as `prepare`.
            NonFiniteError: naming the first step after which a latent is NaN or infinite.
        """

        def work() -> torch.Tensor:
            schedule = self._load_schedule(knots)
            forms = speed.forms(shape, len(knots) - 1)
            plan = self._plan(shape, forms)
            if speed.refresh == TASK:
                fill_keys(plan.step, plan.condition, keys)
            plan.step.fill(plan.condition, context, query)
            plan.latents.copy_(noise)
            schedule.guidance.fill_(guidance)
            schedule.rewind()
            self._run(plan, schedule, forms, callback)
            return plan.latents.clone()

        return self._run_of(shape, work)

    def context_keys(self, shape: Shape, context: torch.Tensor) -> Tensors:
        """Keys and values of a context's frames, to be kept for any number of runs.

        They are those of an evaluation at `CONTEXT_TIME` whose query and target are zero.

        Args:
            shape: unguided, `shape.kept` True; its queries are those of the context.
            context: embedded context frames `[queries, ...]` of `embed`.

        Returns:
            of every block in turn keys and values, `[queries, context rows, kv_heads, stored head size]`.

        Raises:
            InputError: as `prepare`.
        """
        return self._run_of(shape, lambda: self.with_room(partial(self._context_keys, shape, context)))

    def _context_keys(self, shape: Shape, context: torch.Tensor) -> Tensors:
        # Buffers of its own, which end with it: what a task keeps is made once.
        self._ensure_memory(shape)
        network = self.network
        step = network.step(shape, Form(STORED), once=True)
        condition = step.buffers()
        grid = (shape.queries, network.config.in_channels, shape.query_frames, shape.height, shape.width)
        step.fill(condition, context, network.embed(torch.zeros(grid, dtype=torch.float32)))
        latents = torch.zeros(*grid[:2], shape.target_frames, *grid[3:], dtype=torch.float32, device=network.device)
        step(
            latents,
            condition,
            *(table[0] for table in self._table((CONTEXT_TIME, 1.0))),
        )
        return tuple(part.clone() for part in step.context(condition))

    def _run(self, plan: _Plan, schedule: Schedule, forms: Sequence[Form], callback: Callback | None) -> None:
        finite, evaluations = schedule.finite, len(forms)
        # Without a callback a GPU is asked once, at the end, so that no step waits for the host.
        every_step = callback is not None or finite.device.type == "cpu"
        for done, form in enumerate(forms, 1):
            plan.advances[form]()
            self.replays += form in plan.captured
            if every_step:
                if not finite[done - 1]:
                    raise NonFiniteError(done, evaluations)
                if callback is not None:
                    callback(done, evaluations, plan.latents)
        failed = (~finite[:evaluations]).nonzero()
        if len(failed):
            raise NonFiniteError(int(failed[0]) + 1, evaluations)

    def _load_schedule(self, knots: torch.Tensor) -> Schedule:
        key, schedule = tuple(knots.tolist()), self._schedule
        if schedule is not None and schedule.loaded == key:
            return schedule
        tables, evaluations = self._table(key), len(knots) - 1
        if schedule is None or len(schedule.widths) < evaluations:
            self.release()
            schedule = self._schedule = Schedule.make(tables, max(evaluations, EVALUATIONS), self.network.device)
        schedule.loaded = ()
        for buffer, table in zip(schedule.tables, tables, strict=True):
            buffer[:evaluations] = table
        schedule.widths[:evaluations] = knots.diff()
        schedule.loaded = key
        return schedule

    def _plan(self, shape: Shape, forms: Sequence[Form]) -> _Plan:
        plan = self._plans.get(shape)
        if plan is None or not plan.advances.keys() >= set(forms):
            del plan  # or what lets go of the shapes kept, for room, would keep this one
            self._ensure_memory(shape)
            plan = self.with_room(partial(self._make_plan, shape, list(dict.fromkeys(forms))))
            self._plans[shape] = plan
            while len(self._plans) > self._shapes:
                log.debug("evicted %s, the oldest of %d shapes", self._plans.popitem(last=False)[0], self._shapes)
        self._plans.move_to_end(shape)
        return plan

    def _make_plan(self, shape: Shape, forms: Sequence[Form]) -> _Plan:
        """A shape's plan with these forms, those that it has already included."""
        network, plan, schedule = self.network, self._plans.get(shape), self._schedule
        assert schedule is not None  # loaded before any plan is made
        if plan is None:
            grid = (shape.target_frames, shape.height, shape.width)
            latents = torch.zeros(
                shape.queries, network.config.in_channels, *grid, dtype=torch.float32, device=network.device
            )
            step = network.step(shape, forms[0])
            plan = _Plan(step, latents, torch.zeros_like(latents), step.buffers(), {}, set())
        for form in forms:
            if form in plan.advances:
                continue
            step = plan.step if not plan.advances else network.step(shape, form)
            # Nothing of the executor in it: a plan let go frees its memory at once, not at the next garbage collection.
            state = (plan.latents, plan.condition, plan.difference)
            advance = partial(guided_step, schedule, step, *state, form, shape.guided)
            schedule.rewind()
            replay = self._capture(advance) if self.graphs else None
            if not self.graphs and (network.compiles or network.device.type == "cuda"):
                advance()
            plan.advances[form] = replay or advance
            plan.captured.update({form} if replay else ())
        return plan

    def _capture(self, advance: Callable[[], object]) -> Callable[[], object] | None:
        """A step as a CUDA graph, after two runs in which kernels are compiled and libraries take their memory; None
        where it cannot be captured.
        """
        # What the VAE left in the allocator's cache would count beside the graph's own memory; torch does the same
        # after the warm-up.
        release_cached(self.network.device)
        for _ in range(2):
            advance()
        try:
            replay = self._captured.capture(advance)
        except CaptureError as error:
            if not self._warned:
                warnings.warn(f"{error}; sampling runs without it, to the same bits but slower", stacklevel=2)
            self._warned = True
            return None
        self.captures += 1
        log.debug("captured a step, %d in all", self.captures)
        return replay

    def with_room(self, work: Callable[[], T]) -> T:
        """Does work in this thread's turn; where memory is short, once more without any shape's buffers and graphs."""
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            # What failed is let go only behind this block, and its frames hold the tensors that they made.
            let_go(error)
        log.debug("out of memory on %s: once more without buffers and graphs", self.network.device)
        self.release()
        return work()

    def release(self) -> None:
        """Lets go of every shape's buffers and graphs, which the next runs make again."""
        self._plans.clear()
        self._replays.release()
        self._captured.release()
        release_cached(self.network.device)

    @property
    def settles_shapes(self) -> bool:
        """Whether a shape's first run costs more than others: it is captured or compiled."""
        return self.graphs or self.network.compiles

    def holds(self, shape: Shape | None = None) -> bool:
        """Whether a shape is ready to run; any of them without one."""
        return bool(self._plans) if shape is None else shape in self._plans

    def check_memory(self, shape: Shape) -> None:
        """Raises an `InputError` naming what would fit, if a shape needs more memory than there is.

        Other shapes' buffers and graphs go, where that makes room.
        """
        with self.turn():
            self._ensure_memory(shape)

    def _ensure_memory(self, shape: Shape) -> None:
        if shape in self._plans or self.network.workspace(shape) <= memory_at_hand(self.network.device):
            return
        self.release()
        if self.network.workspace(shape) > memory_at_hand(self.network.device):
            raise self._too_large(shape)

    def _too_large(self, shape: Shape) -> TooLittleMemory:
        need, free = self.network.workspace(shape), memory_at_hand(self.network.device)
        more = "more than " if need <= free else ""  # the estimate was too low
        return TooLittleMemory(
            f"{describe(shape)} needs {more}about {gigabytes(need)} GB of memory on {self.network.device}, "
            f"{gigabytes(free)} GB are free; {what_fits(self.network, shape, free)}"
        )

    def most_queries(self, shape: Shape) -> int:
        """The most queries, at most those of the shape, that the network takes and the memory at hand allows to run
        together; 0 if none.
        """
        for queries in range(shape.queries, 0, -1):
            candidate = dataclasses.replace(shape, queries=queries)
            try:
                self.network.check(candidate)
            except InputError:
                continue
            if candidate in self._plans or self.network.workspace(candidate) <= memory_at_hand(self.network.device):
                return queries
        return 0
