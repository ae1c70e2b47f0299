"""What a service accepts and says no with."""

from __future__ import annotations

import dataclasses
import math
import re

from lavin_rt.errors import InputError, one_line


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a service; every one is there so that no client can take the machine from the others.

    Attributes:
        queue: requests that wait at most; the next is told to come again (429).
        batch: requests that run together at most.
        body_bytes: of one request's body.
        body_seconds: that may pass between two pieces of a body.
        pixels: of all frames of one picture or clip together, checked before they are decoded.
        pairs: of a task.
        frames: of a clip.
        side: of the pictures that the network works on, pixels.
        tasks: made by clients, at one time.
        task_seconds: after which a client's task goes, counted from its last use.
        jobs: whose results are kept for their clients.
        job_seconds: for which a result is kept.
        steps: knots of a schedule at most.
        guidance: scale at most.
    """

    queue: int = 64
    batch: int = 8
    body_bytes: int = 64 * 2**20
    body_seconds: float = 20.0
    pixels: int = 32 * 10**6
    pairs: int = 16
    frames: int = 33
    side: int = 1024
    tasks: int = 64
    task_seconds: float = 3600.0
    jobs: int = 256
    job_seconds: float = 600.0
    steps: int = 100
    guidance: float = 20.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 < getattr(self, field.name) < math.inf:
                raise InputError(f"{field.name} is {getattr(self, field.name)!r}; expected a positive, finite number")


class Refused(Exception):
    """A request that is not answered with a picture.

    Attributes:
        status: HTTP status.
        message: one line: what was found, what was expected, what to do.
        reason: a word for the figures, such as `queue`, `memory`, `input`.
        retry_after: seconds after which it may be worth asking again, or None.
    """

    def __init__(self, status: int, message: str, reason: str, retry_after: int | None = None):
        self.message = public_line(message)
        super().__init__(self.message)
        self.status, self.reason, self.retry_after = status, reason, retry_after


def refusal(error: BaseException) -> Refused:
    """What a client is told of an error in its run."""
    from lavin_rt.devices import out_of_memory
    from lavin_rt.errors import Cancelled, NonFiniteError, TooLittleMemory

    if isinstance(error, Refused):
        return error
    if isinstance(error, Cancelled):
        return Refused(409, "the run was cancelled", "cancelled")
    if isinstance(error, TooLittleMemory):
        return Refused(503, str(error), "memory", 5)
    if isinstance(error, InputError):
        return Refused(422, str(error), "input")
    if isinstance(error, NonFiniteError):
        return Refused(500, str(error), "non_finite")
    if out_of_memory(error):
        return Refused(
            503, "the device ran out of memory; ask again, or for a smaller size or fewer pairs", "memory", 5
        )
    return Refused(500, "the run failed; the service's log says why", "internal")


def public_line(message: str) -> str:
    """A message as one line without the folders of this machine."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:'\",;]+/)+", "", one_line(message))
