"""Atomic writes: a file or folder has its old or its new content, never half of either, also after a power loss.

A power loss or kill between the two renames that replace a folder leaves its old content in a folder of the same name
with the suffix .old.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from vg.errors import closest

T = TypeVar("T")
MOST_LISTED = 8  # names of a folder in a message


def similar_paths(path: str | Path) -> str:
    """Return advice for a path that does not exist: similar names in its folder, or all of them; "" without any."""
    parent = Path(path).parent
    try:
        names = sorted(name for name in os.listdir(parent) if not name.startswith("."))
    except OSError:
        return ""
    if near := closest(Path(path).name, names, limit=3, cutoff=0.6):
        return f"did you mean {' or '.join(str(parent / name) for name in near)}?"
    if not names or parent == Path():
        return ""
    return f"{parent} contains {', '.join(names[:MOST_LISTED])}{', ...' * (len(names) > MOST_LISTED)}"


def refuse_special(path: Path) -> Path:
    """Return the path of a file or folder, or one that does not exist; raise OSError for a device or a named pipe.

    Reading those would wait, or never end.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return path


@contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Yield whether no other process is within this context, which ends with the process at the latest.

    A second context in the same process is not refused, and the end of either is the end of both.
    Always true where there are no locks, as on Windows and some network file systems.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    with file.open("a") as opened:
        is_free = True
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which forked data workers do not inherit, unlike flock
        except OSError as error:
            is_free = error.errno not in (errno.EACCES, errno.EAGAIN)
        try:
            yield is_free
        finally:
            if is_free:
                file.unlink(missing_ok=True)


def located(path: Path) -> str:
    """Return a path for an error message; a relative one with the folder that it is relative to."""
    return str(path) if path.is_absolute() else f"{path} (relative to {Path.cwd()}, where the command runs)"


def read_text(path: Path) -> str:
    """Read UTF-8 with or without a byte order mark; raises OSError, also for other encodings and special files."""
    try:
        return refuse_special(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"Not encoded in UTF-8 ({error})", str(path)) from error


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file whose content is a `kind`, such as a dict; raises OSError for anything else, see `read_text`."""
    try:
        value = json.loads(refuse_special(path).read_bytes())  # in UTF-8, UTF-16 or UTF-32
    except (ValueError, RecursionError) as error:
        raise OSError(errno.EILSEQ, f"Not JSON ({error})", str(path)) from error
    if not isinstance(value, kind):
        raise OSError(errno.EILSEQ, f"Not a JSON {kind.__name__}", str(path))
    return value


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield number (from 1), first byte and content of each line that is not blank; raises OSError."""
    start = 0
    with refuse_special(path).open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield number, start, text
            start += len(text)


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def replacing(target: Path, is_file: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `target` if the block succeeds, else `target` stays unchanged.

    A folder is replaced in two renames: see above for what a power loss between them leaves.

    Args:
        target: the file or folder to write; missing parent folders are created.
        is_file: yield the path of a file to create instead of an empty folder.

    Raises:
        OSError: a file is to be written, but `target` is a folder, or the reverse; or writing failed: it names `target`
            if the system named no file, as for a full disk.
    """
    if target.exists() and target.is_dir() == is_file:
        problem = (errno.EISDIR, "Is a folder; name a file") if is_file else (errno.ENOTDIR, "Is a file; name a folder")
        raise OSError(*problem, str(target))
    partial, old = target.with_name(target.name + ".partial"), target.with_name(target.name + ".old")
    # A rename is on the disk once its folder is, and a new folder once its parent is.
    folders = [target.parent, *(folder.parent for folder in target.parents if not folder.exists())]
    try:
        remove(partial)
        (partial.parent if is_file else partial).mkdir(parents=True, exist_ok=is_file)
        yield partial
        sync(partial)
        if is_file:
            partial.replace(target)
        else:
            try:
                if target.exists():
                    remove(old)
                    target.rename(old)
                partial.rename(target)
            except BaseException:
                if old.exists() and not target.exists():
                    old.rename(target)
                raise
        for folder in folders:
            _sync_one(folder)
        remove(old)
    except BaseException as error:
        remove(partial)
        if isinstance(error, OSError) and error.filename is None:
            failure = OSError(f"{error}: {str(target)!r}")
            failure.errno = error.errno
            raise failure from error
        raise


def sync(path: Path) -> None:
    """Write a file, or a folder with all its contents, from the caches of the system to the disk."""
    for child in path.rglob("*"):
        _sync_one(child)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name != "posix":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path, is_file=True) as partial:
        partial.write_bytes(content)


def write_shared(path: Path, content: bytes, replace: bool = True) -> None:
    """Write a file atomically that other processes, also of other machines, may write at the same time.

    Args:
        replace: False keeps a file that is already there.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")  # one that no other process writes
    try:
        partial.write_bytes(content)
        _sync_one(partial)
        if replace:
            partial.replace(path)
        else:
            try:
                os.link(partial, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links, where the last of two processes may win
                if not path.exists():
                    partial.replace(path)
        _sync_one(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON atomically."""
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())
