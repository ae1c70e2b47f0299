"""The service over HTTP: answers, tasks of one's own, jobs, and everything that can go wrong with a request."""

# ruff: noqa: E402 (what needs an extra comes behind the question whether it is there)

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra serve")
httpx = pytest.importorskip("httpx", reason="needs the extra test")

import numpy as np
from PIL import Image
from support.serving import STEPS, ask, message, picture, pixels, running, wait_until, works

from lavin_rt.errors import Cancelled, TooLittleMemory
from lavin_rt.packs import TaskPack
from lavin_rt.pipeline import Pipeline
from lavin_rt.serve import server
from lavin_rt.serve.library import Library
from lavin_rt.serve.limits import Limits
from lavin_rt.serve.service import Service

pytestmark = pytest.mark.slow  # the real model, about a minute

LIMITS = Limits(queue=8, body_bytes=2**20, body_seconds=1.0, pixels=10**6, pairs=4, tasks=2, frames=9)


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def service(pipe):
    return Service(pipe, LIMITS)


@pytest.fixture(scope="module")
def address(service):
    with running(service) as address:
        yield address


@pytest.fixture
def client(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def test_health_tasks_and_documentation(client):
    assert client.get("/health").json() == {"status": "alive"} and client.get("/ready").status_code == 200
    tasks = {task["name"]: task for task in client.get("/v1/tasks").json()["tasks"]}
    assert tasks["depth_estimation"]["pairs"] == 8 and tasks["video_depth_estimation"]["frames"] == 5
    assert client.get("/v1/tasks/negative").json()["origin"] == "checkpoint"
    docs = client.get("/docs").text
    assert "swagger" in docs and "http://" not in docs and "https://" not in docs
    assert "/v1/tasks/{name}/run" in client.get("/openapi.json").json()["paths"]


def test_answers_are_those_of_the_pipeline_alone_and_in_a_batch(client, pipe, service):
    task = pipe.task("depth_estimation")
    right = [np.asarray(task(Image.open(io.BytesIO(picture(i))), steps=4, seed=100 + i)) for i in range(4)]
    alone = [ask(client, query=picture(i), seed=str(100 + i)) for i in range(4)]
    together: list = [None] * 4

    def one(i):
        with httpx.Client(base_url=str(client.base_url), timeout=60) as own:
            together[i] = ask(own, query=picture(i), seed=str(100 + i))

    with pipe.executor.turn():  # the first run waits for it, and the others for the first
        threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: service.engine.waiting + service.engine.running == 4)
    for thread in threads:
        thread.join()
    batches = {int(answer.headers["lavin-batch"]) for answer in together}
    assert max(batches) > 1 and batches <= {1, 2, 4}
    for i, answers in enumerate(zip(alone, together, strict=True)):
        for answer in answers:
            assert answer.status_code == 200 and answer.headers["lavin-seed"] == str(100 + i)
            assert abs(pixels(answer.content) - right[i]).max() <= 2


def test_formats_records_and_the_query_s_own_size(client):
    for kind, name in (("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("gif", "GIF")):
        answer = ask(client, format=kind)
        assert Image.open(io.BytesIO(answer.content)).format == name
        assert answer.headers["content-type"] == f"image/{kind}"
    assert pixels(ask(client, keep_size="true").content).shape == (40, 48, 3)
    record = ask(client, format="json", seed="5", guidance="1.0", pairs="2").json()
    assert record["seed"] == 5 and record["pairs"] == 2 and record["evaluations"] == 3
    assert pixels(base64.b64decode(record["picture"])).shape == (64, 64, 3)


def test_a_clip_as_frames_and_as_an_animation(client):
    frames = [("query", picture(i)) for i in range(5)]
    answer = client.post("/v1/tasks/video_depth_estimation/run", files=frames, data={**STEPS, "format": "webp"})
    assert answer.status_code == 200 and Image.open(io.BytesIO(answer.content)).n_frames == 5
    animation = io.BytesIO()
    stills = [Image.open(io.BytesIO(picture(i))) for i in range(5)]
    stills[0].save(animation, "WEBP", save_all=True, append_images=stills[1:], lossless=True)
    record = ask(client, "video_depth_estimation", animation.getvalue(), format="json").json()
    assert len(record["frames"]) == 5
    assert "takes 5" in message(ask(client, "video_depth_estimation"))
    assert "one picture" in message(ask(client, "video_depth_estimation", animation.getvalue(), format="jpeg"))


def test_a_task_of_one_s_own(client, pipe, tmp_path, monkeypatch):
    pairs = [("inputs", picture(i)) for i in range(2)] + [("targets", picture(i + 9)) for i in range(2)]
    made = client.post("/v1/tasks", files=pairs, data={"name": "mine", "words": "of noise"})
    assert made.status_code == 201 and made.json()["pairs"] == 2 and made.json()["size"] == [64, 64]
    assert ask(client, "mine").status_code == 200 and ask(client, "mine", pairs="1").status_code == 200
    assert "made at 64x64" in message(ask(client, "mine", size="32"))
    again = client.post("/v1/tasks", files=pairs, data={"name": "mine"})
    assert again.status_code == 409 and "already" in message(again)
    kept = TaskPack.of(pipe.task("negative", pairs=3), "whatever", "negatives", keep_keys=True)
    kept.save(tmp_path / "pack.safetensors")
    foreign = dataclasses.replace(kept.context, kept=dataclasses.replace(kept.context.kept, fingerprint="00"))
    foreign.save(tmp_path / "foreign.safetensors")
    refused = {"context": (tmp_path / "foreign.safetensors").read_bytes()}
    answer = client.post("/v1/tasks", files=refused, data={"name": "foreign"})
    assert answer.status_code == 422 and "other weights" in message(answer)
    pack = {"context": (tmp_path / "pack.safetensors").read_bytes()}
    assert client.post("/v1/tasks", files=pack, data={"name": "packed"}).json()["words"] == "negatives"
    assert ask(client, "packed").status_code == 200
    quick = {"files": {"query": picture()}, "data": {"speed": "fastest"}}
    with monkeypatch.context() as patch:
        patch.setattr(pipe.executor, "context_keys", None)  # not made anew
        assert client.post("/v1/tasks/packed/run", **quick).status_code == 200
    full = client.post("/v1/tasks", files=pairs, data={"name": "third"})
    assert full.status_code == 429 and "retry-after" in full.headers
    assert client.delete("/v1/tasks/mine").status_code == client.delete("/v1/tasks/packed").status_code == 204
    assert ask(client, "mine").status_code == 404 and client.delete("/v1/tasks/mine").status_code == 404
    assert client.delete("/v1/tasks/negative").status_code == 403


def test_what_tasks_keep_is_bounded_in_bytes(pipe, monkeypatch):
    library = Library(pipe, LIMITS)
    entries = [library.find(name) for name in ("negative", "hue", "channel_order")]
    tasks = [library.task(entry, 1, (32, 32)) for entry in entries]
    assert len({id(library.task(entry, 1, (32, 32))) for entry in entries}) == 3
    for task in tasks:
        task.run([np.zeros((32, 32, 3), np.uint8)], speed="fastest")
    monkeypatch.setattr("lavin_rt.serve.library.ENCODED_BYTES", 2 * tasks[0].kept_bytes)
    assert library.task(entries[2], 1, (32, 32)) is tasks[2]  # the one in use stays, that of longest ago goes
    assert library.task(entries[1], 1, (32, 32)) is tasks[1]
    assert library.task(entries[0], 1, (32, 32)) is not tasks[0]


def test_jobs_progress_and_cancelling(client, pipe):
    started = client.post("/v1/tasks/negative/jobs", files={"query": picture()}, data={"steps": "8"})
    assert started.status_code == 202
    job = started.json()["id"]
    with client.stream("GET", f"/v1/jobs/{job}/events") as events:
        states = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
    assert states[-1]["state"] == "done" and states[-1]["done"] == states[-1]["evaluations"] == 7
    assert client.get(states[-1]["result"]).headers["content-type"] == "image/png"
    wanted = {**STEPS, "keep_size": "true", "format": "json"}
    started = client.post("/v1/tasks/negative/jobs", files={"query": picture(size=(40, 24))}, data=wanted)
    result = f"/v1/jobs/{started.json()['id']}/result"
    wait_until(lambda: client.get(result).status_code == 200)
    assert pixels(base64.b64decode(client.get(result).json()["picture"])).shape == (24, 40, 3)
    with pipe.executor.turn():
        job = client.post("/v1/tasks/negative/jobs", files={"query": picture()}, data=STEPS).json()["id"]
        assert client.get(f"/v1/jobs/{job}/result").status_code == 409
        assert client.delete(f"/v1/jobs/{job}").json()["state"] == "cancelled"
    assert "cancelled" in message(client.get(f"/v1/jobs/{job}/result"))
    assert client.get("/v1/jobs/nothing").status_code == 404
    works(client)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": "5"}, "even number"),
        ({"steps": "102"}, "100 at most"),
        ({"guidance": "nan"}, "guidance"),
        ({"guidance": "1e9"}, "0 to 20"),
        ({"speed": "ludicrous"}, "expected one of exact"),
        ({"pairs": "500"}, "expected 1 to 4"),
        ({"pairs": "0"}, "expected 1 to 4"),
        ({"size": "50"}, "multiple of 16"),
        ({"size": "99999984"}, "multiples of 16"),
        ({"size": "2048"}, "1024 a side"),
        ({"seed": "a"}, "seed"),
        ({"seed": str(2**70)}, "seed"),
        ({"format": "../x"}, "expected one of png"),
    ],
)
def test_fields_that_do_not_fit(client, fields, words):
    answer = ask(client, **fields)
    assert answer.status_code == 422 and words in message(answer)


def test_names_that_are_none(client):
    for name in ("..", "..%2f..%2fetc", "%2e%2e", "a%00b", "Depth", "x" * 300):
        assert ask(client, name).status_code in (404, 405), name
    for name in ("..", "../x", "/etc/passwd", "a b", "", "x" * 65, "Ä", "a\x00"):
        files = [("inputs", picture()), ("targets", picture())]
        assert client.post("/v1/tasks", files=files, data={"name": name}).status_code == 422, name
    works(client)


def bomb(width: int = 40000, height: int = 40000) -> bytes:
    """A PNG whose header promises much."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_pictures_that_cannot_be_taken(client):
    animation = io.BytesIO()
    Image.new("RGB", (8, 8)).save(animation, "GIF", save_all=True, append_images=[
        Image.new("RGB", (8, 8), (i, 2 * i, 0)) for i in range(1, 30)
    ])  # fmt: skip
    ppm = b"P6 2 2 255\n" + bytes(12)
    # A clip of ours that does not move says how often its frame repeats: the few bytes stand for as many as they claim.
    still, moving = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(still, "GIF", comment=b"lavin-rt clip of 99997 frames, 100 ms each")
    Image.new("RGB", (8, 8)).save(moving, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")],
                                  duration=500_000, comment=b"lavin-rt clip of 9 frames, 100 ms each")  # fmt: skip
    for query, status, words in (
        (still.getvalue(), 413, "more than 9 frames"),
        (moving.getvalue(), 413, "more than 9 frames"),
        (bomb(), 413, "too many pixels"),
        (bomb(1001, 1000), 413, "1000x1001"),
        (animation.getvalue(), 413, "30 frames"),
        (picture()[:200], 422, "sound file"),
        (b"", 415, "not a picture"),
        (b"GIF89a", 415, "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "not a picture"),
        (ppm, 415, "PNG, JPEG"),
        (b"cos\nsystem\n(S'true'\ntR.", 415, "not a picture"),
    ):
        answer = ask(client, query=query)
        assert answer.status_code == status and words in message(answer), answer.text
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        assert ask(client, query=picture(kind=kind)).status_code == 200


def test_pairs_that_cannot_be_taken(client):
    def make(files, **data):
        return client.post("/v1/tasks", files=files, data={"name": "new", **data})

    one = picture()
    many = make([("inputs", one)] * 500 + [("targets", one)] * 500)
    assert many.status_code in (400, 413) and message(many)
    assert "4 at most" in message(make([("inputs", one)] * 5 + [("targets", one)] * 5))
    assert "1 inputs, 2 targets" in message(make([("inputs", one), ("targets", one), ("targets", one)]))
    assert "target 0" in message(make([("inputs", one), ("targets", b"no picture")]))
    pickled = make({"context": b"\x80\x04\x95cposix\nsystem\n"})
    assert pickled.status_code == 422 and "not an encoded context" in message(pickled)
    assert client.get("/v1/tasks/new").status_code == 404
    works(client)


def raw(address: str, content: bytes, wait: float = 10) -> bytes:
    """What comes back on a connection for bytes of one's own."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(content)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


HEAD = "POST /v1/tasks/negative/run HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"


def test_bodies_that_are_too_large_too_slow_or_half(client, address, service):
    assert b" 413 " in raw(address, f"{HEAD}Content-Length: 10000000000\r\n\r\nx".encode())
    chunk = f"{2**19:x}\r\n".encode() + bytes(2**19) + b"\r\n"
    head = f"{HEAD}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
    part = b'--b\r\nContent-Disposition: form-data; name="query"; filename="a"\r\n\r\n'
    first = f"{len(part):x}\r\n".encode() + part + b"\r\n"
    assert b" 413 " in raw(address, head + first + 2 * chunk)
    began = time.monotonic()
    assert b" 408 " in raw(address, f"{HEAD}Content-Length: 1000\r\nConnection: close\r\n\r\n".encode() + part)
    assert time.monotonic() - began < 8
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{HEAD}Content-Length: 1000\r\n\r\nhalf of".encode())
    works(client)


def test_connections_on_which_no_request_comes(client, address, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    host, port = address.removeprefix("http://").split(":")
    for start in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea"):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(start)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(65536):  # until the service closes it
                    answer += part
                    connection.sendall(b"x")
            assert answer.count(b"200 OK") == start.count(b"\r\n\r\n")
    assert ask(client, steps="60").status_code == 200  # which takes longer


def test_a_client_that_goes_away_cancels_its_run(client, address, service, pipe):
    with pipe.executor.turn():
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/tasks/negative/run", files={"query": picture()}, data=STEPS, timeout=1)
        wait_until(lambda: not any(ticket.state == "running" for ticket in service.engine._running))
    works(client)


def test_out_of_memory_and_numbers_that_are_none(client, pipe, monkeypatch):
    def refused(shape):
        raise TooLittleMemory("1 query at 64x64 with 4 pairs needs about 9.00 GB of memory on cpu, 0.10 GB are free")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.executor, "check_memory", refused)
        answer = ask(client)
    assert answer.status_code == 503 and "9.00 GB" in message(answer) and "retry-after" in answer.headers
    works(client)
    decode = pipe.decode

    def fail(latents):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(pipe, "decode", fail)
        assert ask(client).status_code == 503
    assert pipe.decode == decode
    works(client)
    sample = pipe.executor.sample
    with monkeypatch.context() as patch:
        patch.setattr(pipe.executor, "sample", lambda *a: sample(*a[:3], a[3] * float("nan"), *a[4:]))
        answer = ask(client)
    assert answer.status_code == 500 and "NaN" in message(answer)
    works(client)


def test_a_queue_of_two(pipe):
    service = Service(pipe, Limits(queue=2))
    with running(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        with pipe.executor.turn():
            jobs = []
            for _ in range(3):
                jobs.append(client.post("/v1/tasks/negative/jobs", files={"query": picture()}, data=STEPS).json()["id"])
                wait_until(lambda: service.engine.running == 1)
            full = ask(client)
            assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1 and "wait already" in message(full)
        wait_until(lambda: all(client.get(f"/v1/jobs/{job}").json()["state"] == "done" for job in jobs), 60)
        works(client)
        figures = client.get("/metrics").text
        assert 'lavin_rt_refusals_total{reason="queue"} 1.0' in figures and "lavin_rt_queue_length 0.0" in figures
        assert 'lavin_rt_request_seconds_count{speed="exact",task="negative"} 3.0' in figures


def test_a_cancelled_run_leaves_the_executor_ready(pipe):
    task = pipe.task("negative")

    def stop(done, total, latents):
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        task.run([Path("lavin_rt/mini/template/negative/7_input.png").resolve()], steps=4, callback=stop)
    assert task.run([Image.new("RGB", (8, 8))], steps=4)
