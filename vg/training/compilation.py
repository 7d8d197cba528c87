"""Compiles the layers of a model with torch.compile, each by itself."""

from __future__ import annotations

import torch

from vg.errors import ConfigError
from vg.models.base import GroundingModel

RECOMPILE_LIMIT = 32


def compile_layers(model: GroundingModel) -> None:
    """Compile `layers_to_compile` in place at their next call; names of weights do not change.

    Layers of one class share their code, and all sizes are dynamic: batches of other sizes do not compile it again.
    Call it after adapters have been added. Random numbers, as of dropout, differ from those without compilation.

    Raises:
        ConfigError: the model has no layers to compile.
    """
    layers = model.layers_to_compile()
    if not layers:
        raise ConfigError("train.compile: only layers of grounding_dino can be compiled; set train.compile=false")
    # Training and evaluation, padded or not, batches of one sample, frozen input of a first layer: more than 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for layer in layers:
        layer.compile(dynamic=True)
