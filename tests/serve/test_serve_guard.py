"""Who may ask a service, and services that cannot start."""

# ruff: noqa: E402 (what needs an extra comes behind the question whether it is there)

from __future__ import annotations

import socket

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
httpx = pytest.importorskip("httpx", reason="needs the extra test")

from support.command import exit_code
from support.serving import ask, message, running, works

from lavin_rt.cli.main import main
from lavin_rt.pipeline import Pipeline
from lavin_rt.serve.limits import Limits
from lavin_rt.serve.server import listen
from lavin_rt.serve.service import Service

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained(device="cpu", dtype="float32")


def test_a_token_is_demanded_of_everything(pipe):
    with running(Service(pipe), token=TOKEN) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/tasks", "/metrics", "/docs", "/openapi.json", "/"):
            answer = client.get(path)
            assert answer.status_code == 401 and "token" in message(answer)
        for value in ("Bearer wrong", "Bearer", "Basic abc", "Bearer " + TOKEN[:-1]):
            assert client.get("/v1/tasks", headers={"Authorization": value}).status_code == 401
        assert ask(client).status_code == 401
        assert client.get("/v1/tasks", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        page = client.get("/", headers={"Accept": "text/html"})
        assert page.status_code == 303 and page.headers["location"] == "/login"
        assert client.post("/login", data={"token": "wrong"}).status_code == 401
        assert client.post("/login", data={"token": TOKEN}).status_code == 303
        assert TOKEN not in str(client.cookies) and client.get("/v1/tasks").status_code == 200
        works(client)


def test_a_login_that_comes_too_slowly(pipe):
    head = b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40\r\n\r\ntoken="
    with running(Service(pipe, Limits(body_seconds=0.3)), token=TOKEN) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head)
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_pages_elsewhere_reach_no_service_without_a_token(pipe):
    with running(Service(pipe), hosts=("127.0.0.1",)) as address, httpx.Client(base_url=address) as client:
        assert client.get("/v1/tasks", headers={"Host": "evil.example"}).status_code == 421
        assert client.delete("/v1/tasks/x", headers={"Origin": "http://evil.example"}).status_code == 403
        assert client.delete("/v1/tasks/x", headers={"Origin": address}).status_code == 404


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--token-file"),
        (["--token-file", "nowhere"], "nowhere"),
        (["--queue", "0"], "queue is 0"),
        (["--grace", "-1"], "--grace"),
        (["--grace", "inf"], "--grace is inf"),
        (["--task-age", "inf"], "task_seconds is inf"),
        (["--port", "99999", "--no-page"], "99999"),
        (["--tasks", "nowhere.txt", "--no-page", "--port", "0"], "task pack"),
        (["--speed", "ludicrous", "--no-page", "--port", "0"], "ludicrous"),
    ],
)
def test_a_service_that_cannot_start(arguments, words, capsys):
    assert exit_code(["serve", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert words in lines[-1] and lines[-1].startswith(("lavin-rt: error: ", "lavin-rt serve: error: "))


def test_a_port_that_is_taken(capsys):
    with listen("127.0.0.1", 0) as taken:
        assert main(["serve", "--no-page", "--port", str(taken.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err
