"""Writes a dataset as shards, in several processes; an interrupted run continues with the first missing shard."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from vg.data.images import read_image
from vg.data.shards.containers import Entry, write_shard
from vg.data.shards.index import INDEX, ROW, Index, ShardFile, ShardFormat, write_index
from vg.data.shards.lines import line_of
from vg.data.shards.storage import UNFINISHED
from vg.data.source import HasCategoryIds, HasFingerprint, HasImageFiles, HasImageGroups, Source, checked
from vg.errors import BadSampleError, DataError
from vg.files import read_json, remove, write_json
from vg.settings import differences
from vg.types import Sample

logger = logging.getLogger(__name__)

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}  # by format of PIL


def write_shards(
    dataset: Any,
    folder: Path,
    format: ShardFormat = "tar",
    samples_per_shard: int = 1000,
    workers: int = 0,
    bad_samples: Literal["error", "skip"] = "error",
) -> Index:
    """Write the samples of epoch 0 of a dataset, with all its classes.

    The order is that of the dataset, except that samples of one image are neighbors in one shard.

    Args:
        dataset: settings of one dataset.
        folder: a new or empty folder, or one in which the same call was interrupted.
        samples_per_shard: more where samples of one image are not separated.
        workers: processes that write shards; 0 writes them in this one.
        bad_samples: "skip" logs, counts and leaves out unusable samples.

    Raises:
        BadSampleError: a sample that cannot be used.
        DataError: the dataset cannot be read, or the folder has other files or shards of other settings.
    """
    if samples_per_shard < 1:
        raise DataError(f"{samples_per_shard} samples per shard: write at least 1")
    dataset = with_all_classes(dataset)
    source: Source[Sample] = dataset.build()
    settings = json.loads(
        json.dumps(
            {
                "dataset": differences(dataset),
                "samples": len(source),
                "fingerprint": source.fingerprint() if isinstance(source, HasFingerprint) else None,
                "format": format,
                "samples_per_shard": samples_per_shard,
                "bad_samples": bad_samples,
            }
        )
    )
    if (index := _begin(folder, settings)) is not None:
        return index
    job = _Job.of(source, folder, format, samples_per_shard, bad_samples == "skip")
    with _locked(folder):
        records = [_record(folder, number) for number in range(len(job.ends))]
        done = sum(record["read"] for record in records if record)
        with tqdm(total=len(source), initial=done, unit=" samples", desc=str(folder), mininterval=1) as progress:
            for number in _written(job, [number for number, record in enumerate(records) if not record], workers):
                record = _record(folder, number)
                assert record is not None, "it was written"
                records[number] = record
                progress.update(record["read"])
        return _finish(job, settings, [record for record in records if record])


def with_all_classes(dataset: Any) -> Any:
    """Return settings of a dataset whose samples have all its classes, which the reader of the shards may select."""
    if hasattr(dataset, "dataset"):  # one part of a dataset
        return replace(dataset, dataset=with_all_classes(dataset.dataset))
    if not hasattr(dataset, "vocabulary"):
        return dataset
    return replace(dataset, vocabulary=replace(dataset.vocabulary, negatives=None, only=None))


def _begin(folder: Path, settings: dict[str, Any]) -> Index | None:
    """Record the settings in a new folder, or compare them with the recorded ones; return the index if complete."""
    begun = None
    if (folder / INDEX).exists():
        index = Index.parse((folder / INDEX).read_bytes(), str(folder / INDEX))
        begun = dict(index.settings)
    elif (folder / UNFINISHED).exists():
        index, begun = None, read_json(folder / UNFINISHED, dict)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty, and has no shards; give a new folder")
    if begun is None:
        write_json(folder / UNFINISHED, settings)
        return None
    if different := [name for name in settings if begun.get(name) != settings[name]]:
        changes = ", ".join(f"{name} ({begun.get(name)}, now {settings[name]})" for name in different)
        raise DataError(f"the shards in {folder} were begun with other settings: {changes}; give a new folder")
    return index


@dataclass
class _Job:
    """What the processes need to write any shard."""

    source: Source[Sample]
    classes: Sequence[str] | None
    phrases: tuple[str, ...] | None  # those of a sample of numbered classes
    folder: Path
    format: ShardFormat
    skip: bool
    order: np.ndarray  # [samples] index in the source
    images: np.ndarray  # [samples] number of the image, ascending
    ends: np.ndarray  # [shards] index in `order` after the last sample
    files: Sequence[Path | None]  # [samples in the source] image files

    @classmethod
    def of(cls, source: Source[Sample], folder: Path, format: ShardFormat, limit: int, skip: bool) -> _Job:
        groups = source.image_groups(0) if isinstance(source, HasImageGroups) else np.arange(len(source))
        _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
        images = np.argsort(np.argsort(first))[inverse]  # numbered by their first sample
        order = np.argsort(images, kind="stable")
        images = images[order]
        image_ends = np.append(np.flatnonzero(np.diff(images)) + 1, len(images))
        ends = [0]
        while ends[-1] < len(images):
            wanted = min(ends[-1] + limit, len(images))
            last = int(image_ends[np.searchsorted(image_ends, wanted, side="right") - 1])
            ends.append(last if last > ends[-1] else int(image_ends[np.searchsorted(image_ends, wanted)]))
        vocabulary = getattr(getattr(source, "source", source), "vocabulary", None)
        return cls(
            source=source,
            classes=vocabulary and vocabulary.names,
            phrases=vocabulary and vocabulary.phrases,
            folder=folder,
            format=format,
            skip=skip,
            order=order,
            images=images,
            ends=np.array(ends[1:], np.int64),
            files=source.image_files() if isinstance(source, HasImageFiles) else [None] * len(source),
        )

    def write(self, number: int) -> int:
        """Write a shard, and then its record, which marks it as finished."""
        start = int(self.ends[number - 1]) if number else 0
        positions = range(start, int(self.ends[number]))
        counts = {"read": len(positions), "skipped": 0, "detections": 0}
        shard, rows = write_shard(
            self.folder / f"{number:06d}.{self.format}", self.format, self._entries(positions, counts)
        )
        write_json(_record_file(self.folder, number), {"shard": shard, "rows": rows.tolist(), **counts})
        return number

    def _entries(self, positions: range, counts: dict[str, int]) -> Iterator[Entry]:
        last: tuple[int, bytes, str] = (-1, b"", "")
        for position in positions:
            index, image = int(self.order[position]), int(self.images[position])
            try:
                sample = self.source.load(index, 0)
                checked(sample)
                if image != last[0]:
                    last = image, *image_file(sample.image, self.files[index])
                file, is_detection = self.files[index], sample.phrases is self.phrases
                key = f"{position:010d}"
                filename = file.name if file else key + last[2]
                line = line_of(sample, filename, self.classes if is_detection else None)
            except BadSampleError as error:
                if not self.skip:
                    raise
                logger.warning("skipped a bad sample: %s", error)
                counts["skipped"] += 1
                continue
            counts["detections"] += is_detection
            yield Entry(key, sample.id, last[1], last[2], line, sample.image.shape[:2], image)


def image_file(image: np.ndarray, file: Path | None) -> tuple[bytes, str]:
    """Return the bytes and the suffix of an image file with these pixels.

    Args:
        image: [H, W, 3] uint8, RGB.
        file: its file, which is used unless it is decoded differently (orientation) or is in an uncommon format. PNG
            otherwise.
    """
    if file is not None and file.is_file():
        content = file.read_bytes()
        with Image.open(BytesIO(content)) as opened:
            suffix = SUFFIXES.get(opened.format or "")
        if suffix and np.array_equal(read_image(content, str(file)), image):
            return content, suffix
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue(), ".png"


def _record_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


def _record(folder: Path, number: int) -> dict[str, Any] | None:
    """Return what is known about a finished shard; None if it is not finished, or its file is not of that size."""
    try:
        record = read_json(_record_file(folder, number), dict)
        record["shard"] = ShardFile(*record["shard"])
        return record if (folder / record["shard"].file).stat().st_size == record["shard"].bytes else None
    except (OSError, KeyError, TypeError):
        return None


_job: _Job | None = None  # of a worker process


def _begin_worker(job: _Job, parent: int) -> None:
    """Take the job; end with the parent, which alone reacts to stop signals from a terminal."""
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_in_worker(number: int) -> int:
    assert _job is not None, "_begin_worker has run"
    return _job.write(number)


def _written(job: _Job, numbers: Sequence[int], workers: int) -> Iterator[int]:
    """Write shards, and yield the number of each when it is finished."""
    if not workers:
        yield from map(job.write, numbers)
        return
    context = multiprocessing.get_context("fork" if os.name == "posix" else None)  # shares the source
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (job, os.getpid()))
    try:
        for future in as_completed([pool.submit(_write_in_worker, number) for number in numbers]):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process has died, probably of too little memory; use fewer --workers, and run the same command "
            "again: finished shards are kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _locked(folder: Path) -> Any:
    """Lock a folder against other processes that write shards, also those whose main process was killed."""
    from filelock import FileLock, Timeout

    try:
        return FileLock(folder / ".lock", timeout=5).acquire()
    except Timeout as error:
        raise DataError(f"another process is writing shards to {folder}; wait for it, or give a new folder") from error


def _finish(job: _Job, settings: dict[str, Any], records: Sequence[dict[str, Any]]) -> Index:
    """Write the index, and delete what only a continued run needs."""
    source = job.source
    skipped = sum(record["skipped"] for record in records)
    length = sum(record["shard"].samples for record in records)
    if not length:
        raise DataError(f"{source.provenance}: every sample is bad; the warnings above name the reasons")
    inner = getattr(source, "source", source)
    ids = list(inner.category_ids.values()) if isinstance(inner, HasCategoryIds) else None
    index = write_index(
        job.folder,
        job.format,
        [(record["shard"], np.array([tuple(row) for row in record["rows"]], ROW)) for record in records],
        replace(source.provenance, official=False) if skipped else source.provenance,
        job.classes,
        ids,
        sum(record["detections"] for record in records) == length,
        skipped,
        settings,
    )
    for number in range(len(records)):
        remove(_record_file(job.folder, number))
    remove(job.folder / UNFINISHED)
    return index
