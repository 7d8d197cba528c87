"""Download of a file from any URL of fsspec, with timeouts and retries, because storage services fail now and then."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Generator
from contextlib import closing
from typing import BinaryIO

from vg.errors import DataError

logger = logging.getLogger(__name__)

TIMEOUT = 60.0  # seconds for a chunk
ATTEMPTS = 5
BACKOFF = 1.0  # seconds before the second attempt, doubled before each further one
_CHUNK = 4 << 20  # bytes; much smaller requests are slow, and fsspec may read as much ahead


class _WriteError(Exception):
    """The file cannot be written, for the OSError in its argument."""


def download(url: str, file: BinaryIO, size: int | None = None) -> None:
    """Write the content of a URL to an empty file.

    Args:
        size: its number of bytes, if known.

    Raises:
        DataError: the URL does not exist, its protocol cannot be used, or ATTEMPTS attempts failed.
        OSError: the file cannot be written.
    """
    for attempt in range(1, ATTEMPTS + 1):
        file.seek(0)
        file.truncate()
        try:
            _copy(url, file, size)
            return
        except _WriteError as error:
            raise error.args[0] from None
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(f"{url} cannot be read ({type(error).__name__}: {error}); copy it there again") from error
        except (ImportError, ValueError) as error:  # of fsspec
            raise DataError(f"{url} cannot be opened: {error}") from error
        except Exception as error:  # every file system raises errors of its own
            reason = f"{type(error).__name__}: {error}"
            if attempt == ATTEMPTS:
                raise DataError(
                    f"{url} cannot be read after {ATTEMPTS} attempts ({reason}); check the connection and start again"
                ) from error
            wait = BACKOFF * 2 ** (attempt - 1)
            logger.warning("%s: %s; attempt %d of %d in %g s", url, reason, attempt + 1, ATTEMPTS, wait)
            time.sleep(wait)


def _copy(url: str, file: BinaryIO, size: int | None) -> None:
    count = 0
    with closing(_chunks(url)) as chunks:
        for chunk in chunks:
            count += len(chunk)
            if size is not None and count > size:
                raise EOFError(f"more than {size} bytes")
            try:
                file.write(chunk)
            except OSError as error:
                raise _WriteError(error) from error
    if size is not None and count < size:
        raise EOFError(f"{count} of {size} bytes")


def _chunks(url: str) -> Generator[bytes, None, None]:
    """Yield the content of a URL; raises TimeoutError if a chunk takes more than TIMEOUT seconds.

    A thread reads, because a call that hangs cannot be interrupted; it is abandoned then.
    """
    chunks: queue.Queue[bytes | BaseException] = queue.Queue(maxsize=4)
    stopped = threading.Event()

    def read() -> None:
        try:
            import fsspec

            with fsspec.open(url, "rb") as opened:
                while not stopped.is_set() and (chunk := opened.read(_CHUNK)):
                    chunks.put(chunk)
            chunks.put(b"")
        except BaseException as error:
            chunks.put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            try:
                chunk = chunks.get(timeout=TIMEOUT)
            except queue.Empty:
                raise TimeoutError(f"less than {_CHUNK >> 20} MiB in {TIMEOUT:g} s") from None
            if isinstance(chunk, BaseException):
                raise chunk
            if not chunk:
                return
            yield chunk
    finally:
        stopped.set()
        while not chunks.empty():  # else the thread would wait for ever
            chunks.get()
