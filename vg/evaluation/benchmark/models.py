"""Models for the benchmark: checkpoints of vg, and of Grounding DINO in all published formats."""

from __future__ import annotations

from collections.abc import Sequence

from vg.checkpoint import is_checkpoint, read_model
from vg.errors import ConfigError
from vg.inference.grounder import load_model
from vg.models.base import GroundingModel
from vg.models.grounding_dino.model import GroundingDino


def open_model(checkpoint: str, overrides: Sequence[str] = (), tokenizer: str | None = None) -> GroundingModel:
    """Load a model in evaluation mode on the CPU; Grounding DINO scores boxes by the REC protocol by default.

    Args:
        checkpoint, tokenizer: see vg.inference.grounder.load_model.
        overrides: of the configuration, for a checkpoint of vg.

    Raises:
        CheckpointError: not a checkpoint, a damaged one, or its tokenizer is missing.
        ConfigError: unknown overrides, or overrides of a checkpoint without a vg configuration.
    """
    if not overrides:
        model = load_model(checkpoint, tokenizer)
    elif is_checkpoint(checkpoint):
        model, _ = read_model(checkpoint, overrides)
    else:
        raise ConfigError(f"{checkpoint} is not a checkpoint of vg, so {', '.join(overrides)} cannot be set")
    if isinstance(model, GroundingDino) and not any(item.startswith("model.predict.score=") for item in overrides):
        model.config.predict.score = "max"
    return model


def protocol(model: GroundingModel) -> str:
    """Describe how a model processes an expression, as far as results depend on it."""
    if not isinstance(model, GroundingDino):
        return "one expression per forward pass"
    over = {"max": "best", "mean": "mean"}[model.config.predict.score]
    return f"the prompt is the expression alone, a box scores the {over} probability over its tokens"
