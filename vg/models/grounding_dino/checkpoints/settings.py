"""Settings of transformers that no tensor shows: applied where vg has them, otherwise refused if they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vg.errors import CheckpointError
from vg.files import read_json
from vg.models.grounding_dino.config import GroundingDinoConfig, ImageConfig

IMPLEMENTED: dict[str, dict[str, Any]] = {  # values that vg implements
    "grounding_dino": {
        "activation_function": "relu",
        "layer_norm_eps": 1e-5,
        "position_embedding_type": "sine",
        "query_dim": 4,
        "two_stage": True,
        "two_stage_bbox_embed_share": False,
        "embedding_init_target": True,
    },
    "bert": {
        "model_type": "bert",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
    },
    "swin": {"hidden_act": "gelu", "layer_norm_eps": 1e-5},
    "resnet": {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False},
    "image_processor": {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 2,  # bilinear
        "rescale_factor": 1 / 255,
    },
}


def given_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out values that are null, for which transformers has a default, also in the settings of encoders."""
    given = {key: value for key, value in settings.items() if value is not None}
    return {key: given_settings(value) if isinstance(value, dict) else value for key, value in given.items()}


def validated(config: GroundingDinoConfig) -> GroundingDinoConfig:
    """Check the types and ranges of settings that were read from a file; raises CheckpointError that lists them."""
    try:
        return TypeAdapter(GroundingDinoConfig).validate_python(asdict(config))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}, got {x['input']!r}" for x in error.errors())
        raise CheckpointError(f"its settings cannot be used: {wrong}") from error


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError if config.json has other settings than vg implements; missing ones have their defaults."""
    file = "config.json"
    text, backbone = (settings.get(f"{name}_config", {}) for name in ("text", "backbone"))
    for name, values in (("text", text), ("backbone", backbone)):
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: {name}_config is {values!r}, expected settings by their names")
    _check(file, "", settings, IMPLEMENTED["grounding_dino"])
    _check(file, "text_config.", text, IMPLEMENTED["bert"])
    _check(file, "backbone_config.", backbone, IMPLEMENTED.get(str(backbone.get("model_type")), {}))
    for name in ("attention_heads", "ffn_dim"):
        encoder, decoder = (settings.get(f"{part}_{name}") for part in ("encoder", "decoder"))
        if None not in (encoder, decoder) and encoder != decoder:
            raise CheckpointError(f"{file}: encoder_{name} and decoder_{name} differ ({encoder} and {decoder})")


def check_bert(settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError if config.json of BERT has other settings than vg implements."""
    _check("config.json of the text encoder", "", settings, IMPLEMENTED["bert"])


def read_image_settings(folder: Path) -> ImageConfig:
    """Read sizes, mean and std of the image processor in a folder of transformers; the defaults if there is none.

    Their types are not checked, see `validated`.

    Raises:
        CheckpointError: it does something else with images than vg.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            values = given_settings(read_json(folder / name, dict))
            if name == "processor_config.json" and not isinstance(values := values.get("image_processor", {}), dict):
                raise CheckpointError(f"{name}: image_processor is {values!r}, expected settings by their names")
            break
    else:
        return ImageConfig()
    _check(name, "", values, IMPLEMENTED["image_processor"])
    default = ImageConfig()
    size = values.get("size", {"shortest_edge": default.shortest, "longest_edge": default.longest})
    if not isinstance(size, dict) or size.keys() != {"shortest_edge", "longest_edge"}:
        raise CheckpointError(f"{name}: size is {size}; vg implements shortest_edge and longest_edge")
    mean, std = (values.get(f"image_{key}", getattr(default, key)) for key in ("mean", "std"))
    return ImageConfig(size["shortest_edge"], size["longest_edge"], mean=mean, std=std)


def _check(file: str, path: str, values: Mapping[str, Any], implemented: Mapping[str, Any]) -> None:
    wrong = [
        f"{path}{key} is {values[key]!r}, vg implements {value!r}"
        for key, value in implemented.items()
        if values.get(key) is not None and not _equal(values[key], value)
    ]
    if wrong:
        raise CheckpointError(f"{file}: " + "; ".join(wrong))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(b, float) and isinstance(a, (int, float)):
        return abs(a - b) <= 1e-6 * b
    return bool(a == b)
