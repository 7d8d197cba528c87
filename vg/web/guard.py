"""Limits of Gradio's server: the address it listens on, the requests it accepts, and what stops it."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from vg.errors import ConfigError
from vg.web.uploads import MAX_BYTES

MAX_EVENT_BYTES = 1_000_000  # of a request that is not an upload: texts and tables

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]


def check_address(host: str, port: int | None) -> None:
    """Raise ConfigError if nothing can listen there. Gradio would try an address of another machine with 100 ports."""
    name = host.removeprefix("[").removesuffix("]")
    try:
        socket.create_server((name, port or 0), family=socket.AF_INET6 if ":" in name else socket.AF_INET).close()
    except (OSError, UnicodeError) as error:
        where = f"{host}, port {port}" if port else host
        advice = "choose an address of this machine by --host and a free port by --port"
        raise ConfigError(f"cannot listen on {where} ({error}); {advice}") from error


def stop_like_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP interrupt the process, so that the uploads are deleted; further ones change nothing."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def stop(*_: Any) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, stop)


class Guard:
    """ASGI middleware; a refused request gets one line of text."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if "/proxy=" in path or "/file=http" in path.lower():
            return await refuse(send, 403, "this server fetches no URLs")
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        is_upload = path.rstrip("/").endswith("/upload")
        limit = MAX_BYTES + 10_000 if is_upload else MAX_EVENT_BYTES  # an upload has headers of its own
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return await refuse(send, 411, "the request has no Content-Length")
        if int(length) > limit:
            return await refuse(send, 413, f"the request has more than {limit:,} bytes")
        if is_upload:
            return await self.app(scope, receive, send)
        body, message = b"", {"type": "http.request", "more_body": True}
        while message["type"] == "http.request" and message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        if has_remote_file(body):
            return await refuse(send, 403, "this server fetches no URLs; upload the file")
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Any:
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)


def has_remote_file(body: bytes) -> bool:
    """Whether JSON contains a file with a URL as its path, which Gradio would download; also if it is too deep."""
    try:
        left = [json.loads(body)]
    except RecursionError:
        return True
    except ValueError:
        return False  # Gradio answers that it is not JSON
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if "://" in str(value.get("path", "")):
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
    return False


async def refuse(send: Send, status: int, text: str) -> None:
    content = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": content})
