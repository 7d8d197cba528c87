"""The model families; to add one, add its settings to this union (`name` selects it)."""

from __future__ import annotations

from typing import Annotated, Union

from pydantic import Field

from vg.models.grounding_dino.config import GroundingDinoConfig
from vg.models.rec.config import RecConfig

ModelConfig = Annotated[Union[RecConfig, GroundingDinoConfig], Field(discriminator="name")]  # noqa: UP007
