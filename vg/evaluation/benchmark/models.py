"""Models for the benchmark: checkpoints of vg, and of Grounding DINO in all published formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vg.checkpoint import CONFIG, read_model
from vg.errors import ConfigError
from vg.models.base import GroundingModel
from vg.models.grounding_dino.checkpoints import bert_settings, open_tokenizer, read_checkpoint
from vg.models.grounding_dino.config import BertConfig
from vg.models.grounding_dino.model import GroundingDino

_SCORE = "model.predict.score"


def open_model(checkpoint: str, overrides: Sequence[str] = (), tokenizer: str | None = None) -> GroundingModel:
    """Load a model in evaluation mode on the CPU; Grounding DINO scores boxes by the REC protocol by default.

    Args:
        checkpoint: folder of a run or checkpoint of vg, .pth, folder of transformers, or Hub id.
        overrides: of the configuration, for a checkpoint of vg.
        tokenizer: see vg.models.grounding_dino.checkpoints.open_tokenizer; a checkpoint of vg contains its own.

    Raises:
        CheckpointError: not a checkpoint, a damaged one, or its tokenizer is missing.
        ConfigError: unknown overrides, or overrides of a checkpoint without a vg configuration.
    """
    folder = Path(checkpoint)
    model: GroundingModel
    if any((folder / subfolder / CONFIG).exists() for subfolder in ("", "best")):
        model, _ = read_model(folder, overrides)
    elif overrides:
        raise ConfigError(f"{checkpoint} is not a checkpoint of vg, so {', '.join(overrides)} cannot be set")
    else:
        model = _read_grounding_dino(checkpoint, tokenizer)
    if isinstance(model, GroundingDino) and not any(override.startswith(f"{_SCORE}=") for override in overrides):
        model.config.predict.score = "max"
    return model.eval()


def _read_grounding_dino(path: str, tokenizer: str | None) -> GroundingDino:
    checkpoint = read_checkpoint(path, bert_settings(tokenizer))
    open_tokenizer(checkpoint, tokenizer)  # raises if it does not fit this checkpoint
    checkpoint.config.text.tokenizer = tokenizer or checkpoint.tokenizer or BertConfig().id
    model = checkpoint.config.build(pretrained=False)
    model.load_own_state_dict(checkpoint.weights)
    return model


def protocol(model: GroundingModel) -> str:
    """Describe how a model processes an expression, as far as results depend on it."""
    if not isinstance(model, GroundingDino):
        return "one expression per forward pass"
    over = {"max": "best", "mean": "mean"}[model.config.predict.score]
    return f"the prompt is the expression alone, a box scores the {over} probability over its tokens"
