"""Reads and prepares the next images in threads while the network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vg.errors import BadSampleError
from vg.inference.images import NamedImage

NUM_THREADS = 2

Failed: TypeAlias = Callable[[str, BadSampleError], None]  # receives the name of an image that cannot be used, and why


class Ready(NamedTuple):
    """Some images, at least one."""

    names: list[str]
    pixels: list[np.ndarray]  # [H, W, 3] uint8 each
    prepared: Any


Read: TypeAlias = tuple[Ready, list[tuple[str, BadSampleError]]]  # with the images that cannot be read


def read_ahead(
    images: Iterator[NamedImage],
    batch_size: int,
    prepare: Callable[[Sequence[np.ndarray]], Any] | None,
    failed: Failed | None,
) -> Iterator[Ready]:
    """Yield the images in their order.

    Args:
        prepare: makes `Ready.prepared` of the pixels.
        failed: called for an image that cannot be read, which is left out; None raises its BadSampleError.
    """

    def read(batch: list[NamedImage]) -> Read:
        names, pixels, bad = [], [], []
        for image in batch:
            try:
                pixels.append(image.read())
                names.append(image.name)
            except BadSampleError as error:
                bad.append((image.name, error))
        return Ready(names, pixels, prepare(pixels) if prepare and pixels else None), bad

    batches = iter(lambda: list(islice(images, batch_size)), [])
    for ready, bad in _ahead(read, batches):
        for name, error in bad:
            if failed is None:
                raise error
            failed(name, error)
        if ready.names:
            yield ready


def _ahead(read: Callable[[list[NamedImage]], Read], batches: Iterator[list[NamedImage]]) -> Iterator[Read]:
    first = list(islice(batches, NUM_THREADS))
    if len(first) < NUM_THREADS:  # nothing to read while the network runs
        yield from map(read, first)
        return
    with ThreadPoolExecutor(NUM_THREADS, "vg-images") as pool:
        waiting: list[Future[Read]] = [pool.submit(read, batch) for batch in first]
        while waiting:
            done = waiting.pop(0).result()
            waiting += [pool.submit(read, batch) for batch in islice(batches, 1)]
            yield done
