"""A pipeline for many clients: what a request is held against, its run, and the figures about it."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lavin_rt.errors import InputError
from lavin_rt.packs import TaskPack
from lavin_rt.pictures import images
from lavin_rt.sampling.speeds import SPEEDS
from lavin_rt.serve.engine import Answer, ServingEngine, Ticket
from lavin_rt.serve.library import Library, LibraryEntry
from lavin_rt.serve.limits import Limits, Refused
from lavin_rt.serve.metrics import Metrics
from lavin_rt.task import check_seed, draw_noise, task_shape

if TYPE_CHECKING:
    from lavin_rt.pipeline import Pipeline
    from lavin_rt.task import Result

PAIRS = 4


@dataclasses.dataclass(frozen=True)
class Kind:
    """What requests that run together have in common.

    Attributes:
        entry: the task.
        pairs, size, frames: of its context: how many, (height, width) in pixels, frames of a clip.
        steps, guidance, speed: of the run; steps is None where the speed has a grid of its own.
        evaluations: of the network, in all.
    """

    entry: LibraryEntry
    pairs: int
    size: tuple[int, int]
    frames: int
    steps: int | None
    guidance: float
    speed: str
    evaluations: int


@dataclasses.dataclass(eq=False)
class Job:
    """A request whose client asks for the answer later.

    Attributes:
        id: unguessable.
        ticket, kind: as it runs.
        format: that the picture is wanted in.
        record: whether a record with the picture is wanted.
        size: (height, width) that the picture is wanted at, None for the task's.
        made: seconds of the monotonic clock.
    """

    id: str
    ticket: Ticket
    kind: Kind
    format: str
    record: bool = False
    size: tuple[int, int] | None = None
    made: float = dataclasses.field(default_factory=time.monotonic)
    ended: float | None = None


class Service:
    """Everything behind the routes and the page.

    Args:
        pipeline: answers the requests; nobody else may use it meanwhile.
        limits: bounds.
        files: task packs and template folders beside the pipeline's own.
        speed: of requests that name none.
    """

    def __init__(
        self, pipeline: Pipeline, limits: Limits | None = None, files: Sequence[str] = (), speed: str = "exact"
    ):
        self.pipeline, self.limits = pipeline, limits or Limits()
        if speed not in SPEEDS:
            raise InputError(f"speed is {speed!r}; expected one of {', '.join(SPEEDS)}")
        pipeline.speed(speed)
        self.speed, self.speeds = speed, [name for name in SPEEDS if _serves(pipeline, name)]
        self.library = Library(pipeline, self.limits, files)
        self.engine = ServingEngine(self._run, self._most, self.limits, self._observe)
        self.metrics = Metrics(lambda: self.engine.waiting, lambda: self.engine.running, pipeline.device)
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._jobs_lock = threading.Lock()

    def kind(
        self,
        name: str,
        steps: int | None = None,
        guidance: float = 1.5,
        speed: str | None = None,
        pairs: int | None = None,
        size: str | None = None,
    ) -> Kind:
        """Holds what is asked for against the task and the limits.

        Raises:
            Refused, InputError: 404 for the task, 422 for the rest.
        """
        entry = self.library.find(name)
        speed = self.speed if speed is None else speed
        if speed not in SPEEDS:
            raise _unfit(f"speed is {speed[:40]!r}; expected one of {', '.join(SPEEDS)}")
        knots = len(self.pipeline.speed(speed).knots(steps))
        asked = None if size is None else images.parse_size(size)
        if knots > self.limits.steps:
            raise _unfit(f"steps is {knots}; expected {self.limits.steps} at most")
        if not (math.isfinite(guidance) and 0 <= guidance <= self.limits.guidance):
            raise _unfit(f"guidance is {guidance}; expected 0 to {self.limits.guidance:g}, such as 1.5")
        most = min(entry.pairs, self.limits.pairs)
        pairs = min(PAIRS, most) if pairs is None and entry.size is None else most if pairs is None else pairs
        if not 1 <= pairs <= most:
            raise _unfit(f"pairs is {pairs}; expected 1 to {most} for {entry.name}")
        if asked is not None and entry.size is not None and asked != entry.size:
            shown = "x".join(map(str, entry.size))
            raise _unfit(f"size is {size}; {entry.name} was made at {shown}, leave size out")
        picture = entry.size or asked or images.parse_size(self.pipeline.size)
        self._check_side(picture)
        return Kind(entry, pairs, picture, entry.frames, steps, float(guidance), speed, knots - 1)

    def _check_side(self, size: tuple[int, int]) -> None:
        if max(size) > self.limits.side:
            raise _unfit(f"size is {size[0]}x{size[1]}; expected {self.limits.side} a side at most")

    def submit(self, kind: Kind, clip: torch.Tensor, seed: int = 0) -> Ticket:
        """Has a query answered.

        Args:
            clip: uint8 `[T, 3, H, W]`.
            seed: of the noise.

        Raises:
            Refused, InputError: 422 for a seed or a number of frames, 429 for a full queue, 503 while draining.
        """
        check_seed(seed)
        if len(clip) != kind.frames:
            raise _unfit(f"query: {len(clip)} frames; {kind.entry.name} takes {kind.frames}")
        # Only what the network will see of it is kept while it waits.
        ticket = Ticket(kind.entry.name, kind, images.resize(clip, kind.size).contiguous(), seed)
        ticket.future.add_done_callback(lambda _: self._count(ticket))
        return self.engine.submit(ticket)

    async def make_task(
        self, name: str, clips: Sequence[tuple[torch.Tensor, torch.Tensor]], size: str | None = None, words: str = ""
    ) -> LibraryEntry:
        """Encodes a task of a client's own in the device's turn.

        Args:
            clips: pairs, uint8 `[T, 3, H, W]` each.

        Raises:
            Refused, InputError: a name that is taken or none, unfit pairs, no room.
        """
        self.library.check_new(name)
        if not 1 <= len(clips) <= self.limits.pairs:
            raise Refused(413 if clips else 422, f"{len(clips)} pairs; expected 1 to {self.limits.pairs}", "size")
        frames = len(clips[0][0])
        for i, pair in enumerate(clips):
            for side, clip in zip(("input", "target"), pair, strict=True):
                if len(clip) != frames:
                    raise _unfit(f"{side} {i}: {len(clip)} frames, the first input has {frames}; expected the same")
        asked = images.parse_size(self.pipeline.size if size is None else size)
        self._check_side(asked)
        small = [(images.resize(source, asked), images.resize(target, asked)) for source, target in clips]
        future = self.engine.call(lambda: TaskPack.of(self.library.encode(small, asked), name, words))
        pack = await asyncio.wrap_future(future)
        return await asyncio.to_thread(self.library.add, pack)  # which hashes weights the first time

    def start_job(
        self,
        kind: Kind,
        clip: torch.Tensor,
        seed: int,
        format: str,
        record: bool = False,
        size: tuple[int, int] | None = None,
    ) -> Job:
        """A query that is answered later, in what form `Job` says.

        Raises:
            Refused: as `submit`.
        """
        self._forget_jobs()
        job = Job(secrets.token_urlsafe(16), self.submit(kind, clip, seed), kind, format, record, size)
        job.ticket.future.add_done_callback(lambda _: setattr(job, "ended", time.monotonic()))
        with self._jobs_lock:
            self._jobs[job.id] = job
        return job

    def job(self, name: str) -> Job:
        """Raises `Refused` 404 for one that is unknown or whose result is kept no longer."""
        self._forget_jobs()
        job = self._jobs.get(name)
        if job is None:
            raise Refused(404, "no such job here; its result may have been kept for long enough", "input")
        return job

    def _forget_jobs(self) -> None:
        now = time.monotonic()
        with self._jobs_lock:
            ended = [(job, job.ended) for job in self._jobs.values() if job.ended is not None]
            surplus = len(self._jobs) - self.limits.jobs + 1
            for i, (job, end) in enumerate(ended):
                if i < surplus or now - end > self.limits.job_seconds:
                    del self._jobs[job.id]

    def _most(self, kind: Kind, count: int) -> int:
        """How many of a kind run together: a power of two that memory allows. What is captured, compiled or cached for
        a shape, if only by the libraries below, is then there after few runs, and memory grows no further.
        """
        if getattr(kind.entry.source, "posterior", "mean") == "sample":
            return 1  # its draw takes its numbers from the run's one seed
        most = self.pipeline.executor.most_queries(self._shape(kind, count)) or 1
        return 1 << (most.bit_length() - 1)

    def _shape(self, kind: Kind, queries: int):
        frames, keeps = images.latent_frames(kind.frames), SPEEDS[kind.speed].keeps
        return task_shape(queries, kind.pairs, frames, kind.size, kind.guidance != 1.0, keeps)

    def _run(self, tickets: Sequence[Ticket], callback: Callable) -> list[Result]:
        """One packed run; on the engine's thread."""
        kind: Kind = tickets[0].kind
        task = self.library.task(kind.entry, kind.pairs, kind.size)
        options: dict[str, Any] = {"speed": kind.speed}
        if task.context.posterior == "sample":
            options["seed"] = tickets[0].seed  # which the posterior's draw takes its numbers from, too
        else:
            seeds = [ticket.seed for ticket in tickets]
            options["noise"] = draw_noise(seeds, images.latent_frames(kind.frames), kind.size)
        return task.run(
            [ticket.clip.permute(0, 2, 3, 1).numpy() for ticket in tickets],
            steps=kind.steps,
            guidance=kind.guidance,
            batch_size=len(tickets),
            callback=callback,
            **options,
        )

    def _observe(self, tickets: Sequence[Ticket], evaluations: int, seconds: float) -> None:
        self.metrics.batches.observe(len(tickets))
        self.metrics.evaluations.inc(evaluations)

    def _count(self, ticket: Ticket) -> None:
        if ticket.future.cancelled():
            return
        error = ticket.future.exception()
        if error is None:
            self.metrics.answers.labels(ticket.kind.entry.label).inc()
            self.metrics.latency.labels(ticket.kind.entry.label, ticket.kind.speed).observe(
                time.monotonic() - ticket.arrived
            )

    def record(self, ticket: Ticket, answer: Answer) -> dict[str, Any]:
        """What is said about an answer beside its picture."""
        kind: Kind = ticket.kind
        return {
            "task": kind.entry.name,
            "seed": ticket.seed,
            "steps": kind.steps,
            "guidance": kind.guidance,
            "speed": kind.speed,
            "pairs": kind.pairs,
            "size": list(kind.size),
            "evaluations": answer.evaluations,
            "batch": answer.batch,
            "seconds": {"waited": round(answer.waited, 4), "ran": round(answer.ran, 4)},
        }


def _serves(pipeline: Pipeline, speed: str) -> bool:
    """Whether a pipeline has a speed, which one of an artifact may not."""
    try:
        pipeline.speed(speed)
    except InputError:
        return False
    return True


def _unfit(message: str) -> Refused:
    return Refused(422, message, "input")
