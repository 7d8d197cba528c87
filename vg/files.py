"""Atomic writes: a file or folder has its old content or its new content, never half of either."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(target: Path, is_file: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `target` if the block succeeds, else `target` stays unchanged.

    Args:
        target: the file or folder to write; missing parent folders are created.
        is_file: yield the path of a file to create instead of an empty folder.
    """
    partial, old = target.with_name(target.name + ".partial"), target.with_name(target.name + ".old")
    try:
        remove(partial)
        (partial.parent if is_file else partial).mkdir(parents=True, exist_ok=is_file)
        yield partial
        if is_file and not target.is_dir():
            partial.replace(target)
            return
        remove(old)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        remove(old)
    except BaseException:
        remove(partial)
        raise


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path, is_file=True) as partial:
        partial.write_bytes(content)


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON atomically."""
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())
