"""Load a checkpoint of any format into a model, and its tokenizer."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from vg.errors import CheckpointError
from vg.files import read_json
from vg.models.encoders import load_tokenizer
from vg.models.grounding_dino.checkpoints.read import Checkpoint, read_checkpoint
from vg.models.grounding_dino.checkpoints.settings import given_settings
from vg.models.grounding_dino.checkpoints.variant import LABELS
from vg.models.grounding_dino.config import BertConfig, GroundingDinoConfig

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from vg.models.grounding_dino.model import GroundingDino


def load_into(model: GroundingDino, path: str | Path) -> str | None:
    """Load a checkpoint of any format into a model of the same configuration.

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
    differences = _differences(wanted, found)
    image, stored = wanted.image, found.image
    if (image.shortest, image.longest) != (stored.shortest, stored.longest):
        logger.warning(
            "%s: images are resized to %d and at most %d pixels (model.image), the checkpoint has %d and %d",
            *(path, image.shortest, image.longest, stored.shortest, stored.longest),
        )
    if checkpoint.format == "vg" and wanted.logit_eps != found.logit_eps:  # other formats do not contain it
        logger.warning(
            "%s: model.logit_eps is %s, the checkpoint has %s: boxes at the border of an image will differ",
            *(path, wanted.logit_eps, found.logit_eps),
        )
    if differences:
        raise CheckpointError(f"{path} is another variant of the model:\n  " + "\n  ".join(differences))
    if found.shared_heads and not wanted.shared_heads:
        for name in [name for name in weights if "_heads.0." in name]:
            for layer in range(1, wanted.decoder_layers):
                weights[name.replace("_heads.0.", f"_heads.{layer}.")] = weights[name]
    labels = weights.pop(LABELS, None)
    if labels is not None and model.denoising is not None and not model.denoising.is_sized:
        model.denoising.resize(len(labels))
    own = model.own_state_dict()
    if wanted.classes.scale != found.classes.scale:
        weights |= {name: torch.zeros(1) for name in own if name.endswith(".log_scale")}
    if LABELS in own:
        weights[LABELS] = own[LABELS] if labels is None or labels.shape != own[LABELS].shape else labels
    try:
        model.load_own_state_dict(weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return checkpoint.tokenizer


def _differences(wanted: GroundingDinoConfig, found: GroundingDinoConfig) -> list[str]:
    """List different settings with which weights do not fit, or all predictions are wrong."""
    names = ["width", "levels", "encoder_layers", "decoder_layers", "heads", "points", "feedforward", "num_queries"]
    names += ["fusion", "classes", "shared_heads", "position_temperature"]
    pairs = {name: (getattr(wanted, name), getattr(found, name)) for name in names}
    for field in fields(wanted.backbone):
        if field.name not in ("id", "drop_path"):
            own, theirs = (getattr(config.backbone, field.name, None) for config in (wanted, found))
            pairs[f"backbone.{field.name}"] = own, theirs
    pairs |= {f"image.{key}": (getattr(wanted.image, key), getattr(found.image, key)) for key in ("mean", "std")}
    if found.shared_heads:
        del pairs["shared_heads"]
    if wanted.classes.scale == "learned" and found.classes.scale == "one" and wanted.classes.similarity == "dot":
        pairs["classes"] = wanted.classes.bias, found.classes.bias
    return [f"{name}: {a} in the configuration, {b} in the checkpoint" for name, (a, b) in pairs.items() if a != b]


def open_tokenizer(checkpoint: Checkpoint, path: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer at `path` (folder, vocab.txt, tokenizer.json or Hub id), else the checkpoint's, else BERT's.

    Raises:
        CheckpointError: it cannot be loaded, or does not fit the text encoder of the checkpoint.
    """
    path = path or checkpoint.tokenizer or str(BertConfig().id)
    advice = "pass the folder or Hub id of the BERT that the model was trained with: --tokenizer"
    try:
        tokenizer = load_tokenizer(replace(checkpoint.config.text, tokenizer=path))
    except Exception as error:  # no such file, no network, no vocabulary in it: each has its own exception class
        raise CheckpointError(f"cannot load a tokenizer from {path}; {advice}\n({error})") from error
    rows = (checkpoint.config.text.architecture or {})["vocab_size"]
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) > rows or not {"[CLS]", "[SEP]", "."} <= vocabulary.keys():
        raise CheckpointError(
            f"the tokenizer of {path} has {len(vocabulary)} tokens and does not fit this checkpoint, whose text "
            f"encoder has {rows}; {advice}"
        )
    return tokenizer


def bert_settings(path: str | None) -> dict[str, Any]:
    """Read BERT's config.json in the folder of its tokenizer; empty without such a file; raises CheckpointError."""
    file = Path(path or "") / "config.json"
    try:
        return given_settings(read_json(file, dict)) if path and file.exists() else {}
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
