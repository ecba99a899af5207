"""What stands before every route: who may ask, how much they may send, and whether it ends soon."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spt_ds.log import get_logger
from spt_ds.serve.answers import Meters, failed, stopping
from spt_ds.serve.ask import Refused

# The page and its files hold no secret; the page asks for the key. Health is for load balancers.
OPEN = ("/", "/page.js", "/scores.js", "/style.css", "/icon.svg", "/healthz")
WORK = "/v1/chat/completions"
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        b" img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


@dataclass
class Guard:
    """Refuses requests before a route sees them, and counts those under way."""

    meters: Meters
    key: str | None  # None: nobody is asked for one
    local: bool  # whether only this machine reaches the socket
    max_body: int  # bytes
    body_seconds: float = 20.0
    stopping: bool = False
    under_way: int = field(default=0, init=False)

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application behind this guard."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            await self._handle(app, scope, receive, send)

        return guarded

    async def _handle(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        began, work, status = time.monotonic(), scope["path"] == WORK, 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], *HEADERS]
                if self.stopping:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        self.under_way += work
        try:
            self._check(scope, work)
            await app(scope, receive, told)
        except Refused as error:
            await error_response(error)(scope, receive, told)
        except ClientDisconnect:
            pass
        except Exception:
            get_logger().exception("a request failed")
            if not status:
                await error_response(failed())(scope, receive, told)
        finally:
            self.under_way -= work
            if work:
                self.meters.requests.labels(str(status or 499)).inc()
                self.meters.seconds.observe(time.monotonic() - began)

    def _check(self, scope: Scope, work: bool) -> None:
        headers = dict(scope["headers"])  # the last of a name counts
        if self.local and self.key is None:
            _refuse_other_host(headers.get(b"host", b"").decode("latin-1"))
        if self.key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            # In a time that does not depend on how much of it is right.
            if not hmac.compare_digest(given, b"Bearer " + self.key.encode()):
                raise Refused(
                    "give the key of this server as `Authorization: Bearer KEY`",
                    status=401,
                    kind="authentication_error",
                    code="invalid_api_key",
                )
        if not work:
            return
        if self.stopping:
            raise stopping()
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # A page of another site may send other kinds without asking first.
        if scope["method"] == "POST" and kind != b"application/json":
            raise Refused("send Content-Type: application/json", status=415)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body:
            raise self._too_large()

    async def body(self, request: Request) -> bytes:
        """Read the body of a request; raise Refused where it is too long or comes too slowly."""
        content = bytearray()

        async def read() -> None:
            async for piece in request.stream():
                content.extend(piece)
                if len(content) > self.max_body:
                    raise self._too_large()

        try:
            await asyncio.wait_for(read(), self.body_seconds)
        except asyncio.TimeoutError as error:  # another class in Python 3.10
            message = f"the body did not come in {self.body_seconds:g} s"
            raise Refused(message, status=408, kind="timeout_error") from error
        return bytes(content)

    def _too_large(self) -> Refused:
        return Refused(
            f"the body is larger than {self.max_body} bytes", status=413, code="body_too_large"
        )


def error_response(error: Refused) -> Response:
    """The response of an error, in OpenAI's shape."""
    headers: dict[str, Any] = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    return JSONResponse(error.body, error.status, headers)


def is_local(host: str) -> bool:
    """Whether a host is this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse_other_host(host: str) -> None:
    """Without a key, the name of the host shows a page of another site that made it point here."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if not is_local(name):
        raise Refused("this server answers to localhost alone", status=421)
