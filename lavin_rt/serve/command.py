"""`lavin-rt serve`: from a command line to a service that answers."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import math
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from lavin_rt.console import Progress, loading_options
from lavin_rt.errors import InputError, missing_extra
from lavin_rt.serve.limits import Limits

TOKEN_LENGTH = 16
PACKAGES = ("fastapi", "fastapi_offline", "uvicorn", "python_multipart", "prometheus_client")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(options: argparse.Namespace) -> None:
    """Runs the command until it is told to end.

    Raises:
        InputError: a bad option, a port that is taken, packages or files that are missing.
    """
    limits = Limits(
        queue=options.queue,
        batch=options.batch_size,
        body_bytes=options.max_upload * 2**20,
        pixels=options.max_pixels,
        pairs=options.max_pairs,
        side=options.max_size,
        tasks=options.max_tasks,
        task_seconds=options.task_age,
    )
    if not 0 <= options.grace < math.inf:
        raise InputError(f"--grace is {options.grace:g}; expected a finite number of seconds, 0 or more")
    token = read_token(options.token_file) if options.token_file else None
    here = is_loopback(options.host)
    if not here and token is None and not options.no_token:
        raise InputError(
            f"--host {options.host} is open to other machines; give --token-file FILE, or --no-token to let anybody in"
        )
    for package in PACKAGES if options.no_page else (*PACKAGES, "gradio"):
        if find_spec(package) is None:
            raise missing_extra(package, "serve", "lavin-rt serve")
    from lavin_rt.find.model import Artifact, find_model
    from lavin_rt.pipeline import Pipeline
    from lavin_rt.sampling.speeds import speed_of
    from lavin_rt.serve.app import make_app
    from lavin_rt.serve.server import Server, listen
    from lavin_rt.serve.service import Service

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    with listen(options.host, options.port) as listening:
        with Progress(quiet=False).bar("loading", "B") as loading:
            model = find_model(options.checkpoint, options.revision, options.trust, progress=loading)
            if isinstance(model, Artifact):
                model.manifest.check_speed(speed_of(options.speed))
            pipeline = Pipeline.from_pretrained(model, **loading_options(options), progress=loading)
        service = Service(pipeline, limits, options.tasks, options.speed)
        hosts = LOOPBACK if here and token is None and not options.no_token else None
        server = Server(make_app(service, token, hosts, page=not options.no_page), service.engine, options.grace)
        print(f"lavin-rt: serving {pipeline.source} on {address(listening)}", flush=True)
        server.run(sockets=[listening])


def address(listening: socket.socket) -> str:
    """What to type into a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: str) -> str:
    """The token in a file, its only line.

    Raises:
        InputError: no such file, or a token that is too short, or more than one word.
    """
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token-file {path}: cannot be read ({getattr(error, 'strerror', error)})") from None
    if len(token) < TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            f"--token-file {path}: expected one word of at least {TOKEN_LENGTH} characters, as of openssl rand -hex 32"
        )
    return token
