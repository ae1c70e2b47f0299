"""A service on a free port of this machine, in a thread of the tests' own process."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
from PIL import Image

from lavin_rt.serve.app import make_app
from lavin_rt.serve.server import Server, listen
from lavin_rt.serve.service import Service


def picture(seed: int = 0, size: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
    """A picture file of noise, width x height."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def pixels(content: bytes) -> np.ndarray:
    """A picture file as int16 `[H, W, 3]`."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(np.int16)


@contextmanager
def running(service: Service, token: str | None = None, hosts=None, page: bool = False) -> Iterator[str]:
    """The address of a service, which ends with the block."""
    with listen("127.0.0.1", 0) as listening:
        server = Server(make_app(service, token, hosts, page), service.engine, grace=5)
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            wait_until(lambda: server.started, 60)
            yield address
        finally:
            service.engine.stop(5)
            service.engine.ended = server.should_exit = True
            thread.join(30)


def wait_until(condition, seconds: float = 20.0) -> None:
    """Waits for something that has to come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def message(response: httpx.Response) -> str:
    """The one line of a refusal."""
    text = response.json()["error"]["message"]
    assert text and "\n" not in text and "/work" not in text and "/tmp" not in text, text
    return text


STEPS = {"steps": "4"}


def ask(client, task="depth_estimation", query=None, **fields):
    query = picture() if query is None else query
    return client.post(f"/v1/tasks/{task}/run", files={"query": query}, data={**STEPS, **fields})


def works(client) -> None:
    """The next request is answered."""
    assert ask(client).status_code == 200
