"""The model families; adding one is adding its configuration to this union (told apart by `name`)."""

from vg.models.rec.config import RecConfig

ModelConfig = RecConfig
