"""Reads and prepares the next images in threads while the network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np

from vg.errors import BadSampleError
from vg.inference.images import NamedImage

NUM_THREADS = 2

Failed: TypeAlias = Callable[[str, BadSampleError], None]  # receives the name of an image that cannot be used, and why


class Readable(Protocol):
    """An image that is not read yet, such as `vg.inference.images.NamedImage`."""

    @property
    def name(self) -> str: ...

    @property
    def read(self) -> Callable[[], np.ndarray]:
        """-> [H, W, 3] uint8, RGB; raises BadSampleError."""


AnyReadable = TypeVar("AnyReadable", bound=Readable)
Prepare: TypeAlias = Callable[[Sequence[AnyReadable], Sequence[np.ndarray]], Any]  # of images and their pixels


@dataclass
class Ready(Generic[AnyReadable]):
    """A batch whose images are read; iterates over their names and pixels."""

    images: list[AnyReadable] = field(default_factory=list)  # those that can be read
    pixels: list[np.ndarray] = field(default_factory=list)  # [H, W, 3] uint8 each
    bad: list[tuple[AnyReadable, BadSampleError]] = field(default_factory=list)
    prepared: Any = None  # of `prepare`, if there are images

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        return ((image.name, x) for image, x in zip(self.images, self.pixels, strict=True))


def read_ahead(
    images: Iterator[NamedImage],
    batch_size: int,
    prepare: Callable[[Sequence[np.ndarray]], Any] | None,
    failed: Failed | None,
) -> Iterator[Ready[NamedImage]]:
    """Yield the images in their order, at least one at a time.

    Args:
        prepare: makes `Ready.prepared` of the pixels.
        failed: called for an image that cannot be read, which is left out; None raises its BadSampleError.
    """
    batches = iter(lambda: list(islice(images, batch_size)), [])
    for ready in read_batches(batches, (lambda _, pixels: prepare(pixels)) if prepare else None):
        for image, error in ready.bad:
            if failed is None:
                raise error
            failed(image.name, error)
        if ready.images:
            yield ready


def read_batches(
    batches: Iterator[list[AnyReadable]], prepare: Prepare[AnyReadable] | None, threads: int = NUM_THREADS
) -> Iterator[Ready[AnyReadable]]:
    """Yield every batch in order, also one of which no image can be read; `prepare` runs in the threads that read.

    An image whose name is not valid Unicode is one that cannot be read: no result could be written.
    """

    def read(batch: list[AnyReadable]) -> Ready[AnyReadable]:
        ready = Ready[AnyReadable]()
        for image in batch:
            try:
                _check_name(image.name)
                ready.pixels.append(image.read())
                ready.images.append(image)
            except BadSampleError as error:
                ready.bad.append((image, error))
        if prepare and ready.images:
            ready.prepared = prepare(ready.images, ready.pixels)
        return ready

    first = list(islice(batches, threads))
    if len(first) < NUM_THREADS:  # nothing to read while the network runs
        yield from map(read, first)
        return
    with ThreadPoolExecutor(threads, "vg-images") as pool:
        waiting: list[Future[Ready[AnyReadable]]] = [pool.submit(read, batch) for batch in first]
        while waiting:
            done = waiting.pop(0).result()
            waiting += [pool.submit(read, batch) for batch in islice(batches, 1)]
            yield done


def _check_name(name: str) -> None:
    """Raise BadSampleError for a name with surrogates: Python has them in names of files that are not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        escaped = name.encode(errors="backslashreplace").decode()
        raise BadSampleError(f"image {escaped}: its name is not valid Unicode; rename it") from error
