"""The built-in dataset: drawn shapes with referring expressions, generated on the fly, without downloads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from vg.data.synthetic.expressions import shared_phrases
from vg.data.synthetic.layout import GENERIC_NOUN, Grid, Scene, some
from vg.data.synthetic.scenes import STYLES, Shape, draw, random_scene
from vg.data.synthetic.world import World, WorldConfig
from vg.errors import DataError
from vg.types import Sample


@dataclass
class ShapesConfig(WorldConfig):
    """Settings of the drawn shapes."""

    name: Literal["shapes"] = "shapes"
    view: Literal["expression", "detection"] = "expression"
    """One phrase and one box, or several of both per scene; the latter are phrases of color and form only."""

    @classmethod
    def miniature(cls, folder: Path) -> ShapesConfig:
        """Return settings of a tiny dataset, for tests; nothing is written to the folder."""
        return cls(split="val", size=4, image_size=64)

    def build(self) -> Shapes:
        return Shapes(self)


class Shapes(World[Shape, Grid]):
    """Drawn scenes: `train` differs in every epoch, `val` and `test` never change."""

    def __init__(self, config: ShapesConfig) -> None:
        super().__init__(config, STYLES, config.view, "detection" if config.view == "detection" else "expressions")
        if config.view == "detection" and config.expressions_per_scene > 1:
            raise DataError(
                f"{config.name}: expressions_per_scene={config.expressions_per_scene} is for view=expression; with "
                "view=detection a scene is one sample; set it to 1"
            )
        self.config = config

    def scene(self, rng: np.random.Generator, epoch: int) -> Scene[Shape, Grid]:
        return random_scene(rng, self.config.image_size, self.style)

    def draw(self, scene: Scene[Shape, Grid]) -> np.ndarray:
        return draw(scene)

    def load(self, index: int, epoch: int) -> Sample:
        return self._detection(index, epoch) if self.config.view == "detection" else super().load(index, epoch)

    def _detection(self, index: int, epoch: int) -> Sample:
        """Draw one scene with up to four phrases of color or form and a box for every shape that matches a phrase."""
        rng = self.rng(index, epoch)
        scene = self.scene(rng, epoch)
        specific = [phrase for phrase in shared_phrases(scene) if phrase.color or phrase.noun != GENERIC_NOUN]
        phrases = some(rng, specific, int(rng.integers(2, 5)))
        pairs = [(i, shape) for i, phrase in enumerate(phrases) for shape in phrase.matches(scene.objects)]
        return Sample(
            id=f"{self.config.name}/{self.config.split}/{index:06d}",
            image=draw(scene),
            phrases=tuple(phrase.text(rng) for phrase in phrases),
            boxes=np.array([shape.box for _, shape in pairs], dtype=np.float32),  # [N, 4]
            phrase_ids=np.array([i for i, _ in pairs], dtype=np.int64),  # [N]
        )


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
