"""The samples of a stream, for a data worker of a process; their position can be saved and restored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from vg.data.augment import Augment
from vg.data.collate import Collator
from vg.data.detection.issues import RaiseFirstError
from vg.data.detection.odvg_lines import LabelMap, read_label_map
from vg.data.detection.vocabulary import Vocabulary
from vg.data.shards.index import INDEX, Index
from vg.data.shards.lines import LineReader
from vg.data.source import checked
from vg.data.stream import KEYS, StreamConfig
from vg.errors import BadSampleError, DataError
from vg.types import Sample

logger = logging.getLogger(__name__)

_EMPTY_PASSES = 100  # of a data worker, one after another: none of the files has rows
_PROBED = 4  # rows that are read to test that a position can be restored


@dataclass(frozen=True)
class Position:
    """How far one data worker has read. The rows of a pass over the stream are shuffled in windows."""

    number_of_pass: int = 0
    window: int = 0  # of this pass
    used: int = 0  # samples of this window that have been used
    rows: dict[str, Any] | None = None  # state of the stream before this window; None at the start of a pass


class StreamDataset(IterableDataset[Sample]):
    """The samples of a stream for one process, without end; its position is saved by `state_dict`.

    Every data worker of every process reads other files. Their order in a pass, and that of the samples in a window,
    depend on the seed; which batch a sample is in depends on the numbers of processes and workers as well.

    Args:
        process, processes: index of this process, and number of all.
        augment, seed, bad_samples, collate: see vg.data.dataset.GroundingDataset.

    Raises:
        DataError: see StreamConfig.open; or the released version of `datasets` cannot continue this stream.
    """

    def __init__(
        self,
        config: StreamConfig,
        process: int = 0,
        processes: int = 1,
        augment: Augment | None = None,
        seed: int = 0,
        bad_samples: Literal["error", "skip"] = "error",
        collate: Collator | None = None,
    ):
        self.config = config
        self.process, self.processes = process, processes
        self.augment, self.seed, self.skip, self.collate = augment, seed, bad_samples == "skip", collate
        label_map = _label_map(config)
        vocabulary = None
        if label_map is not None:
            vocabulary = Vocabulary([name for _, name in label_map.values()], config.vocabulary, str(config))
        self._name = f"the stream {config}"
        self._lines = LineReader("data.train", label_map, vocabulary, config.captions == "whole", clip=True)
        self._rows = config.open()
        self._position = Position()
        self._skipped: set[int] = set()  # hashes of rows
        self.phrases = self._phrases(self._probe())

    @property
    def num_files(self) -> int:
        """Files of the stream, between which processes and data workers are divided."""
        return self._rows.num_shards

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = Position(**state)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        reader = self.process * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        position, without_rows = self._position, 0
        while True:
            begins = position == Position(position.number_of_pass)
            counts = [0, 0]  # rows and usable samples
            for following, sample in self._pass(position, reader):
                counts[0] += 1
                if sample is not None:
                    counts[1] += 1
                    self._position = following
                    yield sample
            if begins and counts[0] and not counts[1]:
                raise DataError(f"{self._name}: every sample is bad; the warnings above name the reasons")
            without_rows = 0 if counts[0] else without_rows + 1  # an empty file is another reader's in the next pass
            if without_rows > _EMPTY_PASSES:
                raise DataError(f"{self._name} has no rows for data worker {reader}: use fewer processes and workers")
            position = Position(position.number_of_pass + 1)

    def _pass(self, position: Position, reader: int) -> Iterator[tuple[Position, Sample | None]]:
        """Yield the samples of a pass from a position on, None for bad ones, with the position after each.

        While a window is used, the next one is read row by row, so that there is no pause between them.
        """
        size, number_of_pass = self.config.window, position.number_of_pass
        dataset = self._of_pass(number_of_pass, position.rows)
        rows = iter(dataset)
        window = self._read(rows, size)
        while window:
            after = dataset.state_dict()
            following = self._read(rows, position.used)
            order = np.random.default_rng((self.seed, number_of_pass, position.window, reader)).permutation(len(window))
            for used in range(position.used, len(window)):
                following += self._read(rows, 1)
                row = int(order[used])
                index = position.window * size + row + (reader << 40)
                yield replace(position, used=used + 1), self._usable(window[row], number_of_pass, index)
            window = following
            position = Position(number_of_pass, position.window + 1, rows=after)

    def _of_pass(self, number_of_pass: int, state: dict[str, Any] | None) -> Any:
        """Return the rows that this process and data worker reads in a pass, from a saved state on."""
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(self._rows, self.process, self.processes)
        rows.set_epoch(1 + number_of_pass + self.seed % 2**40 * 1_000_003)  # 0 would not shuffle the files
        if state is not None:
            rows.load_state_dict(state)
        return rows

    def _read(self, rows: Iterator[Any], count: int) -> list[Any]:
        """Read the next rows, fewer at the end of a pass."""
        try:
            return list(islice(rows, count))
        except Exception as error:  # of the libraries for URLs and formats, of any type
            advice = "; --resume continues it from the last checkpoint" if isinstance(error, OSError) else ""
            raise DataError(f"{self._name} cannot be read ({type(error).__name__}: {error}){advice}") from error

    def _probe(self) -> list[Any]:
        """Return the first rows, after testing that every row follows when the stream is continued after each of them.

        Versions of `datasets` have started from the beginning when a continued stream was continued once more.
        """
        expected = self._read(iter(self._of_pass(0, None)), _PROBED)
        state = None
        for number, row in enumerate(expected):
            rows = self._of_pass(0, state)
            found, state = self._read(iter(rows), 1), rows.state_dict()
            if found != [row]:
                import datasets

                raise DataError(
                    f"datasets {datasets.__version__} cannot continue {self._name} after row {number}: a resumed run "
                    "would repeat or miss samples; install another version of datasets"
                )
        if expected and not any(_image_file(row[self.config.image]) for row in expected):
            raise DataError(
                f"{self._name}: the column {self.config.image} has no image files in its first rows; paths and URLs of "
                "images are not followed"
            )
        return expected

    def _phrases(self, rows: Sequence[Any]) -> list[str]:
        """Return different phrases of some rows."""
        found: dict[str, None] = {}
        for row in rows:
            with suppress(BadSampleError):  # reported, or skipped, where the sample is used
                found |= dict.fromkeys(self._sample(row, 0, 0).phrases)
        return list(found)

    def _usable(self, row: Any, number_of_pass: int, index: int) -> Sample | None:
        try:
            return self._sample(row, number_of_pass, index)
        except BadSampleError as error:
            if not self.skip:
                raise
            if (content := hash(str(row))) not in self._skipped:  # once, not in every pass
                self._skipped.add(content)
                logger.warning("skipped a bad sample: %s", error)
            return None

    def _sample(self, row: Any, number_of_pass: int, index: int) -> Sample:
        """Return the augmented sample of a row; randomness depends on the seed, the pass and the index only."""
        image, line = row[self.config.image], row[self.config.annotation]
        names = [*(row.get(key) for key in reversed(KEYS)), isinstance(image, dict) and image.get("path")]
        where = ", ".join([self._name, *filter(None, names), f"row {index % 2**40} of pass {number_of_pass}"])
        if isinstance(line, str):
            line = line.encode()
        if isinstance(line, bytes):
            line = self._lines.row(line, where)
        if not isinstance(line, dict):
            raise BadSampleError(f"{where}: column {self.config.annotation} is {line!r:.80}, expected JSON text")
        if not (content := _image_file(image)):
            raise BadSampleError(f"{where}: column {self.config.image} has no image file in it")
        sample = self._lines.sample(line, content, where, number_of_pass, index)
        try:
            sample = replace(checked(sample), seed=(self.seed, number_of_pass, index))
        except BadSampleError as error:
            raise BadSampleError(f"{where}: {error}") from error
        if self.augment:
            sample = self.augment(sample, (self.seed, number_of_pass, index))
        if self.skip and self.collate:  # which would raise for the whole batch
            self.collate.texts([sample])
        return sample


def _image_file(cell: Any) -> bytes | None:
    return cell.get("bytes") if isinstance(cell, dict) else None


def _label_map(config: StreamConfig) -> LabelMap | None:
    """Read the classes of numbered labels, also from the index of vg shard."""
    if config.label_map is None:
        return None
    file = Path(config.label_map)
    if file.name != INDEX:
        return read_label_map(config.label_map, RaiseFirstError(str(config)))
    try:
        label_map = Index.parse(file.read_bytes(), str(file)).label_map
    except OSError as error:
        raise DataError(f"label_map {file} cannot be read: {error.strerror}") from error
    if label_map is None:
        raise DataError(f"label_map {file}: these shards have no numbered classes; leave label_map out")
    return label_map
