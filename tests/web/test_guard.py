"""Requests that do not reach Gradio."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vg.web.guard import MAX_EVENT_BYTES, Guard
from vg.web.uploads import MAX_BYTES


def request(path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Send a request; return the status and the body that the application gets, or the text of the guard."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive() if body is not None else {"body": b""}
        await send({"status": 200})
        await send({"body": message["body"]})

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    if body is not None:
        headers = {"content-length": str(len(body)), **headers}
    encoded = [(key.encode(), value.encode()) for key, value in headers.items() if value]
    scope = {"type": "http", "method": "GET" if body is None else "POST", "path": path, "headers": encoded}
    asyncio.run(Guard(app)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/", None, {}, 200),
        ("/gradio_api/file=/tmp/gradio/image.png", None, {}, 200),
        ("/gradio_api/file=http://example.com/x.png", None, {}, 403),
        ("/gradio_api/proxy=https://example.com/", None, {}, 403),
        ("/gradio_api/queue/join", b'{"data": ["dog"]}', {}, 200),
        ("/gradio_api/queue/join", b"x" * (MAX_EVENT_BYTES + 1), {}, 413),
        ("/gradio_api/queue/join", b"x", {"content-length": ""}, 411),
        ("/gradio_api/queue/join", b'{"data": [{"path": "\\u0068ttp://10.0.0.1/x.png"}]}', {}, 403),
        ("/gradio_api/queue/join", b"[" * 500_000, {}, 403),
        ("/gradio_api/queue/join", b"not json", {}, 200),
        ("/gradio_api/upload", b"x" * (MAX_EVENT_BYTES + 1), {}, 200),
        ("/gradio_api/upload", b"x", {"content-length": str(2 * MAX_BYTES)}, 413),
    ],
)
def test_requests(path: str, body: bytes | None, headers: dict[str, str], status: int) -> None:
    got, content = request(path, body, **headers)
    assert got == status
    assert content == (body or b"") if status == 200 else b"\n" not in content
