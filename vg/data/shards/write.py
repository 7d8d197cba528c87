"""Writes a dataset as shards, in several processes; an interrupted run continues with the first missing shard."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from vg.data.shards.index import INDEX, ROW, Index, ShardFile, ShardFormat, write_rows
from vg.data.shards.job import Record, ShardJob, read_record
from vg.data.shards.storage import UNFINISHED
from vg.data.source import Source
from vg.errors import DataError
from vg.files import read_json, remove, write_json
from vg.settings import differences
from vg.types import Sample

_WAIT = 5.0  # seconds for the workers of a killed process to end


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

    Shards of a complete folder that are missing or truncated are written again.

    Raises:
        BadSampleError: a sample that cannot be used.
        DataError: the dataset cannot be read, or the folder has other files or shards of other settings or annotations.
    """
    if samples_per_shard < 1:
        raise DataError(f"{samples_per_shard} samples per shard: write at least 1")
    folder, dataset = folder.resolve(), with_all_classes(dataset)
    source: Source[Sample] = dataset.build()
    settings = json.loads(
        json.dumps(
            {
                "dataset": differences(dataset),
                "samples": len(source),
                "fingerprint": source.fingerprint(),
                "format": format,
                "samples_per_shard": samples_per_shard,
                "bad_samples": bad_samples,
            }
        )
    )
    lock = folder.with_name(f"{folder.name}.lock")
    with _locked(lock):
        index = _begin(folder, settings)
        damaged = [] if index is None else _damaged(folder, index)
        if index is not None and not damaged:
            remove(lock)
            return index
        job = ShardJob.of(source, folder, format, samples_per_shard, bad_samples == "skip")
        lengths = np.diff(job.ends, prepend=0)  # [shards]
        missing = damaged or [number for number in range(len(lengths)) if read_record(folder, number) is None]
        done = len(source) - int(lengths[missing].sum())
        with tqdm(total=len(source), initial=done, unit=" samples", desc=str(folder), mininterval=1) as progress:
            for number in _written(job, missing, workers):
                progress.update(int(lengths[number]))
        if index is None:
            index = _finish(job, settings)
        else:
            _check_same(folder, index, damaged)
        remove(lock)
        return index


def with_all_classes(dataset: Any) -> Any:
    """Return settings of a dataset whose samples have all its classes, which the reader of the shards may select."""
    if hasattr(dataset, "dataset"):  # one part of a dataset
        return replace(dataset, dataset=with_all_classes(dataset.dataset))
    if getattr(dataset, "vocabulary", None) is None:
        return dataset
    return replace(dataset, vocabulary=replace(dataset.vocabulary, negatives=None, only=None))


def _begin(folder: Path, settings: dict[str, Any]) -> Index | None:
    """Record the settings in a new folder, or compare them with the recorded ones; return the index if complete.

    bad_samples may change from "error" to "skip", because finished shards have no bad samples then.
    """
    index: Index | None = None
    begun = settings
    if (folder / INDEX).exists():
        index = Index.parse((folder / INDEX).read_bytes(), str(folder / INDEX))
        begun = dict(index.settings)
    elif (folder / UNFINISHED).exists():
        begun = read_json(folder / UNFINISHED, dict)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty, and has no shards; give a new folder")
    if begun.get("bad_samples") == "error" and settings["bad_samples"] == "skip":
        begun["bad_samples"] = "skip"
    different = [name for name in settings if begun.get(name) != settings[name]]
    if different == ["fingerprint"]:
        raise DataError(f"the annotations have changed since the shards in {folder} were begun; give a new folder")
    if different:
        changes = ", ".join(f"{name} ({begun.get(name)}, now {settings[name]})" for name in different)
        raise DataError(f"the shards in {folder} were begun with other settings: {changes}; give a new folder")
    if index is None:
        write_json(folder / UNFINISHED, settings)
    else:
        _clean(folder)
    return index


def _damaged(folder: Path, index: Index) -> list[int]:
    """Return the numbers of the shards of a complete folder that are missing or not of their size."""

    def is_damaged(entry: ShardFile) -> bool:
        file = folder / entry.file
        return not file.is_file() or file.stat().st_size != entry.bytes

    if is_damaged(index.table):
        raise DataError(f"{folder / index.table.file} is missing or truncated; copy it again, or give a new folder")
    return [int(Path(entry.file).stem) for entry in index.shards if is_damaged(entry)]


def _check_same(folder: Path, index: Index, numbers: Sequence[int]) -> None:
    """Raise DataError and remove a shard if it was written again, and is not that of the index."""
    known = {entry.file: entry for entry in index.shards}
    for number in numbers:
        record = read_record(folder, number)
        if record is None or known[record.shard.file] != record.shard:
            remove(folder / f"{number:06d}.{index.format}")
            raise DataError(
                f"shard {number} in {folder}, which was damaged, has become another one: images or libraries have "
                "changed since; give a new folder"
            )
    _clean(folder)


_job: ShardJob | None = None  # of a worker process


def _begin_worker(job: ShardJob, parent: int) -> None:
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


def _written(job: ShardJob, numbers: Sequence[int], workers: int) -> Iterator[int]:
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


def _locked(file: Path) -> Any:
    """Lock against other processes that write the same shards, also those whose main process was killed."""
    from filelock import FileLock, Timeout

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:  # the lock would be taken for that of another process
        raise DataError(f"{file.with_suffix('')} cannot be written ({error.strerror}); give another folder") from error
    try:
        return FileLock(file, timeout=_WAIT).acquire()
    except Timeout as error:
        raise DataError(f"another process is writing the shards ({file}); wait for it, or give a new folder") from error


def _finish(job: ShardJob, settings: dict[str, Any]) -> Index:
    """Write the index; from then on the shards are complete."""

    def records() -> Iterator[Record]:
        """Read one by one, because rows of millions of samples are large as Python objects."""
        for number in range(len(job.ends)):
            record = read_record(job.folder, number)
            if record is None:
                raise DataError(f"shard {number} in {job.folder} has vanished; run the same command again")
            yield record

    known = [record._replace(rows=()) for record in records()]
    skipped = sum(record.skipped for record in known)
    length = sum(record.shard.samples for record in known)
    if not length:
        raise DataError(f"{job.provenance}: every sample is bad; the warnings above name the reasons")
    ids = job.source.category_ids
    rows = (np.array([tuple(row) for row in record.rows], ROW) for record in records())
    index = Index(
        format=job.format,
        shards=[record.shard for record in known if record.shard.samples],
        table=write_rows(job.folder, rows, length),
        provenance=replace(job.provenance, official=False) if skipped else job.provenance,
        classes=job.vocabulary.names if job.vocabulary else None,
        category_ids=None if ids is None else list(ids.values()),
        all_detections=sum(record.detections for record in known) == length,
        skipped=skipped,
        settings=settings,
    )
    index.write(job.folder)
    _clean(job.folder)
    return index


def _clean(folder: Path) -> None:
    """Delete what only a continued run needs."""
    for file in (*folder.glob("[0-9]*.json"), folder / UNFINISHED):
        remove(file)
