"""What training reads: the batches of every optimiser step, the same in every run of the same configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from vg.cache.select import training_order, training_source
from vg.config import RunConfig
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset
from vg.data.overlap import without_overlap
from vg.data.samplers import AspectRatioGroupedSampler
from vg.data.source import Source
from vg.models.base import GroundingModel
from vg.types import Batch


class TrainingData:
    """The training samples of a run, epoch by epoch, as each process gets them.

    Args:
        evaluations: what the run is evaluated on; pictures that are there as well are told, or left out if asked.

    Raises:
        DataError: nothing is left, or the pictures cannot be grouped by shape (`data.group_by_aspect_ratio`).
    """

    def __init__(
        self, config: RunConfig, model: GroundingModel, accelerator: Accelerator, evaluations: Sequence[Source]
    ):
        data, seed = config.data, config.train.seed
        source = without_overlap(training_source(config, model), evaluations, data.drop_overlap)
        samples_at_once = data.batch_size * accelerator.num_processes
        self.accelerator = accelerator
        self.accumulate = config.train.accumulate
        collate = Collator(model.image_spec, model.text_spec, one_prompt=True)
        self.data = GroundingDataset(source, data.augment.build(), seed, data.bad_samples, collate.texts)
        self.sampler = (
            AspectRatioGroupedSampler(source, seed, samples_at_once)
            if data.group_by_aspect_ratio
            else training_order(config, source)
        )
        loader: DataLoader[Any] = DataLoader(
            self.data,
            batch_size=data.batch_size,
            sampler=self.sampler,
            num_workers=data.workers,
            collate_fn=collate,
            drop_last=len(self.data) >= samples_at_once,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # else a resumed run would draw once more from the generator of dropout
            persistent_workers=data.workers > 0,
        )
        self.loader: DataLoader[Any] = accelerator.prepare_data_loader(loader)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.loader) / self.accumulate)

    def steps(self, epoch: int, done: int) -> Iterator[list[Batch]]:
        """What is left of an epoch: the batches of each optimiser step, in the last one perhaps fewer.

        Args:
            done: batches of this epoch, in each process, that were used before.
        """
        self.data.begin_epoch(epoch)
        self.sampler.begin_epoch(epoch)
        batches = iter(self.accelerator.skip_first_batches(self.loader, done) if done else self.loader)
        while step := list(islice(batches, self.accumulate)):
            yield step
