"""The routes of a service: tasks, runs, jobs, figures."""

from __future__ import annotations

import asyncio
import base64
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Depends, File, Form, Header, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel

from lavin_rt.packs import TaskPack
from lavin_rt.pictures import images
from lavin_rt.serve import pictures
from lavin_rt.serve.engine import Answer, Ticket
from lavin_rt.serve.library import LibraryEntry
from lavin_rt.serve.limits import Refused
from lavin_rt.serve.service import Job, Kind, Service

GONE = 499
"""For the log alone: the client did not wait for its answer."""
EVENTS_SECONDS = 0.1
DECODED_TOGETHER = 2
"""Pictures that are decoded at the same time, so that many uploads do not take all memory together."""


class Problem(BaseModel):
    """What went wrong: `{"error": {"status": 422, "reason": "input", "message": "one line"}}`."""

    error: dict[str, Any]


class RunForm:
    """The fields of a run."""

    def __init__(
        self,
        query: Annotated[list[UploadFile], File(description="one picture or animation, or a clip's frames in order")],
        seed: Annotated[int, Form(description="of the noise", ge=-(2**63), lt=2**64)] = 0,
        steps: Annotated[
            int | None, Form(description="knots of the schedule, even, from 4 on; 20 if not given")
        ] = None,
        guidance: Annotated[float, Form(description="guidance scale; 1.0 is faster")] = 1.5,
        speed: Annotated[str | None, Form(description="exact, or a faster way where the service has any")] = None,
        pairs: Annotated[int | None, Form(description="of the task's context")] = None,
        size: Annotated[str | None, Form(description="N or HEIGHTxWIDTH, multiples of 16")] = None,
        format: Annotated[str, Form(description="png, jpeg, webp or gif; json for a record with the picture")] = "png",
        keep_size: Annotated[bool, Form(description="answer at the query's own size")] = False,
        accept: Annotated[str | None, Header(include_in_schema=False)] = None,
    ):
        self.query, self.seed, self.keep_size = query, seed, keep_size
        self.run: dict[str, Any] = {"steps": steps, "guidance": guidance, "speed": speed, "pairs": pairs, "size": size}
        self.record = format == "json" or (accept or "").startswith("application/json")
        self.format = "png" if format == "json" else "jpeg" if format == "jpg" else format

    def size_of(self, clip: torch.Tensor) -> tuple[int, int] | None:
        """The size that the answer to this query is wanted at, None for the task's."""
        return (clip.shape[-2], clip.shape[-1]) if self.keep_size else None


Run = Annotated[RunForm, Depends()]
Responses = dict[int | str, dict[str, Any]]


def make_router(service: Service) -> APIRouter:
    """All routes but the page."""
    known: Responses = {status: {"model": Problem} for status in (400, 404, 408, 409, 413, 415, 422, 429, 500, 503)}
    router = APIRouter(responses=known)
    decoding = asyncio.Semaphore(DECODED_TOGETHER)

    async def read_clip(files: list[UploadFile], name: str) -> torch.Tensor:
        """Decodes an upload off the event loop, a few at a time."""
        async with decoding:
            content = [await file.read() for file in files]
            return await asyncio.to_thread(pictures.decode, content, service.limits, name)

    async def prepared(name: str, form: RunForm) -> tuple[Kind, torch.Tensor]:
        kind = service.kind(name, **form.run)
        pictures.check_kind(form.format, kind.frames)
        service.engine.check_room()  # before the picture is decoded in vain
        return kind, await read_clip(form.query, "query")

    @router.get("/health", tags=["service"])
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "alive"}

    @router.get("/ready", tags=["service"])
    async def ready() -> dict[str, str]:
        """Whether requests are taken."""
        if not service.engine.accepting:
            raise Refused(503, "requests are not taken any more; ask another service", "draining", 5)
        return {"status": "ready"}

    @router.get("/metrics", tags=["service"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures in Prometheus' text form."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/v1/tasks", tags=["tasks"])
    async def tasks() -> dict[str, list[dict[str, Any]]]:
        """The tasks that can be asked for."""
        return {"tasks": [described(entry) for entry in service.library.all()]}

    @router.post("/v1/tasks", tags=["tasks"], status_code=201)
    async def make_task(
        name: Annotated[str, Form(description="small letters, digits, - and _", max_length=64)],
        inputs: Annotated[list[UploadFile] | None, File(description="pictures or animations, one a pair")] = None,
        targets: Annotated[list[UploadFile] | None, File(description="as many, in the same order")] = None,
        context: Annotated[UploadFile | None, File(description="a task pack or an encoded context instead")] = None,
        size: Annotated[str | None, Form(description="N or HEIGHTxWIDTH, multiples of 16")] = None,
        words: Annotated[str, Form(description="what the task does, for people", max_length=500)] = "",
    ) -> dict[str, Any]:
        """Makes a task of pairs, or of one encoded before; it goes some time after its last use."""
        service.library.check_new(name)
        inputs, targets = inputs or [], targets or []
        if context is not None:
            if inputs or targets:
                raise Refused(422, "inputs and context: expected pairs or an encoded context, not both", "input")
            content = await context.read()
            pack = await asyncio.to_thread(read_pack, content, name, words)
            return described(await asyncio.to_thread(service.library.add, pack))
        if len(inputs) != len(targets) or not inputs:
            raise Refused(
                422, f"{len(inputs)} inputs, {len(targets)} targets; expected as many of both, at least one", "input"
            )
        if len(inputs) > service.limits.pairs:
            raise Refused(413, f"{len(inputs)} pairs; expected {service.limits.pairs} at most", "size")
        service.engine.check_room()
        clips = []
        for i, (source, target) in enumerate(zip(inputs, targets, strict=True)):
            clips.append((await read_clip([source], f"input {i}"), await read_clip([target], f"target {i}")))
        return described(await service.make_task(name, clips, size, words))

    @router.get("/v1/tasks/{name}", tags=["tasks"])
    async def task(name: str) -> dict[str, Any]:
        """One task."""
        return described(service.library.find(name))

    @router.delete("/v1/tasks/{name}", tags=["tasks"], status_code=204, responses={403: {"model": Problem}})
    async def delete_task(name: str) -> Response:
        """Deletes a task that a client made."""
        service.library.remove(name)
        return Response(status_code=204)

    shown: Responses = {200: {"content": {media: {} for media in (*pictures.MEDIA_TYPES.values(), "application/json")}}}

    @router.post("/v1/tasks/{name}/run", tags=["runs"], responses=shown, response_class=Response)
    async def run(name: str, form: Run, request: Request) -> Response:
        """Answers a query; a client that goes away cancels its run."""
        kind, clip = await prepared(name, form)
        ticket = await asyncio.to_thread(service.submit, kind, clip, form.seed)
        answer = await wait_for(ticket, request)
        if answer is None:
            return Response(status_code=GONE)
        return await asyncio.to_thread(respond, service, ticket, answer, form.format, form.record, form.size_of(clip))

    @router.post("/v1/tasks/{name}/jobs", tags=["jobs"], status_code=202)
    async def start_job(name: str, form: Run) -> dict[str, Any]:
        """Has a query answered later: see `events`, then ask for `result`."""
        kind, clip = await prepared(name, form)
        wanted = form.format, form.record, form.size_of(clip)
        job = await asyncio.to_thread(service.start_job, kind, clip, form.seed, *wanted)
        return job_state(service, job)

    @router.get("/v1/jobs/{id}", tags=["jobs"])
    async def job(id: str) -> dict[str, Any]:
        """How far it is."""
        return job_state(service, service.job(id))

    @router.delete("/v1/jobs/{id}", tags=["jobs"])
    async def cancel_job(id: str) -> dict[str, Any]:
        """Cancels it, at the next evaluation if it runs."""
        found = service.job(id)
        found.ticket.cancel()
        return job_state(service, found)

    @router.get("/v1/jobs/{id}/result", tags=["jobs"], responses=shown, response_class=Response)
    async def result(id: str, accept: Annotated[str | None, Header(include_in_schema=False)] = None) -> Response:
        """The picture; 409 while there is none."""
        found = service.job(id)
        if found.ticket.live:
            raise Refused(409, "not done yet; follow /events, or ask again", "input", 1)
        answer = found.ticket.future.result(timeout=0)
        record = found.record or (accept or "").startswith("application/json")
        return await asyncio.to_thread(respond, service, found.ticket, answer, found.format, record, found.size)

    @router.get("/v1/jobs/{id}/events", tags=["jobs"], response_class=StreamingResponse)
    async def events(id: str) -> StreamingResponse:
        """Progress as server-sent events, until it is done."""
        return StreamingResponse(follow(service, service.job(id)), media_type="text/event-stream")

    return router


def described(entry: LibraryEntry) -> dict[str, Any]:
    """A task for clients."""
    size = list(entry.size) if entry.size else None
    return {
        "name": entry.name,
        "words": entry.words,
        "origin": entry.origin,
        "pairs": entry.pairs,
        "frames": entry.frames,
        "size": size,
    }


def job_state(service: Service, job: Job) -> dict[str, Any]:
    """A job for clients."""
    ticket = job.ticket
    state = {
        "id": job.id,
        "task": job.kind.entry.name,
        "state": ticket.state,
        "done": ticket.done,
        "evaluations": ticket.total or job.kind.evaluations,
        "seconds_left": None if ticket.seconds_left is None else round(ticket.seconds_left, 2),
        "result": f"/v1/jobs/{job.id}/result" if ticket.state == "done" else None,
    }
    if ticket.future.done() and ticket.future.exception() is not None:
        state["error"] = str(ticket.future.exception())
    return state


async def follow(service: Service, job: Job) -> AsyncIterator[str]:
    """A job's states as server-sent events, each when something changed."""
    last = None
    while True:
        # Asked before the state, so that the last event is the end's.
        over = job.ticket.future.done()
        state = job_state(service, job)
        if state != last:
            yield f"event: {state['state']}\ndata: {json.dumps(state)}\n\n"
            last = state
        if over:
            return
        await asyncio.sleep(EVENTS_SECONDS)


async def wait_for(ticket: Ticket, request: Request) -> Answer | None:
    """The answer; None where the client is gone, whose run is cancelled then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.wrap_future(ticket.future), asyncio.ensure_future(gone())
    either: set[asyncio.Future[Any]] = {answer, leaving}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        ticket.cancel()
        answer.add_done_callback(lambda future: future.cancelled() or future.exception())
        return None
    finally:
        leaving.cancel()
        if ticket.live:
            ticket.cancel()


def respond(
    service: Service,
    ticket: Ticket,
    answer: Answer,
    format: str,
    record: bool,
    size: tuple[int, int] | None = None,
) -> Response:
    """An answer as a picture, or as a record with it."""
    frames = answer.result.frames if size is None else images.resize(answer.result.frames, size)
    said = service.record(ticket, answer)
    if record:
        said["format"] = format
        said["picture"] = base64.b64encode(pictures.encode(frames, format)).decode()
        if len(frames) > 1:
            said["frames"] = [base64.b64encode(pictures.encode(frame[None], "png")).decode() for frame in frames]
        return JSONResponse(said)
    headers = {"Lavin-Seed": str(ticket.seed), "Lavin-Batch": str(answer.batch), "Cache-Control": "no-store"}
    return Response(pictures.encode(frames, format), media_type=pictures.MEDIA_TYPES[format], headers=headers)


def read_pack(content: bytes, name: str, words: str) -> TaskPack:
    """An uploaded pack under the name that its client gives it; an `InputError` for anything else."""
    with tempfile.TemporaryDirectory(prefix="lavin-rt-") as folder:
        path = Path(folder) / "context.safetensors"
        path.write_bytes(content)
        pack = TaskPack.load(path)
    return TaskPack(pack.context, name, words or pack.words, pack.thumbnails)
