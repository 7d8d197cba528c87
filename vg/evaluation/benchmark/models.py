"""Any model that the benchmark can judge: checkpoints of vg, and of Grounding DINO in every published dialect."""

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


def open_model(place: str, overrides: Sequence[str] = (), tokenizer: str | None = None) -> GroundingModel:
    """The model, in evaluation mode on the CPU; Grounding DINO answers by the protocol of REC, unless told otherwise.

    Args:
        place: folder of a run or checkpoint of vg, .pth, folder of transformers, or Hub id.
        overrides: of the configuration, for a checkpoint of vg.
        tokenizer: see vg.models.grounding_dino.checkpoints.open_tokenizer; a checkpoint of vg has its own.

    Raises:
        CheckpointError: not a checkpoint, a damaged one, or its tokenizer cannot be found.
        ConfigError: overrides that are unknown, or for a checkpoint that has no configuration of vg.
    """
    folder = Path(place)
    model: GroundingModel
    if any((folder / part / CONFIG).exists() for part in ("", "best")):
        model, _ = read_model(folder, overrides)
    elif overrides:
        raise ConfigError(f"{place} is no checkpoint of vg, so that {', '.join(overrides)} cannot be set")
    else:
        model = _published(place, tokenizer)
    if isinstance(model, GroundingDino) and not any(each.startswith(f"{_SCORE}=") for each in overrides):
        model.config.predict.score = "max"
    return model.eval()


def _published(place: str, tokenizer: str | None) -> GroundingDino:
    checkpoint = read_checkpoint(place, bert_settings(tokenizer))
    open_tokenizer(checkpoint, tokenizer)  # is it the one of this checkpoint?
    checkpoint.config.text.tokenizer = tokenizer or checkpoint.tokenizer or BertConfig().id
    model = checkpoint.config.build(pretrained=False)
    model.load_own_state_dict(checkpoint.weights)
    return model


def protocol(model: GroundingModel) -> str:
    """What a model does to answer an expression, as far as results depend on it."""
    if not isinstance(model, GroundingDino):
        return "one expression per forward pass"
    over = {"max": "best", "mean": "mean"}[model.config.predict.score]
    return f"the prompt is the expression alone, a box scores the {over} probability over its tokens"
