"""Detect the model variant of a checkpoint from the names and shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vg.errors import CheckpointError
from vg.models.grounding_dino.checkpoints.names import CheckpointFormat, Foreign, rows
from vg.models.grounding_dino.checkpoints.settings import check_bert
from vg.models.grounding_dino.config import (
    BertConfig,
    ClassHeadConfig,
    DenoisingConfig,
    GroundingDinoConfig,
    ResNetConfig,
    SwinConfig,
)

LOGIT_EPS: dict[Foreign, tuple[float, float]] = {
    "official": (1e-3, 1e-3),
    "mmdet": (1e-3, 1e-5),
    "transformers": (1e-5, 1e-5),
}
PATCHES = "backbone.network.embeddings.patch_embeddings.projection.weight"
SWIN_BLOCK = "backbone.network.encoder.layers.{stage}.blocks.{block}."
RESNET_BLOCK = "backbone.network.encoder.stages.{stage}.layers.{block}.layer."
HEAD_WIDTH = 64  # of every published BERT
LABELS = "denoising.labels.weight"


class NamedAsInVg:
    """The tensors of a file by their names in vg; merged tensors by the name of their first row block."""

    def __init__(self, tensors: Mapping[str, Tensor], format: CheckpointFormat):
        self.tensors = tensors
        self.patterns = {own[0]: theirs for own, theirs in reversed([*rows(format)]) if theirs is not None}

    def name_in_file(self, name: str, **numbers: Any) -> str:
        values = {"number": numbers.get("stage", 0) + 1, "convs": f"convs.{numbers.get('level')}", **numbers}
        return self.patterns[name].format(**values)

    def has(self, name: str, **numbers: int) -> bool:
        return name in self.patterns and self.name_in_file(name, **numbers) in self.tensors

    def shape(self, name: str, **numbers: int) -> tuple[int, ...]:
        if not self.has(name, **numbers):
            raise CheckpointError(f"the tensor {self.name_in_file(name, **numbers)} is missing")
        return tuple(self.tensors[self.name_in_file(name, **numbers)].shape)

    def count(self, name: str, counter: str, **numbers: int) -> int:
        """Return one more than the highest value of the placeholder `counter`; gaps are not detected."""
        prefix = self.name_in_file(name, **numbers, **{counter: "|"}).partition("|")[0]
        rests = [key.removeprefix(prefix).partition(".")[0] for key in self.tensors if key.startswith(prefix)]
        return 1 + max(map(int, filter(str.isdigit, rests)), default=-1)


def detect_variant(
    tensors: Mapping[str, Tensor], format: Foreign, settings: Mapping[str, Any], bert: Mapping[str, Any]
) -> GroundingDinoConfig:
    """Detect the configuration of a published checkpoint, with the dropout rates it was trained with.

    Args:
        settings: config.json of a transformers folder, or empty.
        bert: config.json of its text encoder, or empty; weights do not reveal the number of heads.

    Raises:
        CheckpointError: a tensor needed to detect the variant is missing.
    """
    found = NamedAsInVg(tensors, format)
    levels, width = found.shape("neck.level_encoding")
    layers = found.count("decoder.layers.{layer}.feedforward.0.weight", "layer")
    points = settings.get("encoder_n_points", 4)
    if not isinstance(points, int) or points < 1 or settings.get("decoder_n_points", points) != points:
        raise CheckpointError("config.json: encoder_n_points and decoder_n_points must be the same positive number")
    offsets = found.shape("encoder.layers.{layer}.image.attention.offsets.weight", layer=0)[0]
    if offsets < 2 * levels * points or offsets % (2 * levels * points):
        raise CheckpointError(f"config.json: {points} points and {levels} levels do not fit {offsets} sampling offsets")
    bias, learned = (found.has(f"queries.class_head.{name}", decoder_layers=layers) for name in ("bias", "log_scale"))
    # Dropout rates are not read from the config.json of transformers: in published folders they are its defaults, not
    # the rates of the training.
    from_mmdetection = format == "mmdet" or bias
    return GroundingDinoConfig(
        backbone=_backbone(found, levels, from_mmdetection),
        text=detect_text(found, settings.get("text_config", bert)),
        max_tokens=settings.get("max_text_len", 256),
        width=width,
        levels=levels,
        encoder_layers=found.count("encoder.layers.{layer}.fusion.image_gate", "layer"),
        decoder_layers=layers,
        heads=offsets // (2 * levels * points),
        points=points,
        feedforward=found.shape("encoder.layers.{layer}.image.feedforward.0.weight", layer=0)[0],
        num_queries=found.shape("queries.content")[0],
        position_temperature=settings.get("positional_embedding_temperature", 20.0),
        logit_eps=LOGIT_EPS[format],
        shared_heads=_heads_are_equal(tensors, format, layers),
        classes=ClassHeadConfig(scale="learned" if learned else "width" if bias else "one", bias=bias),
        fusion_dropout=0.1 if from_mmdetection else 0.0,
        fusion_drop_path=0.0 if from_mmdetection else 0.1,
        denoising=DenoisingConfig(num_labels=found.shape(LABELS)[0]) if found.has(LABELS) else None,
    )


def _heads_are_equal(tensors: Mapping[str, Tensor], format: Foreign, decoder_layers: int) -> bool:
    """Whether all decoder layers have the same heads; those of later layers may be missing."""
    heads: dict[str, list[Tensor]] = {}
    for own, theirs in rows(format):
        if "{head}" in own[0] and theirs is not None:
            names = [theirs.format(layer=layer) for layer in range(decoder_layers)]
            heads.setdefault(own[0], []).extend(tensors[name] for name in names if name in tensors)
    return all(tensor.equal(stored[0]) for stored in heads.values() for tensor in stored)


def _backbone(found: NamedAsInVg, levels: int, from_mmdetection: bool) -> SwinConfig | ResNetConfig:
    channels = []  # of the stages: these are projected by 1x1 convolutions, extra levels by 3x3 convolutions
    for level in range(levels):
        if found.has("neck.projections.{level}.0.weight", level=level):
            _, inputs, kernel, _ = found.shape("neck.projections.{level}.0.weight", level=level)
            channels += [inputs] if kernel == 1 else []
    swin = found.has(PATCHES)
    if not swin and not found.has("backbone.network.embedder.embedder.convolution.weight"):
        raise CheckpointError("the backbone is neither a Swin transformer nor a ResNet")
    block = SWIN_BLOCK + "layernorm_before.weight" if swin else RESNET_BLOCK + "0.convolution.weight"
    depths = [depth for stage in range(4) if (depth := found.count(block, "block", stage=stage))]
    if not swin:
        last = RESNET_BLOCK + "2.convolution.weight"
        widths = [found.shape(last, stage=stage, block=0)[0] for stage in range(len(depths))]
        return ResNetConfig(stages=_stages(channels, widths), depths=depths, widths=widths)
    width = found.shape(PATCHES)[0]
    table = SWIN_BLOCK + "attention.self.relative_position_bias_table"  # [offsets, heads]
    return SwinConfig(
        stages=_stages(channels, [width * 2**stage for stage in range(len(depths))]),
        width=width,
        depths=depths,
        heads=[found.shape(table, stage=stage, block=0)[1] for stage in range(len(depths))],
        window=(math.isqrt(found.shape(table, stage=0, block=0)[0]) + 1) // 2,
        drop_path=0.3 if from_mmdetection and width == 128 else 0.2,
    )


def _stages(channels: list[int], widths: list[int]) -> list[int]:
    if not set(channels) <= set(widths):
        raise CheckpointError(f"the input projections expect {channels} channels, the backbone has {widths}")
    return [widths.index(inputs) + 1 for inputs in channels]


def detect_text(found: NamedAsInVg, bert: Mapping[str, Any]) -> BertConfig:
    """Detect the sizes of the text encoder, so that building it needs no download."""
    check_bert(bert)
    vocabulary, width = found.shape("text.network.embeddings.word_embeddings.weight")
    if "num_attention_heads" not in bert and width % HEAD_WIDTH:
        raise CheckpointError(
            f"the text encoder has width {width}, but its number of attention heads cannot be detected. "
            "Pass the folder of its tokenizer with BERT's config.json (`vg convert`: --tokenizer)"
        )
    heads = bert.get("num_attention_heads", width // HEAD_WIDTH)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise CheckpointError(f"num_attention_heads of the text encoder is {heads!r}, its width {width}")
    layer = "text.network.encoder.layer.{layer}.intermediate.dense.weight"
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": found.count(layer, "layer"),
        "num_attention_heads": heads,
        "intermediate_size": found.shape(layer, layer=0)[0],
        "max_position_embeddings": found.shape("text.network.embeddings.position_embeddings.weight")[0],
        "type_vocab_size": found.shape("text.network.embeddings.token_type_embeddings.weight")[0],
    }
    return BertConfig(architecture={"model_type": "bert", **sizes})
