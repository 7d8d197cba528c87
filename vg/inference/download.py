"""Download an image with limits on address, size and time, because a URL may come from somebody else."""

from __future__ import annotations

import io
import ipaddress
import os
import socket
import time
import urllib.request
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

from vg.errors import DataError

MAX_SECONDS = 30.0  # redirects included
MAX_BYTES = 100_000_000


class PrivateAddressError(DataError):
    """The host of a URL has an address that is not public."""


def is_url(text: str) -> bool:
    """Return whether a text is an http(s) URL."""
    return text.lower().startswith(("http://", "https://"))


def download(url: str) -> bytes:
    """Return the content of an http(s) URL.

    Hosts with a private, loopback or link-local address are refused, also in redirects, unless the environment variable
    VG_PRIVATE_URLS is set.

    Raises:
        PrivateAddressError: such a host.
        DataError: no answer, an HTTP error, an incomplete answer, more than MAX_BYTES or MAX_SECONDS.
    """
    opener = urllib.request.OpenerDirector()  # unlike that of build_opener, it does not open ftp:, file: and data:
    for name in ("ProxyHandler", "HTTPRedirectHandler", "HTTPDefaultErrorHandler", "HTTPErrorProcessor"):
        opener.add_handler(getattr(urllib.request, name)())
    opener.add_handler(_Handler(_Limits()))
    try:
        with opener.open(url) as response:
            if (response.length or 0) > MAX_BYTES:
                raise URLError(f"{response.length:,} bytes are more than {MAX_BYTES:,}")
            content = b"".join(iter(partial(response.read, 1 << 20), b""))
            if response.length:  # http.client counts down to 0; None if the length is unknown
                raise URLError(f"the answer ends {response.length:,} bytes too early")
            return content
    except PrivateAddressError as error:
        raise PrivateAddressError(f"cannot download the image {url}: {error}") from error
    except (OSError, HTTPException, ValueError, AttributeError) as error:  # the last two: odd URLs and redirects
        reason: Any = error.reason if type(error) is URLError else error
        if isinstance(reason, TimeoutError):
            reason = f"no complete answer within {MAX_SECONDS:g} seconds"
        text = " ".join((str(reason) or repr(reason)).split())[:300]  # the server chooses it
        raise DataError(f"cannot download the image {url}: {text}") from error


class _Limits:
    """The time and the number of bytes that are left for all connections of a download."""

    def __init__(self) -> None:
        self.deadline = time.monotonic() + MAX_SECONDS
        self.num_bytes = MAX_BYTES + (1 << 20)  # headers, and the encoding of chunks

    def seconds(self) -> float:
        """Raises TimeoutError if none are left."""
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError
        return left

    def count(self, num_bytes: int) -> int:
        """Return the argument; raises URLError if these are too many bytes."""
        self.num_bytes -= num_bytes
        if self.num_bytes < 0:
            raise URLError(f"more than {MAX_BYTES:,} bytes")
        return num_bytes


class _Handler(urllib.request.HTTPSHandler):
    """Opens http(s) connections to public addresses and enforces the limits."""

    def __init__(self, limits: _Limits):
        super().__init__()
        self.limits = limits

    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(self._connection, HTTPConnection, request), request)

    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(self._connection, HTTPSConnection, request), request)

    http_request = urllib.request.AbstractHTTPHandler.do_request_

    def _connection(
        self, connection_type: type[HTTPConnection], request: urllib.request.Request, host: str, **_: Any
    ) -> HTTPConnection:
        """The connection of a request; `host` is that of the proxy if one is configured, which may be private."""
        connection: Any = connection_type(host)
        if request.has_proxy() or getattr(request, "_tunnel_host", None):
            target = urlsplit(request.full_url)
            _public_addresses(target.hostname or "", target.port or 0)
            connection._create_connection = lambda address, *_: socket.create_connection(address, self.limits.seconds())
        else:
            connection._create_connection = self._connect
        connection.response_class = partial(_Response, self.limits)
        return connection

    def _connect(self, address: tuple[str, int], *_: Any) -> socket.socket:
        """Connect to an address that was checked: a second look-up of the name may give another one."""
        addresses = _public_addresses(*address)
        for checked in addresses[:-1]:
            try:
                return socket.create_connection(checked, self.limits.seconds() / len(addresses))
            except OSError:
                continue
        return socket.create_connection(addresses[-1], self.limits.seconds())


def _public_addresses(host: str, port: int) -> list[tuple[str, int]]:
    """Look up a host; raises OSError if it does not exist, PrivateAddressError if one of its addresses is private."""
    addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for text in addresses:
        address = ipaddress.ip_address(text)
        address = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
        if not (address.is_global or os.environ.get("VG_PRIVATE_URLS")):
            text = f"{host} has the private address {text}; set the environment variable VG_PRIVATE_URLS=1"
            raise PrivateAddressError(text)
    return [(text, port) for text in addresses]


class _Response(HTTPResponse):
    def __init__(self, limits: _Limits, sock: socket.socket, **options: Any):
        super().__init__(sock, **options)
        self.fp = io.BufferedReader(_Stream(sock, limits))


class _Stream(io.RawIOBase):
    """Reads from a socket. The timeout of the socket would begin again with every byte that a slow server sends."""

    def __init__(self, sock: socket.socket, limits: _Limits):
        self.sock, self.limits = sock, limits
        self.raw = sock.makefile("rb", buffering=0)  # keeps the socket open

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(self.limits.seconds())
        return self.limits.count(self.raw.readinto(buffer) or 0)

    def close(self) -> None:
        self.raw.close()
        super().close()
