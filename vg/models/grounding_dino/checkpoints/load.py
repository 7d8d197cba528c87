"""From a checkpoint of any dialect to a model: a new one, or one that is there already."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vg.errors import CheckpointError
from vg.models.grounding_dino.checkpoints.read import read_checkpoint
from vg.models.grounding_dino.checkpoints.tokenizer import bert_settings, open_tokenizer
from vg.models.grounding_dino.checkpoints.variant import LABELS
from vg.models.grounding_dino.config import GroundingDinoConfig

if TYPE_CHECKING:
    from vg.models.grounding_dino.model import GroundingDino


def open_model(path: str | Path, tokenizer: str | None = None) -> GroundingDino:
    """The model of a checkpoint of any dialect, in evaluation mode on the CPU.

    Args:
        tokenizer: folder, vocab.txt, tokenizer.json or Hub id, for a .pth, which holds none; by default BERT's.

    Raises:
        CheckpointError: see read_checkpoint and open_tokenizer.
    """
    checkpoint = read_checkpoint(path, bert_settings(tokenizer))
    vocabulary = open_tokenizer(checkpoint, tokenizer)
    model = checkpoint.config.build(pretrained=False)
    model.load_own_state_dict(checkpoint.weights)
    model.use_tokenizer(vocabulary)
    return model.eval()


def load_into(model: GroundingDino, path: str | Path) -> str | None:
    """Load a checkpoint of any dialect into a model that was configured for it.

    Two differences are bridged, as mmdetection fine-tunes official weights: heads that are shared in the checkpoint
    become one copy per decoder layer, and a learned factor of the logits starts at 1. The table of denoising labels
    may be absent on either side.

    Returns:
        The folder with its tokenizer, if it has one.

    Raises:
        CheckpointError: see read_checkpoint; or the checkpoint is of another variant (every difference is named).
    """
    want = model.config
    checkpoint = read_checkpoint(path, model.text.network.config.to_dict())
    have, weights = checkpoint.config, dict(checkpoint.weights)
    trouble = [
        f"{name}: {ours} in the configuration, {theirs} in the checkpoint"
        for name, (ours, theirs) in _differences(want, have).items()
    ]
    if trouble:
        raise CheckpointError(f"{path} holds another variant of the model:\n  " + "\n  ".join(trouble))
    if have.shared_heads and not want.shared_heads:
        for name in [name for name in weights if "_heads.0." in name]:
            for layer in range(1, want.decoder_layers):
                weights[name.replace("_heads.0.", f"_heads.{layer}.")] = weights[name]
    own = model.own_state_dict()
    if want.classes.scale != have.classes.scale:
        weights |= {name: torch.zeros(1) for name in own if name.endswith(".log_scale")}
    labels = weights.pop(LABELS, None)
    if LABELS in own:
        weights[LABELS] = own[LABELS] if labels is None or labels.shape != own[LABELS].shape else labels
    try:
        model.load_own_state_dict(weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return checkpoint.tokenizer


def _differences(want: GroundingDinoConfig, have: GroundingDinoConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that decide about names, shapes or the meaning of weights, where they differ."""
    names = ["width", "levels", "encoder_layers", "decoder_layers", "heads", "points", "feedforward", "num_queries"]
    names += ["fusion", "classes", "shared_heads", "position_temperature"]
    pairs = {name: (getattr(want, name), getattr(have, name)) for name in names}
    for field in fields(want.backbone):
        if field.name not in ("id", "drop_path"):
            pairs[f"backbone.{field.name}"] = (
                getattr(want.backbone, field.name),
                getattr(have.backbone, field.name, None),
            )
    if have.shared_heads:
        del pairs["shared_heads"]
    if want.classes.scale == "learned" and have.classes.scale == "one" and want.classes.similarity == "dot":
        pairs["classes"] = (want.classes.bias, have.classes.bias)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
