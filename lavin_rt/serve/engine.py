"""The thread that owns the device: waiting requests of one kind run together, fair between tasks."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lavin_rt.errors import Cancelled
from lavin_rt.serve.limits import Limits, Refused, refusal

if TYPE_CHECKING:
    import torch

    from lavin_rt.task import Result

T = TypeVar("T")
log = logging.getLogger("lavin_rt.serve")

CONTEXTS = "(contexts)"
"""The queue of work that is no sampling: contexts to be encoded."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a run gave for one request.

    Attributes:
        result: frames and latents.
        batch: requests that ran together.
        waited, ran: seconds.
        evaluations: of the network.
    """

    result: Result
    batch: int
    waited: float
    ran: float
    evaluations: int


class Ticket:
    """A request on its way; only the engine changes it, but for `cancel`.

    Attributes:
        queue: what fairness is between, the task's name.
        kind: requests of one kind, which are equal in it, run together.
        clip: the query, uint8 `[T, 3, H, W]`.
        seed: of the noise.
        state: `waiting`, `running`, `done`, `failed` or `cancelled`.
        done, total: evaluations.
        future: the `Answer`, or the `Refused` that there is instead.
    """

    def __init__(self, queue: str, kind: Any, clip: torch.Tensor, seed: int):
        self.queue, self.kind, self.clip, self.seed = queue, kind, clip, seed
        self.state = "waiting"
        self.done = self.total = 0
        self.seconds_left: float | None = None
        self.arrived = time.monotonic()
        self.future: concurrent.futures.Future[Answer] = concurrent.futures.Future()
        self._engine: ServingEngine | None = None

    @property
    def live(self) -> bool:
        return self.state in ("waiting", "running")

    def cancel(self) -> bool:
        """Takes it from the queue, or drops its answer; a run of which nothing is wanted ends at the next evaluation.

        Returns whether there was something to cancel.
        """
        return self._engine is not None and self._engine.cancel(self)


@dataclasses.dataclass(eq=False)
class _Chore:
    work: Callable[[], Any]
    future: concurrent.futures.Future


class ServingEngine:
    """Answers tickets one batch after another on a thread of its own.

    Args:
        run: `(tickets, callback) -> results`, one packed run; the callback is the pipeline's.
        most: `(kind, count) -> how many of so many of that kind may run together`, at least 1.
        limits: `queue` and `batch`.
        observe: told of every batch that ran: `(tickets, evaluations, seconds)`.

    Attributes:
        ended: set by the server when the last answer is out.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Ticket], Callable], Sequence[Result]],
        most: Callable[[Any, int], int],
        limits: Limits,
        observe: Callable[[Sequence[Ticket], int, float], None] = lambda *_: None,
    ):
        self._run, self._most, self._limits, self._observe = run, most, limits, observe
        self._waiting: OrderedDict[str, deque[Ticket | _Chore]] = OrderedDict()
        self._running: list[Ticket] = []
        self._count = 0
        self._busy = False
        self._changed = threading.Condition()
        self.ended = False
        self._draining = self._ended = False
        self._seconds = 0.5
        self._thread = threading.Thread(target=self._work, name="lavin-rt engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._count

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def accepting(self) -> bool:
        return not self._draining and self._thread.is_alive()

    def check_room(self, more: int = 1) -> None:
        """Refuses work for which there is no room: 429 for a full queue, 503 while draining."""
        with self._changed:
            self._check_room(more)

    def submit(self, ticket: Ticket) -> Ticket:
        """Puts a ticket into the queue.

        Raises:
            Refused: as `check_room`.
        """
        with self._changed:
            self._check_room(1)
            ticket._engine = self
            self._enqueue(ticket.queue, ticket)
        return ticket

    def call(self, work: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Has the device's thread do something else than sampling, in its turn.

        Raises:
            Refused: as `check_room`.
        """
        chore = _Chore(work, concurrent.futures.Future())
        with self._changed:
            self._check_room(1)
            self._enqueue(CONTEXTS, chore)
        return chore.future

    def cancel(self, ticket: Ticket) -> bool:
        with self._changed:
            if ticket.state == "waiting":
                queue = self._waiting.get(ticket.queue)
                if queue is not None and ticket in queue:
                    queue.remove(ticket)
                    self._count -= 1
                    if not queue:
                        del self._waiting[ticket.queue]
            elif ticket.state != "running":
                return False
            ticket.state = "cancelled"
            self._changed.notify_all()
        _fail(ticket, Refused(409, "the run was cancelled", "cancelled"))
        return True

    def drain(self) -> None:
        """Takes nothing more; what waits is told to ask elsewhere, what runs goes on."""
        with self._changed:
            self._draining = True
            waiting = [item for queue in self._waiting.values() for item in queue]
            self._waiting.clear()
            self._count = 0
            self._changed.notify_all()
        for item in waiting:
            if isinstance(item, Ticket):
                item.state = "failed"
            _fail(item, _shutting_down())

    def stop(self, grace: float) -> bool:
        """Drains, waits for what runs so many seconds, then ends it at its next evaluation.

        Returns whether all that ran was finished in time.
        """
        self.drain()
        with self._changed:
            finished = self._changed.wait_for(lambda: not self._busy, grace)
            left = [] if finished else list(self._running)
            for ticket in left:
                ticket.state = "failed"
            self._ended = True
            self._changed.notify_all()
        for ticket in left:
            _fail(ticket, _shutting_down())
        self._thread.join(timeout=5.0)
        return finished

    def _check_room(self, more: int) -> None:
        if self._draining:
            raise _shutting_down()
        if not self._thread.is_alive():
            raise Refused(503, "the service cannot run anything more; it has to be started again", "internal")
        if self._count + more > self._limits.queue:
            seconds = max(1, round(self._seconds * self._count / self._limits.batch))
            raise Refused(
                429, f"{self._count} requests wait already, {self._limits.queue} may; ask again", "queue", seconds
            )

    def _enqueue(self, queue: str, item: Ticket | _Chore) -> None:
        self._waiting.setdefault(queue, deque()).append(item)
        self._count += 1
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy, self._running = False, []
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if self._ended:
                    return
                batch = self._next()
                self._busy = True
                self._running = [item for item in batch if isinstance(item, Ticket)]
                for ticket in self._running:
                    ticket.state = "running"
            if isinstance(batch[0], _Chore):
                _settle(batch[0].future, batch[0].work)
            else:
                self._answer(batch)
            batch = []  # nothing of a batch outlives it

    def _next(self) -> list:
        """The oldest work of the task that waits for its turn longest, with what can run beside it."""
        queue, items = self._waiting.popitem(last=False)
        first = items.popleft()
        batch = [first]
        if isinstance(first, Ticket):
            tickets = [item for item in items if isinstance(item, Ticket) and item.kind == first.kind]
            alike = tickets[: self._limits.batch - 1]
            if alike:
                alike = alike[: max(1, self._most(first.kind, 1 + len(alike))) - 1]
            for item in alike:
                items.remove(item)
            batch += alike
        if items:
            self._waiting[queue] = items  # behind the others
        self._count -= len(batch)
        return batch

    def _answer(self, tickets: list[Ticket]) -> None:
        """Runs a batch; where it fails as a whole, each alone, so that no request suffers for another's."""
        began = time.monotonic()
        evaluations = 0

        def progress(done: int, total: int, latents: object) -> None:
            nonlocal evaluations
            evaluations = done
            left = (time.monotonic() - began) / done * (total - done)
            for ticket in tickets:
                ticket.done, ticket.total, ticket.seconds_left = done, total, left
            if not any(ticket.state == "running" for ticket in tickets):
                raise Cancelled("nothing of this run is wanted any more")

        try:
            results = self._run(tickets, progress)
        except BaseException as error:
            if isinstance(error, Cancelled):
                results = []
            elif len(tickets) > 1:
                log.warning("a run of %d requests failed (%s); each runs alone", len(tickets), error)
                results = None
            else:
                refused = refusal(error)
                if refused.reason == "internal":
                    log.error("a run failed", exc_info=error)
                if tickets[0].state == "running":
                    tickets[0].state = "failed"
                _fail(tickets[0], refused)
                results = []
            del error
        if results is None:
            for ticket in tickets:
                if ticket.state == "running":
                    self._answer([ticket])
            return
        ran = time.monotonic() - began
        if results:
            self._seconds = 0.8 * self._seconds + 0.2 * ran
        for ticket, result in zip(tickets, results, strict=False):
            with self._changed:
                wanted = ticket.state == "running"
                if wanted:
                    ticket.state, ticket.seconds_left = "done", 0.0
            if wanted:
                _give(ticket.future, Answer(result, len(tickets), began - ticket.arrived, ran, evaluations))
        self._observe(tickets, evaluations, ran)


def _shutting_down() -> Refused:
    return Refused(503, "the service is shutting down; ask again in a while", "draining", 5)


def _fail(item: Ticket | _Chore, refused: Refused) -> None:
    _give(item.future, refused)


def _settle(future: concurrent.futures.Future, work: Callable[[], Any]) -> None:
    try:
        value = work()
    except BaseException as error:
        value = refusal(error)
        if value.reason == "internal":
            log.error("encoding a context failed", exc_info=error)
    _give(future, value)


def _give(future: concurrent.futures.Future, value: object) -> None:
    """Settles a future that somebody else may have settled or given up meanwhile."""
    try:
        if isinstance(value, Refused):
            future.set_exception(value)
        else:
            future.set_result(value)
    except concurrent.futures.InvalidStateError:
        pass
