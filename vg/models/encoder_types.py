"""The types of encoders in transformers that vg accepts."""

from __future__ import annotations

from transformers import (
    AutoModelForTextEncoding,
    Siglip2TextConfig,
    Siglip2TextModel,
    SiglipTextConfig,
    SiglipTextModel,
)

SIGLIP_VISION = ("siglip_vision_model", "siglip2_vision_model")  # SigLIP 2 of a fixed resolution is of the former type
SIGLIP_TEXT = ("siglip_text_model", "siglip2_text_model")
VISION_TYPES = (
    *("beit", "clip_vision_model", "convnext", "convnextv2", "deit", "dinov2", "dinov2_with_registers"),
    *("dinov3_convnext", "dinov3_vit", "resnet", *SIGLIP_VISION, "swin", "vit"),
)
TEXT_TYPES = (
    *("albert", "bert", "clip_text_model", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta"),
    *(*SIGLIP_TEXT, "t5", "xlm-roberta"),
)
UNUSED = {  # parameters that do not change the last hidden state, beside poolers and mask tokens
    "clip_vision_model": r"(.*\.)?post_layernorm\..*",
    "convnext": r"layernorm\..*",
    "convnextv2": r"layernorm\..*",
    **dict.fromkeys(SIGLIP_TEXT, r"head\..*"),
    **dict.fromkeys(SIGLIP_VISION, r"(.*\.)?head\..*"),
}
for config_class, model_class in ((SiglipTextConfig, SiglipTextModel), (Siglip2TextConfig, Siglip2TextModel)):
    AutoModelForTextEncoding.register(config_class, model_class, exist_ok=True)
