"""The built-in dataset: drawn shapes with referring expressions, generated on the fly, without downloads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vg.data.refcoco.rows import samples_of
from vg.data.source import Provenance, Task
from vg.data.synthetic.expressions import DESCRIBE, ExpressionType, described_scene, shared_phrases
from vg.data.synthetic.scenes import STYLES, draw, random_scene, some
from vg.errors import DataError
from vg.settings import Settings
from vg.types import Sample

SPLITS = {"train": 16_000, "val": 300, "test": 1_200}  # expressions


@dataclass
class ShapesConfig(Settings):
    """Settings of the drawn scenes."""

    name: Literal["shapes"] = "shapes"
    split: Literal["train", "val", "test"] = "train"
    size: int | None = None  # number of expressions; by default 16,000 / 300 / 1,200 for train / val / test
    image_size: int = 128  # pixels per side
    seed: int = 0
    view: Literal["expression", "detection"] = "expression"  # one phrase and one box, or several of both per scene
    scenes: Literal["plain", "crowded"] = "plain"
    """3 to 6 shapes, or 8 to 14 smaller ones."""
    kinds: tuple[ExpressionType, ...] = ("attribute", "superlative", "relation")
    """Expression types, which alternate; also available: "ordinal" (second leftmost star) and "chain" (circle above the
    leftmost star). The detection view has phrases of color and form only."""

    @classmethod
    def miniature(cls, folder: Path) -> ShapesConfig:
        """Return settings of a tiny dataset, for tests; nothing is written to the folder."""
        return cls(split="val", size=4, image_size=64)

    def build(self) -> Shapes:
        return Shapes(self)


class Shapes:
    """Drawn scenes as a vg.data.source.Source: `train` differs in every epoch, `val` and `test` never change."""

    def __init__(self, config: ShapesConfig) -> None:
        if config.split not in SPLITS:
            raise DataError(f"shapes has no split {config.split!r}; choose one of {', '.join(SPLITS)}")
        self.style = STYLES[config.scenes]
        if config.image_size < self.style.min_side:
            raise DataError(
                f"shapes: image_size {config.image_size} is too small; use at least {self.style.min_side} pixels"
            )
        if config.seed < 0 or (config.size is not None and config.size < 1):
            raise DataError(f"shapes: seed ({config.seed}) must be at least 0 and size ({config.size}) at least 1")
        if not config.kinds or not set(config.kinds) <= set(DESCRIBE):
            raise DataError(f"shapes: kinds {config.kinds} must be chosen from {', '.join(DESCRIBE)}")
        self.config = config
        task: Task = "detection" if config.view == "detection" else "expressions"
        crowded = "crowded, " if config.scenes == "crowded" else ""
        self.provenance = Provenance(f"shapes ({crowded}{config.view}, seed {config.seed})", config.split, task)

    def __len__(self) -> int:
        return SPLITS[self.config.split] if self.config.size is None else self.config.size

    def load(self, index: int, epoch: int) -> Sample:
        if self.config.view == "detection":
            return self._detection(index, epoch)
        return samples_of(self.row(index, epoch), self.config.name, self.config.split)[0]

    def row(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """Draw one scene with one expression for one object, in the columns of `lmms-lab/RefCOCO*` on the Hub.

        `bbox` is xywh in pixels; the additional column `kinds` has the type of each expression in `answer`.
        """
        types = self.config.kinds
        expression_type = types[index % len(types)]
        rng = self._rng(index, epoch)
        scene, expression = described_scene(rng, expression_type, self.config.image_size, self.style)
        left, top, right, bottom = map(float, expression.target.box)
        return {
            "question_id": f"{index:06d}",
            "image": Image.fromarray(draw(scene)),
            "question": "Which object does the expression name?",
            "answer": [expression.text],
            "bbox": [left, top, right - left, bottom - top],
            "segmentation": [left, top, right, top, right, bottom, left, bottom],
            "iscrowd": 0,
            "file_name": f"{self.config.split}_seed{self.config.seed}_epoch{self._seed_epoch(epoch)}_{index:06d}.png",
            "kinds": [expression.type],
        }

    def _detection(self, index: int, epoch: int) -> Sample:
        """Draw one scene with up to four phrases of color or form and a box for every shape that matches a phrase."""
        rng = self._rng(index, epoch)
        scene = random_scene(rng, self.config.image_size, self.style)
        phrases = some(rng, [phrase for phrase in shared_phrases(scene) if any(phrase)], int(rng.integers(2, 5)))
        pairs = [(i, shape) for i, phrase in enumerate(phrases) for shape in phrase.matches(scene.shapes)]
        return Sample(
            id=f"{self.config.name}/{self.config.split}/{index:06d}",
            image=draw(scene),
            phrases=tuple(phrase.text(rng) for phrase in phrases),
            boxes=np.array([shape.box for _, shape in pairs], dtype=np.float32),  # [N, 4]
            phrase_ids=np.array([i for i, _ in pairs], dtype=np.int64),  # [N]
        )

    def _seed_epoch(self, epoch: int) -> int:
        return epoch if self.config.split == "train" else 0

    def _rng(self, index: int, epoch: int) -> np.random.Generator:
        if not 0 <= index < len(self):
            raise IndexError(f"shapes {self.config.split} has {len(self)} samples, there is no sample {index}")
        split = list(SPLITS).index(self.config.split)
        return np.random.default_rng([self.config.seed, split, self._seed_epoch(epoch), index])


def write_scenes(folder: Path, view: Literal["expression", "detection"]) -> list[tuple[int, str, list[float]]]:
    """Write 0.png to 3.png, the images of a dataset's `miniature`; return (image 0 to 3, phrase, box xyxy) per box."""
    folder.mkdir(parents=True, exist_ok=True)
    source = ShapesConfig(split="val", size=4, image_size=64, view=view).build()
    boxes = []
    for index in range(len(source)):
        sample = source.load(index, epoch=0)
        Image.fromarray(sample.image).save(folder / f"{index}.png")
        pairs = zip(sample.phrase_ids, sample.boxes.tolist(), strict=True)
        boxes += [(index, sample.phrases[phrase_id], box) for phrase_id, box in pairs]
    return boxes
