"""The model families; adding one is adding its configuration to this union (told apart by `name`)."""

from __future__ import annotations

from typing import Annotated, Union

from pydantic import Field

from vg.models.grounding_dino.config import GroundingDinoConfig
from vg.models.rec.config import RecConfig

ModelConfig = Annotated[Union[RecConfig, GroundingDinoConfig], Field(discriminator="name")]  # noqa: UP007
