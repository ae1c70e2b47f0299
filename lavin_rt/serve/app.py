"""The parts put together: routes, page, guard."""

from __future__ import annotations

import logging
from collections.abc import Collection

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lavin_rt.errors import InputError
from lavin_rt.serve.guard import Guard, error_response
from lavin_rt.serve.limits import Refused, refusal
from lavin_rt.serve.routes import make_router
from lavin_rt.serve.service import Service

log = logging.getLogger("lavin_rt.serve")


def make_app(
    service: Service, token: str | None = None, hosts: Collection[str] | None = None, page: bool = True
) -> Guard:
    """The service as an ASGI application.

    Args:
        service: behind it.
        token: that is demanded of everything but `/health`, `/ready` and `/login`.
        hosts: see `Guard`.
        page: with the page at `/`.
    """
    from importlib.metadata import version

    app = FastAPIOffline(
        title="lavin-rt",
        version=version("lavin-rt"),
        description="Shown a few input-target pairs of a vision task, it does the task.",
        redoc_url=None,
    )
    app.include_router(make_router(service))

    def refuse(refused: Refused) -> Response:
        service.metrics.refusals.labels(refused.reason).inc()
        return error_response(refused)

    @app.exception_handler(Refused)
    @app.exception_handler(InputError)
    async def refused(request: Request, error: Refused | InputError) -> Response:
        return refuse(refusal(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "path", "query"))
        return refuse(Refused(422, f"{where[:80]}: {first['msg']}"[:400], "input"))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        reason = {404: "input", 408: "slow", 413: "size"}.get(error.status_code, "input")
        return refuse(Refused(error.status_code, str(error.detail), reason))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return refuse(Refused(500, "the request failed; the service's log says why", "internal"))

    if page:
        from lavin_rt.serve.page import mount_page

        app = mount_page(app, service)
    return Guard(
        app,
        service.limits,
        token,
        hosts,
        lambda reason: service.metrics.refusals.labels(reason).inc(),
        lambda: service.engine.ended,
    )
