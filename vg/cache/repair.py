"""Finds the files of a cache that are damaged or stale and removes them, so that `vg cache` writes them again."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vg.cache.format import INDEX, CacheFolder, read_index, read_records, read_shard, verify, write_records
from vg.cache.images import changed_images, identity
from vg.errors import CacheError

logger = logging.getLogger(__name__)


def discard_invalid(folder: CacheFolder) -> None:
    """Read all files of a cache and remove those that cannot be used; the index is removed if any of them is.

    The index is also removed if features of text are needed but it has no entries of them.

    The features of images are removed if they are damaged, or if an image of the same shard has changed. An image with
    another time of modification but the same content gets the new time.
    """
    index: dict[str, np.ndarray] | None = None
    problems: list[CacheError] = []
    if (folder.path / INDEX).exists():
        try:
            index = read_index(folder.path)
        except CacheError as error:
            problems.append(error)
    image_shards = [n for n in range(len(folder.shards)) if index is not None or folder.image_records(n).exists()]
    ends = index.get("ends", ()) if index is not None and folder.has_text else ()
    text_shards = range(len(folder.text_shards(len(ends))))
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda shard: _check_images(folder, shard), image_shards))
        found += list(pool.map(lambda shard: _check_texts(folder, shard, index or {}), text_shards))
    problems += [problem for problem in found if isinstance(problem, CacheError)]
    for problem in problems:
        logger.warning("%s", problem)
    if problems or "touched" in found or (folder.has_text and len(ends) == 0):
        (folder.path / INDEX).unlink(missing_ok=True)


def _check_images(folder: CacheFolder, shard: int) -> CacheError | str | None:
    """Return what was wrong with an image shard, or "touched" if only times of its images were."""
    path, features, images = folder.image_records(shard), folder.image_features(shard), folder.shards[shard]
    files = folder.files[images.start : images.stop]
    try:
        records: list[dict[str, Any]] = read_records(path)
        array = read_shard(features, len(images) * folder.num_views)  # [images x V, S, D]
        checksums = [value for record in records for value in record["checksums"]]
        for row, checksum in zip(array, checksums, strict=True):
            verify(row, checksum, features)
        stored = [record["file"] for record in records]
        changes = changed_images([None] * len(files) if folder.trust else files, stored)
        if changes.changed:
            names = ", ".join(str(files[image]) for image in changes.changed)
            raise CacheError(f"{names} changed after {features} was written, which is written again")
    except CacheError as error:
        path.unlink(missing_ok=True)
        features.unlink(missing_ok=True)
        return error
    for image in changes.touched:
        records[image]["file"] = identity(files[image])
    if changes.touched:
        write_records(path, records)
    return "touched" if changes.touched else None


def _check_texts(folder: CacheFolder, shard: int, index: dict[str, np.ndarray]) -> CacheError | None:
    """Return what was wrong with a text shard."""
    path, texts = folder.text_features(shard), folder.text_shards(len(index["ends"]))[shard]
    ends = np.concatenate([[0], index["ends"]])[texts.start : texts.stop + 1]  # first token of each, and the end
    try:
        array = read_shard(path, int(ends[-1] - ends[0]))  # [tokens, D]
        checksums = index["text_checksums"][texts.start : texts.stop]
        for row, checksum in zip(np.split(array, ends[1:-1] - ends[0]), checksums.tolist(), strict=True):
            verify(row, checksum, path)
        return None
    except CacheError as error:
        folder.text_records(shard).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return error
