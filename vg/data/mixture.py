"""Several data sets as one training set, each with its own share of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, TypeAlias, Union

import numpy as np
from pydantic import Field, NonNegativeInt

from vg.data import DatasetConfig
from vg.data.source import HasImageGroups, HasImageSizes, Provenance, Source
from vg.errors import DataError
from vg.settings import Settings
from vg.types import Sample


@dataclass
class MixtureConfig(Settings):
    """Which data sets, and how much of each."""

    name: Literal["mixture"] = "mixture"
    parts: list[DatasetConfig] = field(kw_only=True)
    weights: list[Annotated[float, Field(gt=0)]] | None = None
    """How often an epoch shows a sample of each part: 1 (the default) once, 2 twice, 0.05 a twentieth of them, which is
    another twentieth in the next epoch."""
    seed: NonNegativeInt = 0

    def build(self) -> Mixture:
        return Mixture([part.build() for part in self.parts], self.weights, self.seed)


SourceConfig: TypeAlias = Annotated[Union[DatasetConfig, MixtureConfig], Field(discriminator="name")]  # noqa: UP007


class Mixture:
    """Sources one after the other, as a vg.data.source.Source; what is random depends on (seed, epoch, index) alone.

    The id of a sample begins with the data set it comes from.

    Args:
        weights: see MixtureConfig.
    """

    def __init__(self, parts: Sequence[Source], weights: Sequence[float] | None = None, seed: int = 0):
        if not parts:
            raise DataError("a mixture without parts; list the data sets in parts")
        if weights is not None and len(weights) != len(parts):
            raise DataError(f"a mixture of {len(parts)} parts has {len(weights)} weights; give one for each")
        self.parts = list(parts)
        self.weights = [1.0] * len(parts) if weights is None else list(weights)
        self.seed = seed
        self._counts = [round(weight * len(part)) for weight, part in zip(self.weights, parts, strict=True)]
        self._ends = np.cumsum(self._counts)  # [parts] index after the last sample of each
        self._orders: list[dict[int, np.ndarray]] = [{} for _ in parts]  # of each part, by turn
        self.provenance = Provenance(
            data=" + ".join(
                f"{part.provenance.data} ({part.provenance.split})" + ("" if weight == 1 else f" x {weight:g}")
                for part, weight in zip(parts, self.weights, strict=True)
            ),
            split="mixture",
            task=parts[0].provenance.task,  # of use if a mixture is evaluated, and its parts agree
        )

    def __len__(self) -> int:
        return sum(self._counts)

    def load(self, index: int, epoch: int) -> Sample:
        part, place, time = self.locate(index, epoch)
        source = self.parts[part]
        try:
            sample = source.load(place, time)
        except DataError as error:
            raise type(error)(f"{source.provenance.data} ({source.provenance.split}): {error}") from error
        return replace(sample, id=f"{source.provenance.data}/{source.provenance.split}/{sample.id}")

    def locate(self, index: int, epoch: int) -> tuple[int, int, int]:
        """(part, index in it, how often that part has been gone through before) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"a mixture of {len(self)} samples has no item {index}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        count, length = self._counts[part], len(self.parts[part])
        place = index - int(self._ends[part] - count)
        whole, rest = divmod(count, length)  # an epoch shows the part so often, and so many samples of it once more
        if place < whole * length:
            return part, place % length, epoch * (whole + bool(rest)) + place // length
        turn, place = divmod(epoch * rest + place - whole * length, length)
        return part, int(self._order(part, turn)[place]), epoch * (whole + 1) + whole

    def image_sizes(self, epoch: int) -> np.ndarray:
        """[samples, 2] (height, width); see vg.data.source.HasImageSizes.

        Raises:
            DataError: a part does not know the sizes of its pictures.
        """
        for part in self.parts:
            if not isinstance(part, HasImageSizes):
                raise DataError(f"{part.provenance.data} does not know how large its pictures are")
        sizes = [part.image_sizes(epoch) for part in self.parts if isinstance(part, HasImageSizes)]
        places = [self.locate(index, epoch)[:2] for index in range(len(self))]
        return np.array([sizes[part][place] for part, place in places], np.int64).reshape(-1, 2)

    def image_groups(self, epoch: int) -> np.ndarray:
        """[samples]; see vg.data.source.HasImageGroups. A repeated part has a group per repetition.

        Raises:
            DataError: a part does not know which samples show the same picture.
        """
        places = [self.locate(index, epoch) for index in range(len(self))]
        numbers: dict[tuple[int, int, int], int] = {}
        known: dict[tuple[int, int], np.ndarray] = {}
        for part, source in enumerate(self.parts):
            if not isinstance(source, HasImageGroups):
                raise DataError(f"{source.provenance.data} does not know which samples show the same picture")
            known |= {(part, time): source.image_groups(time) for time in {t for p, _, t in places if p == part}}
        groups = [(part, time, int(known[part, time][place])) for part, place, time in places]
        return np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.int64)

    def _order(self, part: int, turn: int) -> np.ndarray:
        """A permutation of the samples of a part; every sample comes once per turn."""
        orders = self._orders[part]
        if turn not in orders:
            order = np.random.default_rng((self.seed, part, turn)).permutation(len(self.parts[part]))
            near = {other: kept for other, kept in orders.items() if abs(other - turn) == 1}
            self._orders[part] = orders = near | {turn: order}  # an epoch may end one turn and begin the next
        return orders[turn]
