"""The published variants have as many parameters as in transformers, and are detected from their tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from vg.models.grounding_dino.checkpoints.names import on_meta, tensor_names, to_file
from vg.models.grounding_dino.checkpoints.variant import detect_variant
from vg.models.grounding_dino.config import (
    BertConfig,
    ClassHeadConfig,
    DenoisingConfig,
    GroundingDinoConfig,
    ResNetConfig,
    SwinConfig,
)

BERT_BASE = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
B = {"width": 128, "depths": [2, 2, 18, 2], "heads": [4, 8, 16, 32], "window": 12}
L = {"width": 192, "depths": [2, 2, 18, 2], "heads": [6, 12, 24, 48], "window": 12, "stages": [1, 2, 3, 4]}
MM: dict[str, Any] = {
    "classes": ClassHeadConfig(scale="width", bias=True),
    "shared_heads": False,
    "logit_eps": (1e-3, 1e-5),
    "fusion_dropout": 0.1,
    "fusion_drop_path": 0.0,
    "denoising": DenoisingConfig(num_labels=256),
}
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Swin-T": ("official", {}),
    "Swin-B": ("official", {"backbone": SwinConfig(**B)}),
    "R50": ("mmdet", MM | {"backbone": ResNetConfig(), "denoising": DenoisingConfig(num_labels=80)}),
    "MM-T": ("mmdet", MM),
    "MM-B": ("mmdet", MM | {"backbone": SwinConfig(**B, drop_path=0.3)}),
    "MM-L": ("mmdet", MM | {"backbone": SwinConfig(**L), "levels": 5}),
    "Swin-T fine-tuned in mmdetection": ("mmdet", MM | {"classes": ClassHeadConfig(scale="learned")}),
}


def config_of(name: str) -> GroundingDinoConfig:
    return GroundingDinoConfig(**{"text": BertConfig(architecture=BERT_BASE)} | VARIANTS[name][1])


def of_transformers(config: GroundingDinoConfig) -> Any:
    """The same model in transformers, on the meta device."""
    stages = [f"stage{stage}" for stage in config.backbone.stages]
    if isinstance(config.backbone, SwinConfig):
        own = config.backbone
        sizes = {"embed_dim": own.width, "num_heads": own.heads, "window_size": own.window, "depths": own.depths}
        backbone: Any = transformers.SwinConfig(**sizes, out_features=stages)
    else:
        backbone = transformers.ResNetConfig(out_features=stages)
    settings = {
        "backbone_config": backbone,
        "text_config": transformers.BertConfig(),
        "num_feature_levels": config.levels,
    }
    with torch.device("meta"):
        if not config.classes.bias:
            return transformers.GroundingDinoForObjectDetection(transformers.GroundingDinoConfig(**settings))
        settings |= {"decoder_bbox_embed_share": False, "decoder_cls_embed_share": False}
        return transformers.MMGroundingDinoForObjectDetection(transformers.MMGroundingDinoConfig(**settings))


COUNTS = {"Swin-T": 172_250_626, "Swin-B": 232_315_264, "MM-T": 172_913_693, "MM-B": None, "MM-L": None, "R50": None}


@pytest.mark.parametrize(("name", "count"), COUNTS.items(), ids=COUNTS)
def test_number_of_parameters_equals_transformers(name: str, count: int | None) -> None:
    config = config_of(name)
    ours, theirs = on_meta(config), of_transformers(config)
    # transformers has an unused norm after the last stage of Swin, and the weights of its frozen batch norms are
    # buffers; only vg has an embedding of denoising labels.
    last_norm = 2 * 8 * config.backbone.width if isinstance(config.backbone, SwinConfig) else 0
    norms = sum(
        p.numel() for module in ours.modules() if isinstance(module, torch.nn.BatchNorm2d) for p in module.parameters()
    )
    labels = config.denoising.num_labels * config.width if config.denoising else 0
    found = sum(parameter.numel() for parameter in theirs.parameters())
    assert count in (None, found)
    assert ours.num_parameters() == found - last_norm + norms + labels


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_detected_from_names_and_shapes(name: str) -> None:
    format = VARIANTS[name][0]
    config = config_of(name)
    weights = {  # only heads have values: equal heads would count as shared
        key: torch.rand(tensor.shape) if "_heads." in key else tensor
        for key, tensor in on_meta(config).own_state_dict().items()
    }
    tensors = {
        name: to_file(own, [weights[part] for part in own], format)
        for own, names in tensor_names(on_meta(config), format).items()
        for name in names
    }
    assert detect_variant(tensors, format, {}, {}) == config
