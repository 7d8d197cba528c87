"""Read a checkpoint of any format and translate its names into those of vg."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from vg.errors import CheckpointError
from vg.files import read_json
from vg.models.base import check_finite_weights
from vg.models.grounding_dino.backbone import name_in_file
from vg.models.grounding_dino.checkpoints.files import load_tensors
from vg.models.grounding_dino.checkpoints.names import (
    IGNORABLE,
    CheckpointFormat,
    Foreign,
    from_file,
    on_meta,
    tensor_names,
)
from vg.models.grounding_dino.checkpoints.settings import check_settings, given_settings, read_image_settings, validated
from vg.models.grounding_dino.checkpoints.variant import NamedAsInVg, detect_text, detect_variant
from vg.models.grounding_dino.config import GroundingDinoConfig, SwinConfig
from vg.models.saved import best_of, local_path, read_weights
from vg.settings import read_yaml

if TYPE_CHECKING:
    from vg.models.grounding_dino.model import GroundingDino

SHOWN = 20  # names per message
NETWORK = "model.backbone.conv_encoder.model."  # of the backbone, in transformers


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint of any format."""

    format: CheckpointFormat
    config: GroundingDinoConfig  # with `weights` unset; build the model with `config.build(pretrained=False)`
    weights: dict[str, Tensor]  # by their names in vg
    tokenizer: str | None  # its folder, if there is one

    def __str__(self) -> str:
        config, weights = self.config, sum(tensor.numel() for tensor in self.weights.values())
        backbone, text, classes = config.backbone, config.text.architecture or {}, config.classes
        size = f", width {backbone.width}, window {backbone.window}" if isinstance(backbone, SwinConfig) else ""
        return (
            f"Grounding DINO in the {self.format} format, {weights:,} weights\n"
            f"  backbone: {backbone.name}, depths {backbone.depths}{size}; "
            f"text: BERT, {text['num_hidden_layers']} layers of width {text['hidden_size']}\n"
            f"  {config.encoder_layers} + {config.decoder_layers} layers of width {config.width}, "
            f"{config.levels} levels, {config.num_queries} queries, "
            f"{'shared heads' if config.shared_heads else 'heads for each layer'}; "
            f"logits: {classes.similarity}, scale {classes.scale}, {'with' if classes.bias else 'no'} bias"
        )


def read_checkpoint(path: str | Path, bert: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read a checkpoint; its format and variant are detected from its tensors.

    Args:
        path: an official or mmdetection .pth, a transformers folder or Hub id, or a checkpoint or run of vg.
        bert: config.json of the text encoder; needed only where its width is not 64 per attention head.

    Raises:
        CheckpointError: not a checkpoint of Grounding DINO, or tensors are missing, unknown or have another shape
            (the message lists them), or not finite.
    """
    local = local_path(path)
    try:
        read = _read_vg if local.is_dir() and not (local / "config.json").exists() else _read_foreign
        return read(local, bert or {})
    except (CheckpointError, OSError, SafetensorError, ValueError, RecursionError) as error:  # shapes, or bad json
        raise CheckpointError(f"{path}: {error}") from error


def _read_vg(folder: Path, bert: Mapping[str, Any]) -> Checkpoint:
    folder = best_of(folder)
    if not (folder / "config.yaml").exists():
        raise CheckpointError(
            "not a checkpoint: the folder contains neither config.json (transformers) nor config.yaml (vg)"
        )
    try:
        values = read_yaml(folder / "config.yaml")
        if (family := values["model"]["name"]) != "grounding_dino":
            raise CheckpointError(f"config.yaml is not that of a Grounding DINO, but of {family}, which has one format")
        config = TypeAdapter(GroundingDinoConfig).validate_python(values["model"] | {"weights": None})
    except (yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"config.yaml is not that of a Grounding DINO: {error}") from error
    weights = read_weights(folder)
    check_finite_weights(weights)
    if config.text.architecture is None:
        sizes = detect_text(NamedAsInVg(weights, "vg"), bert)
        config.text = replace(sizes, frozen=config.text.frozen, tokenizer=config.text.tokenizer)
    _check(on_meta(config), weights)
    return Checkpoint("vg", config, weights, str(folder / "tokenizer"))


def _read_foreign(path: Path, bert: Mapping[str, Any]) -> Checkpoint:
    settings = given_settings(read_json(path / "config.json", dict)) if path.is_dir() else {}
    tensors = load_tensors(path)
    check_finite_weights({key: tensor for key, tensor in tensors.items() if not re.fullmatch(IGNORABLE, key)})
    if any(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    format = _detect_format(tensors, settings)
    if format == "transformers":
        tensors = {_name_in_file(key): tensor for key, tensor in tensors.items()}
    check_settings(settings)
    config = detect_variant(tensors, format, settings, bert)
    config = validated(replace(config, image=read_image_settings(path)))
    model = on_meta(config)
    weights, unknown = {}, {key for key in tensors if not re.fullmatch(IGNORABLE, key)}
    problems = []
    for own, names in tensor_names(model, format).items():
        unknown.difference_update(names)
        stored = [name for name in names if name in tensors]
        if not stored:
            problems.append(f"missing: {names[0]}")
            continue
        if not all(tensors[name].equal(tensors[stored[0]]) for name in stored):
            problems.append(f"should be equal: {' and '.join(stored)}")
        weights.update(from_file(own, tensors[stored[0]], format))
    problems = sorted(problems) + [f"unknown: {key}" for key in sorted(unknown)]
    if problems:
        rest = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        lines = "\n  ".join(problems[:SHOWN] + rest)
        raise CheckpointError(f"the {format} checkpoint is incomplete or of another architecture:\n  {lines}")
    _check(model, weights)
    return Checkpoint(format, config, weights, str(path) if path.is_dir() else None)


def _detect_format(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Foreign:
    if settings and settings.get("model_type") not in ("grounding-dino", "mm-grounding-dino"):
        raise CheckpointError(f"config.json is of another architecture: {settings.get('model_type')}")
    for format in ("official", "transformers", "mmdet"):
        found = NamedAsInVg(tensors, format)
        if found.has("neck.level_encoding") and found.has("text.projection.weight"):
            return format
    names = ", ".join(list(tensors)[:3])
    raise CheckpointError(f"not a Grounding DINO in any known format: its {len(tensors)} tensors are {names}, ...")


def _name_in_file(key: str) -> str:
    """Translate backbone names of transformers in memory, which some files contain, into the names in its files."""
    return NETWORK + name_in_file(key.removeprefix(NETWORK)) if key.startswith(NETWORK) else key


def _check(model: GroundingDino, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the weights fit the model, which is on the meta device."""
    model.load_own_state_dict({key: tensor.to("meta") for key, tensor in weights.items()})
