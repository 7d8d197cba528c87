"""Images from URLs: limits on address, size and time; every failure is one error."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from vg.errors import DataError
from vg.inference import download as module
from vg.inference.download import download
from vg.inference.images import to_array

Send = Callable[[bytes], Any]


@contextmanager
def server(answer: Callable[[Send, str], None]) -> Iterator[str]:
    """Serve on this machine; `answer` gets a function that sends bytes, and the first line of the request."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # the client hangs up
                answer(self.request.sendall, self.request.recv(1 << 16).decode().splitlines()[0])

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}/image.png"
        listening.shutdown()


def reply(content: bytes, *headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *headers, "", ""]).encode() + content


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VG_PRIVATE_URLS", "1")


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 0.5)
    monkeypatch.setattr(module, "MAX_BYTES", 1_000_000)


def test_content(private: None) -> None:
    chunked = b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    answers = {
        "length": reply(b"abcde", "Content-Length: 5"),
        "no length": reply(b"abcde"),
        "chunked": reply(chunked, "Transfer-Encoding: chunked"),
    }
    for content in answers.values():
        with server(lambda send, _, content=content: send(content)) as url:
            assert download(url) == b"abcde"
            assert download(url.replace("http", "HTTP", 1)) == b"abcde"


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0.0.0.0", "10.0.0.1"),
        *("192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "[fe80::1]", "[fd00::1]", "[2002:7f00:1::]"),
    ],
)
def test_private_addresses_are_refused(host: str) -> None:
    with pytest.raises(DataError, match=r"private address .*VG_PRIVATE_URLS|Address family|No address"):
        to_array(f"http://{host}:9/image.png")


def test_redirects_to_private_addresses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first host counts as public here, the second one is looked up as it is."""
    requests: list[str] = []

    def answer(send: Send, request: str) -> None:
        requests.append(request)
        port = url.split(":")[2].split("/")[0]
        send(f"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{port}/secret\r\n\r\n".encode())

    with server(answer) as url:
        checked = module._public_addresses
        monkeypatch.setattr(
            module,
            "_public_addresses",
            lambda host, port: [("127.0.0.1", port)] if host == "public.example" else checked(host, port),
        )
        with pytest.raises(DataError, match=r"public\.example.*127\.0\.0\.1 has the private address"):
            download(url.replace("127.0.0.1", "public.example"))
    assert len(requests) == 1


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "//[", "http://", "\x00"])
def test_redirects_to_other_schemes_are_refused(target: str, private: None) -> None:
    with (
        server(lambda send, _: send(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\n\r\n".encode())) as url,
        pytest.raises(DataError, match="cannot download"),
    ):
        download(url)


def test_an_address_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server could give a public address to the check and a private one to the connection."""
    lookups: list[str] = []

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        lookups.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1" if len(lookups) > 1 else "8.8.8.8", port))]

    connected: list[Any] = []

    def create_connection(address: Any, *_: Any) -> None:
        connected.append(address)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    with pytest.raises(DataError, match="refused"):
        download("http://rebinding.example/")
    assert connected == [("8.8.8.8", 80)]


def test_targets_of_a_proxy_are_checked(monkeypatch: pytest.MonkeyPatch, private: None) -> None:
    with server(lambda send, request: send(reply(request.encode()))) as url:
        for scheme in ("http", "https"):
            monkeypatch.setenv(f"{scheme}_proxy", url.removesuffix("/image.png"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("VG_PRIVATE_URLS", "")
        assert download("http://8.8.8.8/a.png") == b"GET http://8.8.8.8/a.png HTTP/1.1"
        for scheme in ("http", "https"):
            with pytest.raises(DataError, match="private address"):
                download(f"{scheme}://169.254.169.254/latest")


def drip(send: Send, head: bytes, byte: bytes) -> None:
    send(head)
    for _ in range(200):
        send(byte)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda send, _: [send(reply(b""))] + [send(bytes(1 << 16)) for _ in range(1000)], "more than 1,000,000"),
        (lambda send, _: send(reply(b"", "Content-Length: 99999999999999999999")), "are more than 1,000,000"),
        (lambda send, _: send(reply(b"abc", "Content-Length: 100")), "97 bytes too early"),
        (lambda send, _: send(reply(b"", "Transfer-Encoding: chunked") + b"FFFFFFFF\r\nabc"), "IncompleteRead"),
        (lambda send, _: send(reply(b"", "Transfer-Encoding: chunked") + b"zz\r\nabc"), "cannot download"),
        (lambda send, _: drip(send, reply(b"", "Content-Length: 9999"), b"x"), "within 0.5 seconds"),
        (lambda send, _: drip(send, b"HTTP/1.1 200 OK\r\nX: ", b"x"), "within 0.5 seconds"),
        (lambda send, _: drip(send, b"", b""), "within 0.5 seconds"),
        (
            lambda send, _: [send(b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n" + bytes(9_000_000))],
            "more than 1,000,000",
        ),
        (lambda send, _: send(b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n"), "redirect"),
        (lambda send, _: None, "cannot download"),
        (lambda send, _: send(b"hello\r\n\r\n"), "hello"),
        (lambda send, _: send(b"HTTP/1.1 404 Not there\r\n\r\n"), "404"),
    ],
)
def test_bad_answers(answer: Callable[[Send, str], None], message: str, private: None, small_limits: None) -> None:
    started = time.monotonic()
    with server(answer) as url, pytest.raises(DataError, match=message) as error:
        download(url)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "url",
    [
        *("http://", "http:///x", "http://[::1", "http://a b/", "http://x:port/", "http://x:99999999/", "http://\x00/"),
        *(f"http://{'a' * 300}.com/", "http://user:password@8.8.8.8/", "http://é.invalid/é", "https://"),
    ],
)
def test_odd_urls(url: str) -> None:
    with pytest.raises(DataError, match="cannot download") as error:
        to_array(url)
    assert "\n" not in str(error.value)
