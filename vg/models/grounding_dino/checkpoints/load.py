"""Load a checkpoint of any dialect into a new model or an existing one."""

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
    """Build the model of a checkpoint of any dialect, in evaluation mode on the CPU.

    Args:
        tokenizer: folder, vocab.txt, tokenizer.json or Hub id, for a .pth, which contains none; default: BERT's.

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
    """Load a checkpoint of any dialect into a model of the same configuration.

    Two differences are allowed, as mmdetection allows them to fine-tune official weights: heads that are shared in the
    checkpoint are copied to every decoder layer, and a learned scale of the logits starts at 1. The embedding of
    denoising labels may be missing on either side.

    Returns:
        The folder of its tokenizer, or None.

    Raises:
        CheckpointError: see read_checkpoint; or the checkpoint is of another variant (all differences are listed).
    """
    wanted = model.config
    checkpoint = read_checkpoint(path, model.text.network.config.to_dict())
    found, weights = checkpoint.config, dict(checkpoint.weights)
    differences = [
        f"{name}: {ours} in the configuration, {theirs} in the checkpoint"
        for name, (ours, theirs) in _differences(wanted, found).items()
    ]
    if differences:
        raise CheckpointError(f"{path} is another variant of the model:\n  " + "\n  ".join(differences))
    if found.shared_heads and not wanted.shared_heads:
        for name in [name for name in weights if "_heads.0." in name]:
            for layer in range(1, wanted.decoder_layers):
                weights[name.replace("_heads.0.", f"_heads.{layer}.")] = weights[name]
    own = model.own_state_dict()
    if wanted.classes.scale != found.classes.scale:
        weights |= {name: torch.zeros(1) for name in own if name.endswith(".log_scale")}
    labels = weights.pop(LABELS, None)
    if LABELS in own:
        weights[LABELS] = own[LABELS] if labels is None or labels.shape != own[LABELS].shape else labels
    try:
        model.load_own_state_dict(weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return checkpoint.tokenizer


def _differences(wanted: GroundingDinoConfig, found: GroundingDinoConfig) -> dict[str, tuple[Any, Any]]:
    """Compare the settings that determine names, shapes or the meaning of weights."""
    names = ["width", "levels", "encoder_layers", "decoder_layers", "heads", "points", "feedforward", "num_queries"]
    names += ["fusion", "classes", "shared_heads", "position_temperature"]
    pairs = {name: (getattr(wanted, name), getattr(found, name)) for name in names}
    for field in fields(wanted.backbone):
        if field.name not in ("id", "drop_path"):
            pairs[f"backbone.{field.name}"] = (
                getattr(wanted.backbone, field.name),
                getattr(found.backbone, field.name, None),
            )
    if found.shared_heads:
        del pairs["shared_heads"]
    if wanted.classes.scale == "learned" and found.classes.scale == "one" and wanted.classes.similarity == "dot":
        pairs["classes"] = (wanted.classes.bias, found.classes.bias)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
