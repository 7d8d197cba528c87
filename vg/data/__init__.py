"""The data sets; adding one is adding its configuration to this union (told apart by `name`)."""

from __future__ import annotations

from typing import Annotated, TypeAlias, Union

from pydantic import Field

from vg.data.coco import CocoConfig
from vg.data.odvg import OdvgConfig
from vg.data.refcoco import RefcocoConfig
from vg.data.shapes import ShapesConfig
from vg.data.voc import VocConfig
from vg.data.yolo import YoloConfig

PartConfig: TypeAlias = Annotated[
    Union[ShapesConfig, RefcocoConfig, CocoConfig, OdvgConfig, VocConfig, YoloConfig],  # noqa: UP007
    Field(discriminator="name"),
]

from vg.data.mixture import MixtureConfig  # noqa: E402 - a mixture has parts of the union above

SourceConfig: TypeAlias = Annotated[Union[PartConfig, MixtureConfig], Field(discriminator="name")]  # noqa: UP007
