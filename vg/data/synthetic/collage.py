"""Synthetic dataset: real objects, cut out of COCO-annotated images and pasted on empty regions of other images."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from vg.data.detection.coco import CocoConfig
from vg.data.detection.issues import RaiseFirstError
from vg.data.detection.source import check_image_root
from vg.data.synthetic.crops import MAX_CROPS, MAX_REGIONS, Crop, Region, find, read_crop, read_region
from vg.data.synthetic.layout import Box, Grid, Noun, Scene, SceneObject, laid_out, pick, some
from vg.data.synthetic.scenes import FORMS, Shape, draw, random_scene
from vg.data.synthetic.scenes import STYLES as SHAPE_STYLES
from vg.data.synthetic.world import SPLITS, World, WorldConfig
from vg.errors import DataError

STYLES = {name: replace(style, min_side=style.min_side + 16) for name, style in SHAPE_STYLES.items()}
_GRAY, _HAZE = (160, 160, 160), 0.4  # blended with backgrounds, so that black and white objects are visible on all
_TENTHS = {"train": range(8), "val": range(8, 9), "test": range(9, 10)}  # of the objects


@dataclass
class CollageConfig(WorldConfig):
    """Settings of the collages, with objects and backgrounds from your images."""

    name: Literal["collage"] = "collage"
    annotations: str = field(kw_only=True)
    """COCO json with segmentations, such as instances_train2017.json."""
    images: str = field(kw_only=True)
    """Folder of its images."""

    @classmethod
    def miniature(cls, folder: Path) -> CollageConfig:
        """Write a tiny dataset and return its settings, for tests: squares cut out of drawn scenes."""
        rng = np.random.default_rng(0)
        empty: Scene[Shape, Grid] = Scene((), 192, ((160,),))
        rows: list[dict[str, Any]] = []
        for image, scene in enumerate([empty, *(random_scene(rng, 192) for _ in range(6))]):
            Image.fromarray(draw(scene)).save(folder / f"{image}.png")
            for shape in scene.objects:
                left, top, right, bottom = shape.box
                row = {"id": len(rows), "image_id": image, "category_id": list(FORMS).index(shape.form)}
                polygons = [[left, top, right, top, right, bottom, left, bottom]]
                rows.append({**row, "bbox": [left, top, right - left, bottom - top], "segmentation": polygons})
        document = {
            "images": [{"id": i, "file_name": f"{i}.png", "height": 192, "width": 192} for i in range(7)],
            "categories": [{"id": index, "name": form} for index, form in enumerate(FORMS)],
            "annotations": rows,
        }
        (folder / "instances.json").write_text(json.dumps(document))
        return cls(size=4, image_size=64, annotations=str(folder / "instances.json"), images=str(folder))

    def build(self) -> Collage:
        """Find the objects.

        Raises:
            DataError: the file cannot be read, an image is missing, or there are too few objects; see `find`.
        """
        return Collage(self)


class Background(NamedTuple):
    """A part of an empty region."""

    region: Region
    left: float  # as fractions of the region
    top: float
    side: float
    mirrored: bool


@dataclass(frozen=True)
class Pasted(SceneObject):
    """One object in a scene; it is described by its category, because nothing else is known about it."""

    crop: Crop
    box: Box
    size: str = ""
    color: str = ""

    @property
    def nouns(self) -> tuple[Noun, ...]:
        """Return the category only: "the leftmost object" is doubtful if the leftmost one is a person."""
        return ((self.crop.category,),)

    @property
    def areas(self) -> tuple[float, ...]:
        """Return the areas of the box and of the object itself."""
        (area,) = super().areas
        return area, area * self.crop.fill


class Collage(World[Pasted, Background]):
    """Pasted objects; an object belongs to one split only, by a hash of its id.

    Objects do not overlap, so that all are visible as a whole. Backgrounds are regions without any annotated box: what
    is annotated completely, as in COCO, is not in them, so they are not blurred. All splits share them. In every epoch
    at most MAX_CROPS objects and MAX_REGIONS backgrounds are used, which stay in memory.
    """

    def __init__(self, config: CollageConfig) -> None:
        super().__init__(config, STYLES)
        check_image_root(Path(config.images))
        annotations = CocoConfig(path=config.annotations, image_root=config.images).read(
            RaiseFirstError(config.annotations)
        )
        crops, self._regions = find(annotations, config.annotations)
        self._crops = [crop for crop in crops if zlib.crc32(crop.id.encode()) % 10 in _TENTHS[config.split]]
        categories = {crop.category for crop in self._crops}
        if len(categories) < 2:
            raise DataError(
                f"{config.annotations}: the split {config.split} has {len(self._crops)} of {len(crops)} objects that "
                f"can be cut out, of {len(categories)} categories; at least 2 are needed, use more images"
            )
        self._pool: tuple[int, dict[str, list[Crop]], list[Region]] = (-1, {}, [])  # epoch, and what it uses

    def scene(self, rng: np.random.Generator, epoch: int) -> Scene[Pasted, Background]:
        crops, regions = self._used(epoch)
        categories = some(rng, tuple(crops), int(rng.integers(2, 5)))
        fewest, most = self.style.counts
        unused = {category: some(rng, crops[category], most) for category in categories}

        def choose() -> Crop:
            category = pick(rng, [name for name in categories if unused[name]] or categories)
            return unused[category].pop() if unused[category] else pick(rng, crops[category])

        size, objects = self.settings.image_size, list[Pasted]()
        while len(objects) < fewest:
            objects = [Pasted(crop, box) for crop, _, box in laid_out(rng, size, self.style, choose, _sides)]
        side = rng.uniform(0.6, 1)
        left, top = rng.random(2) * (1 - side)
        background = Background(pick(rng, regions), left, top, side, bool(rng.random() < 0.5))
        return Scene(tuple(objects), size, background)

    def draw(self, scene: Scene[Pasted, Background]) -> np.ndarray:
        region, left, top, side, mirrored = scene.background
        source = read_region(region, 2 * scene.size)
        square = (left * source.width, top * source.width, (left + side) * source.width, (top + side) * source.width)
        image = source.resize((scene.size, scene.size), Image.Resampling.BILINEAR, square)
        if mirrored:
            image = ImageOps.mirror(image)
        image = Image.blend(image, Image.new("RGB", image.size, _GRAY), _HAZE)
        for item in scene.objects:
            left, top, right, bottom = item.box
            crop = read_crop(item.crop, self.style.scales[1] * scene.size)
            crop = crop.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
            image.paste(crop, (left, top), crop)
        return np.array(image)

    def _used(self, epoch: int) -> tuple[dict[str, list[Crop]], list[Region]]:
        """Return the objects by category, and the backgrounds, that an epoch uses."""
        if self._pool[0] != epoch:
            rng = np.random.default_rng([self.settings.seed, len(SPLITS), epoch])
            order = some(rng, self._crops)
            # One of each category first: one may have nearly all objects, but expressions need several categories.
            first = {crop.category: crop for crop in reversed(order)}
            chosen = [*first.values(), *(crop for crop in order if crop is not first[crop.category])][:MAX_CROPS]
            crops: dict[str, list[Crop]] = {}
            for crop in chosen:
                crops.setdefault(crop.category, []).append(crop)
            self._pool = epoch, crops, some(rng, self._regions, MAX_REGIONS)
        return self._pool[1:]


def _sides(crop: Crop, scale: float) -> tuple[float, float]:
    left, top, right, bottom = crop.box
    aspect = ((right - left) / (bottom - top)) ** 0.5
    return scale * aspect, scale / aspect
