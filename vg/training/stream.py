"""Training batches from a stream, which has no length: torchdata's StatefulDataLoader keeps the position."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from vg.config import RunConfig
from vg.data.collate import Collator
from vg.data.stream import StreamConfig
from vg.data.stream_samples import StreamDataset
from vg.errors import CheckpointError, ConfigError
from vg.models.base import GroundingModel
from vg.workers import new_loader

logger = logging.getLogger(__name__)


class StreamedData:
    """The training batches of a run from a stream, for each process; see vg.training.data.TrainingData.

    An epoch is a number of samples (`data.train.samples`); the next one continues where it ends.

    Raises:
        ConfigError: torchdata is not installed.
        DataError: see vg.data.stream_samples.StreamDataset.
    """

    num_classes = None  # of all prompts; lines with captions may follow
    source = None  # lists all samples

    def __init__(self, config: RunConfig, model: GroundingModel, accelerator: Accelerator):
        try:
            from torchdata.stateful_dataloader import StatefulDataLoader
        except ImportError as error:
            raise ConfigError("data.train.name=stream needs the package torchdata: pip install torchdata") from error
        data, stream = config.data, config.data.train
        assert isinstance(stream, StreamConfig)
        self.accelerator = accelerator
        self.accumulate = config.train.accumulate
        count = accelerator.num_processes
        self.samples_per_step = data.batch_size * count * self.accumulate
        self.size = stream.samples
        collate = Collator(model.image_spec, model.text_spec, one_prompt=True, normalize=False)
        process, augment = accelerator.process_index, data.augment.build()
        dataset = StreamDataset(stream, process, count, augment, config.train.seed, data.bad_samples, collate)
        files = dataset.num_files if dataset.num_files % count else dataset.num_files // count  # of a process
        workers = min(data.workers, files)
        if workers < data.workers and accelerator.is_main_process:
            logger.warning("data.workers=%d, but each process has %d files: %d are used", data.workers, files, workers)
        if dataset.num_files % count and accelerator.is_main_process:
            logger.warning(
                "%s has %d files for %d processes: every process reads all of them and leaves out the rows of the "
                "others; a multiple of %d files would be read once",
                *(stream, dataset.num_files, count, count),
            )
        self.readers = {"processes": count, "workers": workers, "files": dataset.num_files}
        read = [stream.path, stream.data_files, stream.subset, stream.split, stream.revision, stream.window]
        self.order = json.dumps([*read, stream.image, stream.annotation, config.train.seed])  # what it depends on
        self.phrases = dataset.phrases
        self.description = f"samples of the stream {stream} ({stream.split})"
        self.plan = "images of the stream that are also in the evaluation data are not detected"
        self.loader: Any = new_loader(
            dataset,
            workers,
            StatefulDataLoader,
            batch_size=data.batch_size,
            collate_fn=collate,
            pin_memory=accelerator.device.type == "cuda",
        )
        self._batches: Iterator[Any] | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.size // self.samples_per_step)

    def steps(self, epoch: int, done: int) -> Iterator[list[Any]]:
        """Yield the batches of each remaining step of an epoch, of which `done` samples have been used before."""
        if self._batches is None:
            self._batches = iter(self.loader)
        device = self.accelerator.device
        for _ in range(max(0, self.steps_per_epoch - done // self.samples_per_step)):
            batches = list(islice(self._batches, self.accumulate))
            yield [batch.to(device, non_blocking=device.type != "mps") for batch in batches]

    def state(self) -> dict[str, Any] | None:
        """Return the positions of all processes for a checkpoint; all of them must call it."""
        if self._batches is None:
            return self._restored
        positions = gather_object([self.loader.state_dict()])
        return {"readers": self.readers, "order": self.order, "positions": positions}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from a saved state.

        Raises:
            CheckpointError: it is of another stream, processes or data workers, or of data that is no stream.
        """
        if state is None:
            raise CheckpointError(
                "the run to resume did not read a stream; train a new one that starts from its weights "
                "(train.output=ANOTHER_FOLDER model.weights=RUN/best)"
            )
        if state["readers"] != self.readers:
            raise CheckpointError(
                f"the run to resume read its stream with {_counts(state['readers'])}, now there are "
                f"{_counts(self.readers)}: every data worker continues where it was, so use the same processes, "
                "data.workers and files"
            )
        if state["order"] != self.order:
            raise CheckpointError(
                "the run to resume read another stream, or with another window or train.seed: it had "
                f"{state['order'][:500]}, now it is {self.order[:500]}"
            )
        self._restored = state
        self.loader.load_state_dict(state["positions"][self.accelerator.process_index])


def _counts(readers: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in readers.items())
