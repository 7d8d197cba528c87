"""The images of a source and their files: whether an image is still the one whose features are cached."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vg.data.source import Source
from vg.files import sha256_of

NO_FILE = [-1, -1, -1]  # identity of an image that is not a file


class Changes(NamedTuple):
    """Indices of images."""

    changed: list[int]
    touched: list[int]  # their files have another time, but the same content
    missing: list[int]  # nothing can be compared, because there is no file


def image_indices(source: Source, keys: Sequence[str] | None = None) -> np.ndarray:
    """Return the index of the image of each sample, in order of first occurrence: [samples] int.

    Args:
        keys: the image keys of the source, if they are known already.
    """
    keys = source.image_keys() if keys is None else keys
    if keys is None:
        return np.arange(len(source))
    indices: dict[str, int] = {}
    return np.array([indices.setdefault(key, len(indices)) for key in keys], np.int64)


def files_of(source: Source, images: np.ndarray) -> list[Path | None]:
    """Return the file of each image, None if it is not one; `images` [samples] as by image_indices."""
    first = np.unique(images, return_index=True)[1].tolist()  # [images] a sample of each
    files = source.image_files()
    return [files[sample] for sample in first]


def identity(file: Path | None) -> list[int]:
    """Return the size of a file in bytes, its time of modification in ns, and a digest; zeros if it is missing."""
    if file is None:
        return NO_FILE
    try:
        stat = file.stat()  # first: a file that is replaced meanwhile has another time
        return [stat.st_size, stat.st_mtime_ns, _digest(file)]
    except OSError:
        return [0, 0, 0]


def changed_images(files: Sequence[Path | None], stored: Sequence[Sequence[int]] | np.ndarray) -> Changes:
    """Compare files with their stored identities; one is unchanged if its size and time, or size and digest, agree."""
    changes = Changes([], [], [])
    compared = []
    for image, (file, (size, time, digest)) in enumerate(zip(files, np.asarray(stored).tolist(), strict=True)):
        if file is None or size < 0:
            continue
        try:
            stat = os.stat(file)
        except OSError:
            changes.missing.append(image)
            continue
        if stat.st_size != size:
            changes.changed.append(image)
        elif stat.st_mtime_ns != time:
            compared.append((image, file, digest))
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_digest, [file for _, file, _ in compared]))
    for (image, _, stored_digest), digest in zip(compared, digests, strict=True):
        (changes.touched if digest == stored_digest else changes.changed).append(image)
    changes.changed.sort()
    return changes


def _digest(file: Path) -> int:
    """Return 56 bits of a digest of the whole file: equal heads do not make equal images, as in BMP."""
    return int(sha256_of(file)[:14], 16)
