"""The data sets; adding one is adding its configuration to this union (told apart by `name`)."""

from __future__ import annotations

from typing import Annotated, Union

from pydantic import Field

from vg.data.refcoco import RefcocoConfig
from vg.data.shapes import ShapesConfig

SourceConfig = Annotated[Union[ShapesConfig, RefcocoConfig], Field(discriminator="name")]  # noqa: UP007
