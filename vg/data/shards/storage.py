"""Where shards are: in a folder, or at a URL with a local cache of bounded size that processes share."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import time
from pathlib import Path
from typing import Protocol

from vg.data.shards.download import download
from vg.data.shards.index import INDEX, ShardFile
from vg.errors import DataError
from vg.files import remove, replacing, sha256_of
from vg.machine import size_text

_FIX = "copy it again, or remove it and repeat vg shard"
UNFINISHED = "unfinished.json"  # settings of shards that are being written
_ABANDONED = 3600.0  # seconds after which a partial file has no writer any more; a download writes all the time


class Storage(Protocol):
    """Access to the files of one dataset."""

    def read_index(self) -> bytes:
        """Return the content of index.json; call it first."""

    def file(self, entry: ShardFile) -> Path:
        """Return a local file of this size; it may vanish at any time, but not while it is open."""

    def location(self, entry: ShardFile) -> str:
        """Return what messages call a file, with its local path."""


def open_storage(path: str, cache: str | None, cache_gb: float) -> Storage:
    """Return the storage of shards in a folder or at a URL; it reads nothing yet.

    Args:
        cache: folder for shards of a URL; None for the default one.
        cache_gb: gigabytes (10^9 bytes) of shards that the cache may have.
    """
    return CachedUrl(path, Path(cache or default_cache()), int(cache_gb * 1e9)) if "://" in path else Folder(Path(path))


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vg" / "shards"


class Folder:
    """A local folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_index(self) -> bytes:
        try:
            return (self.path / INDEX).read_bytes()
        except OSError as error:
            if (self.path / UNFINISHED).exists():
                raise DataError(
                    f"the shards in {self.path} are incomplete; run the same vg shard command again"
                ) from error
            fix = "path is a folder that vg shard has written, or its URL"
            raise DataError(f"cannot read {self.path / INDEX}: {error.strerror}; {fix}") from error

    def file(self, entry: ShardFile) -> Path:
        file = self.path / entry.file
        try:
            size = file.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read the shard {file}: {error.strerror}; {_FIX}") from error
        if size != entry.bytes:
            what = "truncated" if size < entry.bytes else "changed"
            raise DataError(
                f"the shard {file} is {what}: it has {size:,} bytes, index.json has {entry.bytes:,}; {_FIX}"
            )
        return file

    def location(self, entry: ShardFile) -> str:
        return str(self.path / entry.file)


class CachedUrl:
    """A URL; files are downloaded as a whole, their checksums are compared, and the least recently used are deleted.

    Args:
        cache: folder for any number of datasets; those with equal index.json share their files.
        limit: bytes of all shards in it.
    """

    def __init__(self, url: str, cache: Path, limit: int) -> None:
        self.url = url.rstrip("/")
        self.cache, self.limit = cache, limit
        self._folder = cache  # of this dataset, once its index is known

    def read_index(self) -> bytes:
        buffer = io.BytesIO()
        download(f"{self.url}/{INDEX}", buffer)
        self._folder = self.cache / hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
        return buffer.getvalue()

    def file(self, entry: ShardFile) -> Path:
        from filelock import FileLock

        file = self._folder / entry.file
        locks = self._folder / "locks"
        try:
            if not _used(file, entry.bytes):
                locks.mkdir(parents=True, exist_ok=True)
                with FileLock(locks / entry.file):  # released if the process ends
                    if not _used(file, entry.bytes):  # else another process was faster
                        self._download(entry, file)
            return file
        except OSError as error:
            raise self._unwritable(error) from error

    def location(self, entry: ShardFile) -> str:
        return f"{self.url}/{entry.file} (its copy is {self._folder / entry.file}, delete it if it is damaged)"

    def _download(self, entry: ShardFile, file: Path) -> None:
        """Download a file; if the disk is full, first delete all shards in the cache."""
        if entry.bytes > self.limit:
            raise DataError(
                f"{self.url}/{entry.file} has {size_text(entry.bytes)}, more than the cache {self.cache} "
                f"may have; set cache_gb to at least {2 * entry.bytes / 1e9:.2g}"
            )
        limits = [self.limit - entry.bytes, 0]
        for limit in limits:
            self._evict(limit)
            try:
                self._download_once(entry, file)
                return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or limit == limits[-1]:
                    raise

    def _download_once(self, entry: ShardFile, file: Path) -> None:
        url = f"{self.url}/{entry.file}"
        with replacing(file, is_file=True) as partial, partial.open("wb") as opened:
            for _ in range(2):  # damaged on the way, or at its origin
                download(url, opened, entry.bytes)
                opened.flush()
                if sha256_of(partial) == entry.sha256:
                    return
            raise DataError(f"{url} is damaged: its SHA-256 is not that of index.json; copy it there again")

    def _evict(self, limit: int) -> None:
        """Delete the least recently used shards until those in the cache have at most `limit` bytes.

        Processes that read them keep them open. Downloads of other processes count with their present size.
        """
        from filelock import FileLock

        with FileLock(self.cache / "evict.lock"):
            found = []
            for file in self.cache.glob("*/*"):
                try:
                    status = file.stat()
                except FileNotFoundError:  # another process has renamed it
                    continue
                if file.suffix == ".partial" and time.time() - status.st_mtime > _ABANDONED:
                    remove(file)
                elif file.suffix in (".tar", ".parquet", ".partial"):
                    found.append((status.st_mtime, status.st_size, file))
            total = sum(size for _, size, _ in found)
            for _, size, file in sorted(found):
                if total <= limit:
                    break
                if file.suffix != ".partial":
                    file.unlink(missing_ok=True)
                    total -= size

    def _unwritable(self, error: OSError) -> DataError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DataError(
                f"the disk of the cache {self.cache} is full ({error.strerror or error}); free space, or set cache to "
                "a folder on another disk"
            )
        return DataError(f"the cache {self.cache} cannot be used ({error}); set cache to a folder that can be written")


def _used(file: Path, size: int) -> bool:
    """Mark a file as used; return whether it exists, with all its bytes."""
    try:
        os.utime(file)
        return file.stat().st_size == size
    except FileNotFoundError:
        return False
