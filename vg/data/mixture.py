"""Several datasets as one training set, each with its own share of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal, TypeAlias, Union

import numpy as np
from pydantic import Field, NonNegativeInt

from vg.data import DatasetConfig
from vg.data.order import BlockOrder
from vg.data.source import Loaded, Provenance, Source, image_groups_of, image_sizes_of
from vg.data.stream import StreamConfig
from vg.data.subset import SplitConfig
from vg.errors import DataError
from vg.settings import Settings
from vg.types import Sample


@dataclass
class MixtureConfig(Settings):
    """Datasets, and how much of each."""

    name: Literal["mixture"] = "mixture"
    datasets: list[DatasetConfig] = field(kw_only=True)
    weights: list[Annotated[float, Field(gt=0)]] | None = None
    """How often an epoch contains each sample of a dataset: 1 (the default) once, 2 twice, 0.05 a twentieth of them,
    which is a different twentieth in the next epoch."""
    seed: NonNegativeInt = 0

    def build(self) -> Mixture[Sample]:
        return Mixture([dataset.build() for dataset in self.datasets], self.weights, self.seed)


OneDatasetConfig: TypeAlias = DatasetConfig | SplitConfig
SourceConfig: TypeAlias = Annotated[
    Union[DatasetConfig, MixtureConfig, SplitConfig, StreamConfig],  # noqa: UP007
    Field(discriminator="name"),
]


class Mixture(Source[Loaded]):
    """Concatenated sources; randomness depends on (seed, epoch, index) only.

    The id of a sample begins with the dataset that it is from. For `weights`, see MixtureConfig.

    Raises:
        DataError: there are no sources, a source has no samples, or there is not one weight for each.
    """

    def __init__(self, sources: Sequence[Source[Loaded]], weights: Sequence[float] | None = None, seed: int = 0):
        if not sources:
            raise DataError("a mixture without datasets; list them in `datasets`")
        if weights is not None and len(weights) != len(sources):
            raise DataError(f"a mixture of {len(sources)} datasets has {len(weights)} weights; give one for each")
        self.sources: list[Source[Loaded]] = list(sources)
        self.weights = [1.0] * len(sources) if weights is None else list(weights)
        for source, weight in zip(sources, self.weights, strict=True):
            if weight and not len(source):
                raise DataError(f"{source.provenance} has no samples: check its split, or leave it out of `datasets`")
        self.seed = seed
        self._counts = [
            max(1, round(weight * len(source))) if weight else 0
            for weight, source in zip(self.weights, sources, strict=True)
        ]
        names = [f"{source.provenance.data}/{source.provenance.split}/" for source in sources]
        self._prefixes = [f"{name}{i}/" if names.count(name) > 1 else name for i, name in enumerate(names)]
        self._ends = np.cumsum(self._counts)  # [sources] index after the last sample of each source
        self._orders: list[dict[int, BlockOrder]] = [{} for _ in sources]  # per source: pass -> its order
        self.provenance = Provenance(
            data=" + ".join(
                f"{source.provenance}{'' if weight == 1 else f' x {weight:g}'}"
                for source, weight in zip(sources, self.weights, strict=True)
            ),
            split="mixture",
            task=sources[0].provenance.task,  # used if a mixture is evaluated and its sources agree
        )
        counts = [source.num_classes for source in sources]
        if None not in counts:  # the most, because phrase ids count from 0 in each source
            self.num_classes = max(count or 0 for count in counts)

    def __len__(self) -> int:
        return sum(self._counts)

    def load(self, index: int, epoch: int) -> Loaded:
        source_index, index_in_source, source_epoch = self.locate(index, epoch)
        source = self.sources[source_index]
        try:
            sample = source.load(index_in_source, source_epoch)
        except DataError as error:
            raise type(error)(f"{source.provenance}: {error}") from error
        return replace(sample, id=self.prefix(source_index) + sample.id)

    def prefix(self, source_index: int) -> str:
        """Return what the ids of the samples of a source begin with."""
        return self._prefixes[source_index]

    def locate(self, index: int, epoch: int) -> tuple[int, int, int]:
        """Return the index of the source of a sample, its index there, and the epoch of that source.

        A source with weight 2 has two epochs of its own in every epoch of the mixture.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"a mixture of {len(self)} samples has no item {index}")
        source_index = int(np.searchsorted(self._ends, index, side="right"))
        offset = index - int(self._ends[source_index] - self._counts[source_index])
        source_epoch, indices = self._pass(source_index, epoch, offset, offset + 1)
        return source_index, int(indices[0]), source_epoch

    def number(self, index: int, epoch: int) -> int:
        """Return the number of a sample among those of all sources, which is the same in every epoch."""
        source_index, index_in_source, _ = self.locate(index, epoch)
        return sum(map(len, self.sources[:source_index])) + index_in_source

    def _passes(self, epoch: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield what `locate` returns for all samples: index and epoch of a source, indices there, [samples] int."""
        for source_index, (count, source) in enumerate(zip(self._counts, self.sources, strict=True)):
            for start in range(0, count, max(1, len(source))):
                source_epoch, indices = self._pass(source_index, epoch, start, min(start + len(source), count))
                yield source_index, source_epoch, indices

    def _pass(self, source_index: int, epoch: int, start: int, stop: int) -> tuple[int, np.ndarray]:
        """Return the epoch of a source, and the indices there of its samples `start` to `stop`, which are in one pass.

        An epoch has full passes, and a pass over the `rest`, which continues the random order of the epoch before.
        """
        length = len(self.sources[source_index])
        whole, rest = divmod(self._counts[source_index], length)
        number, first = divmod(start, length)
        source_epoch = epoch * (whole + bool(rest)) + number
        if number < whole:
            return source_epoch, np.arange(first, first + stop - start)
        turn, first = divmod(epoch * rest + first, length)
        last = first + stop - start
        parts = [self._order(source_index, turn)[first : min(last, length)]]
        if last > length:
            parts.append(self._order(source_index, turn + 1)[0 : last - length])
        return source_epoch, np.concatenate(parts)

    def image_sizes(self, epoch: int) -> np.ndarray:
        """Return [samples, 2] (height, width); raises DataError naming a source that does not provide them."""
        sizes = [
            image_sizes_of(self.sources[source_index], time)[indices]
            for source_index, time, indices in self._passes(epoch)
        ]
        return np.concatenate(sizes)

    def image_groups(self, epoch: int) -> np.ndarray:
        """Return [samples] ids, repeated samples in different groups; raises DataError as `image_sizes`."""
        ids, count = [], 0
        for source_index, time, indices in self._passes(epoch):
            groups = image_groups_of(self.sources[source_index], time)[indices]
            _, first, unique_ids = np.unique(groups, return_index=True, return_inverse=True)
            by_appearance = np.argsort(np.argsort(first))
            ids.append(by_appearance[unique_ids] + count)
            count += len(first)
        return np.concatenate(ids)

    def shard_ends(self) -> np.ndarray:
        """Return the ends of the shards in every pass over a source.

        A partial pass, which ends within shards, and a source without shards are divided evenly. If no source has
        shards, the mixture has none, too.
        """
        ends = [source.shard_ends() for source in self.sources]
        counts = [(own[-1], len(own)) for own in ends if len(own) > 1]
        if not counts:
            return np.array([len(self)], np.int64)
        size = math.ceil(sum(samples for samples, _ in counts) / sum(shards for _, shards in counts))
        found, first = [], 0
        for count, own in zip(self._counts, ends, strict=True):
            whole, rest = divmod(count, int(own[-1]))
            passes = [own if len(own) > 1 else _even(own[-1], size)] * whole + [_even(rest, size)] * bool(rest)
            for part in passes:
                found.append(part + first)
                first += int(part[-1])
        return np.concatenate(found)

    def _order(self, source_index: int, turn: int) -> BlockOrder:
        """Return the order of one pass over a source: each sample occurs once, those of a shard follow each other."""
        orders = self._orders[source_index]
        if turn not in orders:
            near = {other: kept for other, kept in orders.items() if abs(other - turn) == 1}
            permutation = partial(_permutation, (self.seed, source_index, turn))
            order = BlockOrder(self.sources[source_index].shard_ends(), permutation)
            self._orders[source_index] = orders = near | {turn: order}  # an epoch may end one pass and begin the next
        return orders[turn]


def _even(length: int, size: int) -> np.ndarray:
    """The ends of ranges of `size` samples; the last one may be shorter."""
    return np.append(np.arange(size, length, size), length)


def _permutation(seed: tuple[int, ...], length: int, block: int) -> np.ndarray:
    return np.random.default_rng((*seed, block) if block else seed).permutation(length)


def sources_of(source: Source) -> Sequence[Source]:
    """Return the sources of a mixture, or the one source."""
    return source.sources if isinstance(source, Mixture) else [source]


def configs_of(config: SourceConfig) -> Sequence[OneDatasetConfig]:
    """Return the datasets of a mixture, or the one dataset; raises ConfigError for a stream."""
    if isinstance(config, StreamConfig):
        config.build()
    return config.datasets if isinstance(config, MixtureConfig) else [config]
