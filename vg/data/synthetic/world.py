"""What all synthetic datasets have in common: settings, splits, and a sample as a function of seed, epoch and index."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Generic, Literal

import numpy as np
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveInt

from vg.data.images import read_image
from vg.data.source import Provenance, Source, Task
from vg.data.synthetic.expressions import (
    GENERALIZED,
    Expression,
    ExpressionType,
    described_scene,
    further_expressions,
)
from vg.data.synthetic.layout import Background, Object, Scene, Style
from vg.errors import DataError
from vg.settings import Settings
from vg.types import Sample

SPLITS = {"train": 16_000, "val": 300, "test": 1_200}  # expressions


@dataclass
class WorldConfig(Settings):
    """Settings of every synthetic dataset."""

    name: str = ""
    split: Literal["train", "val", "test"] = "train"
    size: PositiveInt | None = None  # number of expressions; by default 16,000 / 300 / 1,200 for train / val / test
    image_size: int = 128  # pixels per side
    seed: NonNegativeInt = 0
    scenes: Literal["plain", "crowded"] = "plain"
    """3 to 6 objects, or 8 to 14 smaller ones."""
    expressions_per_scene: PositiveInt = 1
    """Expressions of one scene, each a sample of its own."""
    margin: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of comparisons, which are harder with less than 1. With 0.5, the runner-up of a leftmost star is at half of the
    distance or more, and that of the star closest to something at least 1.32, not 1.75 times as far away."""
    kinds: Annotated[tuple[ExpressionType, ...], Field(min_length=1)] = ("attribute", "superlative", "relation")
    """Expression types, which alternate; also available: "ordinal" (second leftmost star), "chain" (circle above the
    leftmost star) and "closest" (relations that need the second object: circle next to the star, where something else
    is closest to another circle); for generalized expressions "absent" (no object fits) and "several" (both stars)."""


class World(Source[Sample], Generic[Object, Background]):
    """Synthetic scenes: `train` differs in every epoch, `val` and `test` never change.

    Args:
        styles: parameters of the scenes by the value of `config.scenes`.
        view: what the samples are, for the provenance.

    Raises:
        DataError: images are too small for the objects of a scene.
    """

    def __init__(self, config: WorldConfig, styles: Mapping[str, Style], view: str = "", task: Task = "expressions"):
        name = config.name
        self.style = styles[config.scenes]
        if config.image_size < self.style.min_side:
            raise DataError(
                f"{name}: image_size {config.image_size} is too small; use at least {self.style.min_side} pixels"
            )
        self.settings = config
        self._last: tuple[tuple[int, int], Image.Image, list[Expression[Object]]] | None = None  # epoch, scene
        crowded = "crowded" if config.scenes == "crowded" else ""
        details = ", ".join(filter(None, (crowded, view, f"seed {config.seed}")))
        if task == "expressions" and not GENERALIZED.isdisjoint(config.kinds):
            task = "generalized"
        self.provenance = Provenance(f"{name} ({details})", config.split, task)

    @abstractmethod
    def scene(self, rng: np.random.Generator, epoch: int) -> Scene[Object, Background]:
        """Sample a scene."""

    @abstractmethod
    def draw(self, scene: Scene[Object, Background]) -> np.ndarray:
        """Draw a scene: [H, W, 3] uint8, RGB."""

    def __len__(self) -> int:
        return SPLITS[self.settings.split] if self.settings.size is None else self.settings.size

    def load(self, index: int, epoch: int) -> Sample:
        self._check(index)
        scene, index_in_scene = divmod(index, self.settings.expressions_per_scene)
        image, expressions = self._described(scene, self.seed_epoch(epoch))
        expression = expressions[index_in_scene]
        id = f"{self.settings.name}/{self.settings.split}/{index:06d}/0"
        return Sample(
            id=id,
            image=read_image(image, id),  # a copy, except within decoded_once
            phrases=(expression.text,),
            boxes=np.array([item.box for item in expression.targets], np.float32).reshape(-1, 4),  # [N, 4]
            phrase_ids=np.zeros(len(expression.targets), np.int64),
            expression_type=expression.type,
        )

    def _described(self, index: int, epoch: int) -> tuple[Image.Image, list[Expression[Object]]]:
        """Return a drawn scene and its expressions; the last one is kept, because samples of a scene are neighbors."""
        if self._last is None or self._last[0] != (epoch, index):
            kinds, number, margin = self.settings.kinds, self.settings.expressions_per_scene, self.settings.margin
            types = [kinds[(index + i) % len(kinds)] for i in range(number)]
            rng = self.rng(index * number, epoch)
            scene, first = described_scene(rng, types[0], lambda rng: replace(self.scene(rng, epoch), margin=margin))
            image = Image.fromarray(self.draw(scene))
            self._last = (epoch, index), image, [first, *further_expressions(rng, scene, first, types[1:])]
        return self._last[1:]

    def image_groups(self, epoch: int) -> np.ndarray:
        return np.arange(len(self)) // self.settings.expressions_per_scene

    def seed_epoch(self, epoch: int) -> int:
        """Return the epoch that scenes depend on, which is always 0 except in training."""
        return epoch if self.settings.split == "train" else 0

    def rng(self, index: int, epoch: int) -> np.random.Generator:
        """Return the random numbers of one sample; raises IndexError if there is no such sample."""
        self._check(index)
        split = list(SPLITS).index(self.settings.split)
        return np.random.default_rng([self.settings.seed, split, self.seed_epoch(epoch), index])

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            name, split = self.settings.name, self.settings.split
            raise IndexError(f"{name} {split} has {len(self)} samples, there is no sample {index}")
