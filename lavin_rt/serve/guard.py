"""Who may ask, and how much: the outermost layer, before anything of a request is read."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable, Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lavin_rt.serve.limits import Limits, Refused

COOKIE = "lavin_rt"
OPEN = ("/health", "/ready", "/login")
"""What is answered without a token: whether the service lives, and the way to log in."""
WRONG_TOKEN_SECONDS = 0.5
LOGIN_BYTES = 4096
END_SECONDS = 0.25
# Everything on the page comes from this service; the page's own scripts and styles are written into it.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
LOGIN = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>lavin-rt</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root{{color-scheme:light dark}}
body{{font:16px system-ui,sans-serif;max-width:22rem;margin:15vh auto;padding:0 1rem}}
input,button{{font:inherit;padding:.6rem;width:100%;box-sizing:border-box;margin-top:.6rem}}p{{color:#c33}}</style></head>
<body><h1>lavin-rt</h1><form method="post" action="login"><label for="token">Token of this service</label>
<input id="token" name="token" type="password" autocomplete="current-password" autofocus required>
<button>Log in</button></form><p role="alert">{problem}</p></body></html>"""


def error_response(refused: Refused) -> JSONResponse:
    """What every client is told of a request that is not answered."""
    headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = {"error": {"status": refused.status, "reason": refused.reason, "message": refused.message}}
    return JSONResponse(body, refused.status, headers)


class Guard:
    """Refuses what should not even be read, and bounds what is.

    Args:
        app: the service.
        limits: `body_bytes`, `body_seconds`.
        token: that is demanded, or None.
        hosts: names under which a service without a token may be asked, so that no page elsewhere reaches it through a
            name of its own that leads here; None asks for no name.
        refused: told the reason of every refusal.
        ended: whether the service answers nothing more; what a browser holds open is let go then.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        token: str | None = None,
        hosts: Collection[str] | None = None,
        refused: Callable[[str], None] = lambda reason: None,
        ended: Callable[[], bool] = lambda: False,
    ):
        self.ended = ended
        self.app, self.limits, self.token, self.hosts, self.refused = app, limits, token, hosts, refused
        # Neither the token itself nor anything it could be guessed from is kept in the browser.
        self._cookie = hmac.new((token or "").encode(), b"lavin-rt page", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # nothing here speaks them
            return
        headers = Headers(scope=scope)
        send = _with_policy(send)
        response = self._refusal(scope, headers)
        if response is None and scope["path"] == "/login" and self.token:
            response = await self._login(scope, receive)
        if response is None:
            await self.app(scope, self._bounded(receive), send)
        else:
            await response(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        problem = self._foreign(scope, headers) or self._unknown(scope, headers) or self._too_large(headers)
        if problem is None:
            return None
        self.refused(problem.reason)
        browser = scope["method"] == "GET" and "text/html" in headers.get("accept", "")
        if problem.status == 401 and browser:
            return RedirectResponse("/login", 303)
        response = error_response(problem)
        response.headers["Connection"] = "close"  # the body is not read
        return response

    def _foreign(self, scope: Scope, headers: Headers) -> Refused | None:
        """A page of another origin, which a browser would let send requests to a service without a token."""
        if self.token:
            return None  # its pages have no token, and the cookie does not go with their requests
        host = headers.get("host", "")
        if self.hosts is not None and (urlsplit(f"//{host}").hostname or "") not in self.hosts:
            return Refused(421, "unknown host name; ask by the address that the service was started with", "host")
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and origin and urlsplit(origin).netloc != host:
            return Refused(403, "requests of pages elsewhere are not taken; start the service with a token", "host")
        return None

    def _unknown(self, scope: Scope, headers: Headers) -> Refused | None:
        if not self.token or scope["path"] in OPEN:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(given.strip(), self.token):
            return None
        if not scheme and _same(_cookie(headers), self._cookie):
            return None
        what = "wrong token" if scheme else "no token"
        return Refused(401, f"{what}; send the header Authorization: Bearer TOKEN, or log in at /login", "token")

    def _too_large(self, headers: Headers) -> Refused | None:
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return Refused(400, "Content-Length is no number", "input")
        if len(length) > 18 or int(length) > self.limits.body_bytes:
            return too_large(self.limits)
        return None

    async def _login(self, scope: Scope, receive: Receive) -> Response:
        if scope["method"] != "POST":
            return HTMLResponse(LOGIN.format(problem=""))
        body, more = b"", True
        bounded = self._bounded(receive)
        while more:
            try:
                message = await bounded()
            except HTTPException as error:
                reason = "slow" if error.status_code == 408 else "size"
                return error_response(Refused(error.status_code, str(error.detail), reason))
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > LOGIN_BYTES:
                return error_response(Refused(413, "that is no token", "token"))
        given = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0].strip()
        if not _same(given, self.token or ""):
            self.refused("token")
            await asyncio.sleep(WRONG_TOKEN_SECONDS)
            return HTMLResponse(LOGIN.format(problem="That is not the token of this service."), 401)
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, self._cookie, httponly=True, samesite="lax", secure=scope["scheme"] == "https")
        return response

    def _bounded(self, receive: Receive) -> Receive:
        """A body that ends in 413 when it is too large and in 408 when it comes too slowly."""
        received, complete = 0, False

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await self._until_the_end(receive)
            try:
                message = await asyncio.wait_for(receive(), self.limits.body_seconds)
            except asyncio.TimeoutError:
                raise HTTPException(
                    408, f"nothing of the body came for {self.limits.body_seconds:g} seconds; send it again"
                ) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self.limits.body_bytes:
                raise HTTPException(413, too_large(self.limits).message)
            return message

        return bounded

    async def _until_the_end(self, receive: Receive) -> Message:
        """What comes behind a body: the client's leaving, or this service's."""
        coming = asyncio.ensure_future(receive())
        try:
            while not coming.done():
                if self.ended():
                    return {"type": "http.disconnect"}
                await asyncio.wait({coming}, timeout=END_SECONDS)
            return coming.result()
        finally:
            coming.cancel()


def too_large(limits: Limits) -> Refused:
    return Refused(413, f"the body is too large; expected {limits.body_bytes} bytes at most", "size")


def _same(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode(), right.encode())


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _with_policy(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = POLICY
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "same-origin"
        await send(message)

    return wrapped
