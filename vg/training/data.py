"""Training batches: those of every optimizer step, the same in every run of a configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader

from vg.cache.resident import ResidentFeatures, resident_features
from vg.config import RunConfig
from vg.data.samplers import AspectRatioGroupedSampler, EpochSampler, ImageGroupedSampler
from vg.data.source import Source
from vg.data.stream import StreamConfig
from vg.datasets import training_dataset, uncached_text
from vg.errors import CheckpointError, DataError
from vg.models.base import GroundingModel
from vg.training.stream import StreamedData
from vg.types import Sample
from vg.workers import new_loader

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 3  # phrases of a dataset


class TrainingData:
    """The training batches of a run, epoch by epoch, for each process.

    Args:
        evaluations: evaluation sources of the run; images shared with them cause a warning or are dropped.

    Raises:
        ConfigError, CacheError: see vg.datasets.training_dataset and vg.cache.resident.resident_features.
        DataError: no training sample is left, or the source cannot group its samples as configured.
    """

    def __init__(
        self, config: RunConfig, model: GroundingModel, accelerator: Accelerator, evaluations: Sequence[Source]
    ):
        data = config.data
        self.accelerator = accelerator
        self.accumulate = config.train.accumulate
        self.dataset = training_dataset(config, model, evaluations)
        self.plan = ""  # a sentence on where the features are
        if data.cache:
            self.dataset, self.plan = resident_features(self.dataset, data.cache, accelerator, uncached_text(model))
        resident = isinstance(self.dataset, ResidentFeatures)  # no data workers, and nothing to copy to the device
        workers = 0 if resident else data.workers
        needed = data.batch_size * accelerator.num_processes
        self.samples_per_step = needed * config.train.accumulate
        self.size = len(self.dataset)  # samples
        self.sampler = training_sampler(config, self.source, accelerator.num_processes)
        if self.size < needed and accelerator.num_processes > 1 and accelerator.is_main_process:
            logger.warning(
                "%d training samples are less than one batch (data.batch_size=%d) for each of %d processes: samples "
                "are repeated in every step; use fewer processes or a smaller batch size",
                *(self.size, data.batch_size, accelerator.num_processes),
            )
        loader = new_loader(
            self.dataset,
            workers,
            batch_size=data.batch_size,
            sampler=self.sampler,
            collate_fn=self.dataset.collate,
            drop_last=self.size >= needed,
            pin_memory=accelerator.device.type == "cuda" and not resident,
            persistent_workers=workers > 0,
        )
        self.loader: DataLoader[Any] = accelerator.prepare_data_loader(loader, device_placement=not resident)

    @property
    def source(self) -> Source[Any]:
        return self.dataset.source

    @property
    def num_classes(self) -> int | None:
        """Number of phrases of every prompt; None if it differs."""
        return self.source.num_classes

    @property
    def phrases(self) -> list[str]:
        """Examples."""
        return example_phrases(self.source)

    @property
    def description(self) -> str:
        return describe_source(self.source)

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.size // self.samples_per_step)

    def steps(self, epoch: int, done: int) -> Iterator[list[Any]]:
        """Yield the batches (Batch or EncodedBatch) of each remaining step of an epoch.

        A step takes the next `samples_per_step` samples of the order of the epoch, which depends on the seed and the
        source only (with `data.group_by_aspect_ratio` also on `samples_per_step`). Process `i` has the batches i,
        i + processes, ... of them: with the same batch size, the batches of a step have the same samples for any number
        of processes and data workers. The samples after the last whole step, others in every epoch, are left out. If
        all data is less than one step, an epoch is one step of full batches, or of at least one batch per process.

        Args:
            done: samples of this epoch that all processes together have used before.
        """
        num_steps = max(0, self.size - done) // self.samples_per_step
        stop = done + num_steps * self.samples_per_step if num_steps or done else self.size
        self.dataset.begin_epoch(epoch)
        self.sampler.begin_epoch(epoch, done, stop)
        batches = iter(self.loader)
        while step := list(islice(batches, self.accumulate)):
            yield step

    def state(self) -> None:
        """Nothing: the number of samples that have been used is the position; see StreamedData."""

    def restore(self, state: dict[str, Any] | None) -> None:
        """Nothing, see `state`; raises CheckpointError if the state is that of a stream."""
        if state is not None:
            raise CheckpointError(
                "the run to resume read a stream, whose position is not one in other data; train a new one that starts "
                "from its weights (train.output=ANOTHER_FOLDER model.weights=RUN/best)"
            )


def training_data(
    config: RunConfig, model: GroundingModel, accelerator: Accelerator, evaluations: Sequence[Source]
) -> TrainingData | StreamedData:
    """Return the training batches of a run, see TrainingData and StreamedData."""
    if isinstance(config.data.train, StreamConfig):
        return StreamedData(config, model, accelerator)
    return TrainingData(config, model, accelerator, evaluations)


def describe_source(source: Source[Any]) -> str:
    """Return number and origin of the samples of a source."""
    return f"{len(source):,} {'images' if source.provenance.is_detection else 'expressions'} of {source.provenance}"


def example_phrases(source: Source[Any]) -> list[str]:
    """Return different phrases of a dataset, up to NUM_EXAMPLES; those with boxes come first."""
    found: dict[str, None] = {}
    without_boxes: dict[str, None] = {}
    for index in dict.fromkeys(round(i * (len(source) - 1) / NUM_EXAMPLES) for i in range(NUM_EXAMPLES)):
        try:
            sample = source.load(index, epoch=0)
        except DataError:  # reported, or skipped, where the sample is used
            continue
        if isinstance(sample, Sample):
            found |= dict.fromkeys(phrases_with_boxes(sample))
            without_boxes |= dict.fromkeys(sample.phrases)
        else:
            found[sample.phrase] = None
    return list(found | without_boxes)[:NUM_EXAMPLES]


def phrases_with_boxes(sample: Sample) -> list[str]:
    """Return the different phrases of the boxes of a sample."""
    return list(dict.fromkeys(sample.phrases[index] for index in sample.phrase_ids.tolist()))


def training_sampler(config: RunConfig, source: Source, num_processes: int = 1) -> EpochSampler:
    """Return the order of the training samples; raises DataError if the source cannot group its samples that way."""
    data, seed = config.data, config.train.seed
    if data.group_by_aspect_ratio:
        return AspectRatioGroupedSampler(source, seed, data.batch_size * num_processes * config.train.accumulate)
    if data.expressions_per_image > 1:
        return ImageGroupedSampler(source, seed, data.expressions_per_image)
    return EpochSampler(source, seed)
