"""The datasets; to add one, add its settings to this union (`name` selects it)."""

from __future__ import annotations

from typing import Annotated, TypeAlias, Union

from pydantic import Field

from vg.data.detection.coco import CocoConfig
from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.voc import VocConfig
from vg.data.detection.yolo import YoloConfig
from vg.data.expressions import CsvConfig
from vg.data.refcoco.source import RefcocoConfig
from vg.data.shards.source import ShardsConfig
from vg.data.synthetic.collage import CollageConfig
from vg.data.synthetic.glyphs import GlyphsConfig
from vg.data.synthetic.shapes import ShapesConfig

DatasetConfig: TypeAlias = Annotated[
    Union[  # noqa: UP007
        ShapesConfig,
        GlyphsConfig,
        CollageConfig,
        RefcocoConfig,
        CocoConfig,
        OdvgConfig,
        VocConfig,
        YoloConfig,
        CsvConfig,
        ShardsConfig,
    ],
    Field(discriminator="name"),
]
