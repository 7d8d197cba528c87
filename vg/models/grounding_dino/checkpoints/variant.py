"""Detect the model variant of a checkpoint from the names and shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vg.errors import CheckpointError
from vg.models.grounding_dino.checkpoints.names import patterns, tensor_names
from vg.models.grounding_dino.checkpoints.table import Dialect, Foreign
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

    def __init__(self, tensors: Mapping[str, Tensor], dialect: Dialect):
        self.tensors = tensors
        self.patterns = patterns(dialect)

    def has(self, name: str, **numbers: int) -> bool:
        return name in self.patterns and self.patterns[name].format(**numbers) in self.tensors

    def shape(self, name: str, **numbers: int) -> tuple[int, ...]:
        if not self.has(name, **numbers):
            raise CheckpointError(f"the tensor {self.patterns[name].format(**numbers)} is missing")
        return tuple(self.tensors[self.patterns[name].format(**numbers)].shape)

    def count(self, name: str, counter: str, **numbers: int) -> int:
        """Return one more than the highest value of the placeholder `counter`; gaps are not detected."""
        prefix = self.patterns[name].partition(f"{{{counter}}}")[0].format(**numbers)
        rests = [key.removeprefix(prefix).partition(".")[0] for key in self.tensors if key.startswith(prefix)]
        return 1 + max(map(int, filter(str.isdigit, rests)), default=-1)


def detect_variant(
    tensors: Mapping[str, Tensor], dialect: Foreign, settings: Mapping[str, Any], bert: Mapping[str, Any]
) -> GroundingDinoConfig:
    """Detect the configuration of a published checkpoint, with the dropout rates it was trained with.

    Args:
        settings: config.json of a transformers folder, or empty.
        bert: config.json of its text encoder, or empty; weights do not reveal the number of heads.

    Raises:
        CheckpointError: a tensor needed to detect the variant is missing.
    """
    found = NamedAsInVg(tensors, dialect)
    levels, width = found.shape("neck.level_encoding")
    layers = found.count("decoder.layers.{layer}.feedforward.0.weight", "layer")
    points = settings.get("encoder_n_points", 4)
    if settings.get("decoder_n_points", points) != points:
        raise CheckpointError("config.json: encoder_n_points and decoder_n_points differ, which vg does not support")
    offsets = found.shape("encoder.layers.{layer}.image.attention.offsets.weight", layer=0)[0]
    classes = _classes(found, layers)
    from_mmdetection = dialect == "mmdet" or classes.bias
    config = GroundingDinoConfig(
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
        position_temperature=float(settings.get("positional_embedding_temperature", 20)),
        logit_eps=LOGIT_EPS[dialect],
        shared_heads=False,
        classes=classes,
        fusion_dropout=0.1 if from_mmdetection else 0.0,
        fusion_drop_path=0.0 if from_mmdetection else 0.1,
        denoising=DenoisingConfig(num_labels=found.shape(LABELS)[0]) if found.has(LABELS) else None,
    )
    config.shared_heads = _heads_are_equal(tensors, config, dialect)
    return config


def _classes(found: NamedAsInVg, decoder_layers: int) -> ClassHeadConfig:
    bias = found.has("queries.class_head.bias", decoder_layers=decoder_layers)
    if found.has("queries.class_head.log_scale", decoder_layers=decoder_layers):
        return ClassHeadConfig(scale="learned", bias=bias)
    return ClassHeadConfig(scale="width" if bias else "one", bias=bias)


def _heads_are_equal(tensors: Mapping[str, Tensor], config: GroundingDinoConfig, dialect: Foreign) -> bool:
    """Whether the heads of later decoder layers are missing or equal to those of the first layer."""
    names = {own[0]: files for own, files in tensor_names(config, dialect).items()}

    def stored(own: str) -> Tensor | None:
        return next((tensors[name] for name in names[own] if name in tensors), None)

    for own in names:
        _, is_head, rest = own.partition("_heads.")
        layer, _, leaf = rest.partition(".")
        if is_head and layer != "0" and (tensor := stored(own)) is not None:
            first = stored(own.replace(f"_heads.{layer}.{leaf}", f"_heads.0.{leaf}"))
            if first is None or not tensor.equal(first):
                return False
    return True


def _backbone(found: NamedAsInVg, levels: int, from_mmdetection: bool) -> SwinConfig | ResNetConfig:
    channels = []  # of the stages: these are projected by 1x1 convolutions, extra levels by 3x3 convolutions
    for level in range(levels):
        if found.has("neck.projections.{level}.0.weight", level=level):
            _, inputs, kernel, _ = found.shape("neck.projections.{level}.0.weight", level=level)
            channels += [inputs] if kernel == 1 else []
    depths: list[int] = []
    if found.has(PATCHES):
        width = found.shape(PATCHES)[0]
        heads = []
        while depth := found.count(SWIN_BLOCK + "layernorm_before.weight", "block", stage=len(depths)):
            table = SWIN_BLOCK + "attention.self.relative_position_bias_table"
            offsets, heads_of_stage = found.shape(table, stage=len(depths), block=0)
            depths.append(depth)
            heads.append(heads_of_stage)
        return SwinConfig(
            stages=_stages(channels, [width * 2**stage for stage in range(len(depths))]),
            width=width,
            depths=depths,
            heads=heads,
            window=(math.isqrt(offsets) + 1) // 2,
            drop_path=0.3 if from_mmdetection and width == 128 else 0.2,
        )
    if not found.has("backbone.network.embedder.embedder.convolution.weight"):
        raise CheckpointError("the backbone is neither a Swin transformer nor a ResNet")
    widths = []
    while depth := found.count(
        RESNET_BLOCK + "0.convolution.weight", "block", stage=len(depths), number=len(depths) + 1
    ):
        last = found.shape(RESNET_BLOCK + "2.convolution.weight", stage=len(depths), number=len(depths) + 1, block=0)
        depths.append(depth)
        widths.append(last[0])
    return ResNetConfig(stages=_stages(channels, widths), depths=depths, widths=widths)


def _stages(channels: list[int], widths: list[int]) -> list[int]:
    if not set(channels) <= set(widths):
        raise CheckpointError(f"the input projections expect {channels} channels, the backbone has {widths}")
    return [widths.index(inputs) + 1 for inputs in channels]


def detect_text(found: NamedAsInVg, bert: Mapping[str, Any]) -> BertConfig:
    """Detect the sizes of the text encoder, so that building it needs no download."""
    vocabulary, width = found.shape("text.network.embeddings.word_embeddings.weight")
    if "num_attention_heads" not in bert and width % HEAD_WIDTH:
        raise CheckpointError(
            f"the text encoder has width {width}, but its number of attention heads cannot be detected. "
            "Pass the folder of its tokenizer with BERT's config.json (`vg convert`: --tokenizer)"
        )
    layer = "text.network.encoder.layer.{layer}.intermediate.dense.weight"
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": found.count(layer, "layer"),
        "num_attention_heads": bert.get("num_attention_heads", width // HEAD_WIDTH),
        "intermediate_size": found.shape(layer, layer=0)[0],
        "max_position_embeddings": found.shape("text.network.embeddings.position_embeddings.weight")[0],
        "type_vocab_size": found.shape("text.network.embeddings.token_type_embeddings.weight")[0],
    }
    return BertConfig(architecture={"model_type": "bert", **sizes})
