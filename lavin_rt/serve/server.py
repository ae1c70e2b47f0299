"""The HTTP server: a port of its own from the beginning, and an end in which nothing is lost."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from lavin_rt.errors import InputError
from lavin_rt.serve.engine import ServingEngine

log = logging.getLogger("lavin_rt.serve")

LINGER_SECONDS = 0.5
"""For which requests are still answered with 503 after the last run, so that no connection meets a closed door."""
CLOSE_SECONDS = 5
CONNECTIONS = 512
HEAD_SECONDS = 20.0
"""Within which a connection brings a request."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before minutes go into reading weights.

    Args:
        port: 0 takes a free one.

    Raises:
        InputError: no such address here, or a port that something else has.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: expected 0 to 65535")
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(address[:2], family=family, backlog=1024)
    except socket.gaierror as error:
        raise InputError(f"--host {host}: no such address ({error.strerror}); give one of this machine's") from None
    except PermissionError:
        raise InputError(f"--port {port}: not allowed; give one from 1024 on") from None
    except OSError as error:
        if "in use" in str(error):
            raise InputError(f"port {port} on {host} is in use; stop what has it or give another --port") from None
        raise InputError(f"cannot listen on {host} port {port} ({error.strerror})") from None


class Connection(H11Protocol):
    """A connection that is closed when no request comes on it: clients that are silent or send a header byte by byte
    would take up all that there may be.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._looking.cancel()
        super().connection_lost(exc)

    def _look_again(self, idle_after: object) -> None:
        self._looking = self.loop.call_later(HEAD_SECONDS, self._look, idle_after)

    def _look(self, idle_after: object) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is idle_after:
            self.transport.close()
        else:
            self._look_again(self.cycle if idle else self)


class Server(uvicorn.Server):
    """Drains on TERM or INT: what runs finishes within the grace, what waits and what comes is told 503, then it ends.

    A second signal ends it at once.

    Args:
        app: the service.
        engine: what has to come to rest.
        grace: seconds for what runs.
    """

    def __init__(self, app: ASGIApp, engine: ServingEngine, grace: float):
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=15,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            limit_concurrency=CONNECTIONS,
            h11_max_incomplete_event_size=64 * 1024,
        )
        super().__init__(config)
        self.engine, self.grace = engine, grace
        self._drainer: threading.Thread | None = None

    def handle_exit(self, sig: int, frame: object) -> None:
        if self._drainer is None:
            self._drainer = threading.Thread(target=self._drain, name="lavin-rt drain", daemon=True)
            self._drainer.start()
        else:
            self.force_exit = self.should_exit = True

    def _drain(self) -> None:
        log.info("draining")
        if not self.engine.stop(self.grace):
            log.warning("a run was ended after the %g s of grace", self.grace)
        time.sleep(LINGER_SECONDS)
        self.engine.ended = self.should_exit = True
