"""The name of every weight of vg in the published checkpoints: one table for both directions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from vg.models.grounding_dino.config import GroundingDinoConfig

if TYPE_CHECKING:
    from vg.models.grounding_dino.model import GroundingDino

Foreign = Literal["official", "transformers", "mmdet"]
CheckpointFormat = Literal["vg", Foreign]

# Columns: vg, official, transformers, mmdetection. A single column is valid for all four, the second of two columns for
# all but vg. A line that ends with a dot is a prefix of the indented lines below it.
# `=` repeats the column of vg, `-` means that the format has no such weight, `*` stands for weight and bias, `+` also
# for the statistics of a batch norm. `a|b|c` are several names, paired with those of the other side; if the other side
# has a single name, they are the row blocks of that tensor.
# A head shared by all decoder layers has one name in vg, but at least one name per layer elsewhere.
TABLE = """
neck.level_encoding          transformer.level_embed         model.level_embed            level_embed
text.projection.*            feat_map.*                      model.text_projection.*      text_feat_map.*
queries.memory_projection.*  transformer.enc_output.*        model.enc_output.*           memory_trans_fc.*
queries.memory_norm.*        transformer.enc_output_norm.*   model.enc_output_norm.*      memory_trans_norm.*
queries.content  transformer.tgt_embed.weight  model.query_position_embeddings.weight  query_embedding.weight
queries.  transformer.  model.  bbox_head.
    box_head.  enc_out_bbox_embed.layers.  encoder_output_bbox_embed.layers.  reg_branches.{decoder_layers}.
        0|2|4.*  0|1|2.*  0|1|2.*  =
    class_head.bias       -  encoder_output_class_embed.bias  cls_branches.{decoder_layers}.bias
    class_head.log_scale  -  -                                cls_branches.{decoder_layers}.log_scale
denoising.labels.weight  -  -  dn_query_generator.label_embedding.weight
neck.projections.{level}.  input_proj.{level}.  model.input_proj_vision.{level}.  neck.{convs}.
    0|1.*  =  =  conv|gn.*
decoder.  transformer.decoder.  model.decoder.  decoder.
    norm.*  =  layer_norm.*  =
    query_position.0|2.*  ref_point_head.layers.0|1.*  reference_points_head.layers.0|1.*  ref_point_head.layers.0|1.*
    layers.{layer}.
        self_attention.query|key|value.*  self_attn.in_proj_*  self_attn.query|key|value.*  self_attn.attn.in_proj_*
        self_attention.output.*   self_attn.out_proj.*  self_attn.out_proj.*               self_attn.attn.out_proj.*
        self_norm.*               norm2.*               self_attn_layer_norm.*             norms.0.*
        text_norm.*               catext_norm.*         encoder_attn_text_layer_norm.*     norms.1.*
        image_norm.*              norm1.*               encoder_attn_layer_norm.*          norms.2.*
        feedforward.0.*           linear1.*             fc1.*                              ffn.layers.0.0.*
        feedforward.2.*           linear2.*             fc2.*                              ffn.layers.1.*
        feedforward_norm.*        norm3.*               final_layer_norm.*                 norms.3.*
        text_attention.  ca_text.  encoder_attn_text.  cross_attn_text.attn.
            query|key|value.*  in_proj_*   =           in_proj_*
            output.*           out_proj.*
        image_attention.  cross_attn.  encoder_attn.  cross_attn.
            offsets.*  sampling_offsets.*
            weights.*  attention_weights.*
            value.*    value_proj.*
            output.*   output_proj.*
decoder.box_heads.{head}.  bbox_embed.{layer}.layers.  bbox_embed.{layer}.layers.  bbox_head.reg_branches.{layer}.
    0|2|4.*  0|1|2.*  0|1|2.*  =
decoder.box_heads.{head}.  transformer.decoder.bbox_embed.{layer}.layers.  model.decoder.bbox_embed.{layer}.layers.  -
    0|2|4.*  0|1|2.*  0|1|2.*  =
decoder.class_heads.{head}.bias  -  class_embed.{layer}.bias  bbox_head.cls_branches.{layer}.bias
decoder.class_heads.{head}.bias  -  model.decoder.class_embed.{layer}.bias  -
decoder.class_heads.{head}.log_scale  -  -  bbox_head.cls_branches.{layer}.log_scale
encoder.  transformer.encoder.  model.encoder.  encoder.
    layers.{layer}.fusion.  fusion_layers.{layer}.  layers.{layer}.fusion_layer.  fusion_layers.{layer}.
        image_norm.*    layer_norm_v.*        layer_norm_vision.*        layer_norm_v.*
        text_norm.*     layer_norm_l.*        layer_norm_text.*          layer_norm_l.*
        image_gate      gamma_v               vision_param               gamma_v
        text_gate       gamma_l               text_param                 gamma_l
        image_query.*   attn.v_proj.*         attn.vision_proj.*         attn.v_proj.*
        text_key.*      attn.l_proj.*         attn.text_proj.*           attn.l_proj.*
        image_value.*   attn.values_v_proj.*  attn.values_vision_proj.*  attn.values_v_proj.*
        text_value.*    attn.values_l_proj.*  attn.values_text_proj.*    attn.values_l_proj.*
        image_output.*  attn.out_v_proj.*     attn.out_vision_proj.*     attn.out_v_proj.*
        text_output.*   attn.out_l_proj.*     attn.out_text_proj.*       attn.out_l_proj.*
    layers.{layer}.text.  text_layers.{layer}.  layers.{layer}.text_enhancer_layer.  text_layers.{layer}.
        attention.query|key|value.*  self_attn.in_proj_*  self_attn.query|key|value.*  self_attn.attn.in_proj_*
        attention.output.*           self_attn.out_proj.* self_attn.out_proj.*         self_attn.attn.out_proj.*
        attention_norm.*             norm1.*              layer_norm_before.*          norms.0.*
        feedforward.0.*              linear1.*            fc1.*                        ffn.layers.0.0.*
        feedforward.2.*              linear2.*            fc2.*                        ffn.layers.1.*
        feedforward_norm.*           norm2.*              layer_norm_after.*           norms.1.*
    layers.{layer}.image.  layers.{layer}.  layers.{layer}.deformable_layer.  layers.{layer}.
        attention.offsets.*  self_attn.sampling_offsets.*
        attention.weights.*  self_attn.attention_weights.*
        attention.value.*    self_attn.value_proj.*
        attention.output.*   self_attn.output_proj.*
        attention_norm.*     norm1.*                 self_attn_layer_norm.*  norms.0.*
        feedforward.0.*      linear1.*               fc1.*                   ffn.layers.0.0.*
        feedforward.2.*      linear2.*               fc2.*                   ffn.layers.1.*
        feedforward_norm.*   norm2.*                 final_layer_norm.*      norms.1.*
backbone.network.  backbone.0.  model.backbone.conv_encoder.model.  backbone.
    embeddings.  patch_embed.  =  patch_embed.
        patch_embeddings.projection.*  proj.*  =  projection.*
        norm.*
    encoder.layers.{stage}.  layers.{stage}.  =  stages.{stage}.
        blocks.{block}.
            layernorm_before.*                norm1.*      =  norm1.*
            attention.self.query|key|value.*  attn.qkv.*   =  attn.w_msa.qkv.*
            attention.output.dense.*          attn.proj.*  =  attn.w_msa.proj.*
            layernorm_after.*                 norm2.*      =  norm2.*
            intermediate.dense.*              mlp.fc1.*    =  ffn.layers.0.0.*
            output.dense.*                    mlp.fc2.*    =  ffn.layers.1.*
            attention.self.  attn.  =  attn.w_msa.
                relative_position_bias_table
        downsample.reduction.weight
        downsample.norm.*
    hidden_states_norms.stage1|stage2|stage3|stage4.*  norm0|norm1|norm2|norm3.*  =  norm0|norm1|norm2|norm3.*
    embedder.embedder.convolution.weight  body.conv1.weight  =  conv1.weight
    embedder.embedder.normalization.+     body.bn1.+         =  bn1.+
    encoder.stages.{stage}.layers.{block}.  body.layer{number}.{block}.  =  layer{number}.{block}.
        layer.0|1|2.convolution.weight  conv1|conv2|conv3.weight  =  conv1|conv2|conv3.weight
        layer.0|1|2.normalization.+     bn1|bn2|bn3.+             =  bn1|bn2|bn3.+
        shortcut.convolution.weight     downsample.0.weight       =  downsample.0.weight
        shortcut.normalization.+        downsample.1.+            =  downsample.1.+
text.network.  bert.  model.text_backbone.  language_model.language_backbone.body.model.
    embeddings.word_embeddings|position_embeddings|token_type_embeddings.weight
    embeddings.LayerNorm.*
    encoder.layer.{layer}.
        attention.self.query|key|value.*
        attention.output.dense|LayerNorm.*
        intermediate.dense.*
        output.dense|LayerNorm.*
"""

# Tensors to ignore, as a regular expression of full names: computed buffers and unused modules.
IGNORABLE = (
    r".*\.(relative_position_index|num_batches_tracked|position_ids)|(bert|.*text_backbone|.*\.model)\.pooler\..*"
    r"|label_enc\.weight|model\.backbone\.conv_encoder\.model\.(swin\.)?layernorm\..*"
    # LLMDet (Fu et al. 2025), whose language model is used in training only
    r"|(lmm|connector|region_connector|image_seperate|ref_point_head)[._].*"
)

# Patch merging concatenates four neighbors. vg, official and transformers concatenate whole neighbors in the order
# (0, 0), (1, 0), (0, 1), (1, 1); mmdetection interleaves the channels of (0, 0), (0, 1), (1, 0), (1, 1).
MERGE_ORDER = [0, 2, 1, 3]


def on_meta(config: GroundingDinoConfig) -> GroundingDino:
    """Build a model whose weights have names and shapes, but no values."""
    with torch.device("meta"):
        return config.build(pretrained=False)


def tensor_names(model: GroundingDino, format: Foreign) -> dict[tuple[str, ...], list[str]]:
    """Map the names of all weights of a model to their names in a format.

    Returns:
        names in vg -> all names of the same tensor in the format, the most common first; empty if the format has no
        such weight. Several names in vg are row blocks of one tensor of the format, from top to bottom.
    """
    weights = model.own_state_dict()
    found: dict[tuple[str, ...], list[str]] = {}
    for own, theirs in rows(format):
        pattern = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(own[0])))
        for match in filter(None, map(pattern.fullmatch, weights)):
            numbers = {name: int(number) for name, number in match.groupdict().items()}
            names = found.setdefault(tuple(name.format(**numbers) for name in own), [])
            if theirs is not None:
                names += [theirs.format(**values) for values in _placeholders(numbers, model.config)]
    return found


def _placeholders(numbers: Mapping[str, int], config: GroundingDinoConfig) -> list[dict[str, object]]:
    """Add the placeholders that only other formats have; one result per name of the tensor."""
    level = numbers.get("level", 0)
    extra = level - len(config.backbone.stages)  # mmdetection counts the levels beyond the stages from 0
    convs = f"convs.{level}" if extra < 0 else f"extra_convs.{extra}"
    values = {**numbers, "number": numbers.get("stage", 0) + 1, "convs": convs, "decoder_layers": config.decoder_layers}
    if "head" not in numbers:
        return [values]
    layers = range(config.decoder_layers) if config.shared_heads else [numbers["head"]]
    return [{**values, "layer": layer} for layer in layers]


def rows(format: CheckpointFormat) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Yield (names in vg, name in the format or None), with placeholders such as {stage}."""
    prefixes: list[tuple[str, str | None]] = [("", "")]  # in vg and the format, by indentation
    for line in TABLE.strip().splitlines():
        vg, *foreign = line.split()
        word = [vg, *(foreign or ["="]) * 3][get_args(CheckpointFormat).index(format)]
        del prefixes[(len(line) - len(line.lstrip())) // 4 + 1 :]
        own, prefix = prefixes[-1][0] + vg, prefixes[-1][1]
        theirs = None if prefix is None or word == "-" else prefix + (vg if word == "=" else word)
        if vg.endswith("."):
            prefixes.append((own, theirs))
            continue
        for end in {"*": ("weight", "bias"), "+": ("weight", "bias", "running_mean", "running_var")}.get(vg[-1], ("",)):
            own_names = _alternatives(own.rstrip("*+") + end)
            names = _alternatives(theirs.rstrip("*+") + end) if theirs is not None else [None] * len(own_names)
            if len(names) == len(own_names):
                yield from (((own_name,), name) for own_name, name in zip(own_names, names, strict=True))
            else:
                yield tuple(own_names), names[0]


def _alternatives(name: str) -> list[str]:
    """a.b|c.d -> a.b.d, a.c.d"""
    found = re.search(r"\w+(\|\w+)+", name)
    return [name.replace(found[0], choice) for choice in found[0].split("|")] if found else [name]


def from_file(names: Sequence[str], tensor: Tensor, format: Foreign) -> dict[str, Tensor]:
    """Convert one tensor of a file into the weights of vg with these names."""
    if format == "mmdet" and ".downsample." in names[0]:
        tensor = tensor.unflatten(-1, (-1, 4)).mT[..., MERGE_ORDER, :].flatten(-2)  # [..., C, 4] -> [..., 4, C]
    if _is_class_scalar(names[0]):
        tensor = tensor.reshape(1)  # a scalar in transformers
    if len(names) == 1:
        return {names[0]: tensor}
    return {name: block.clone() for name, block in zip(names, tensor.chunk(len(names)), strict=True)}


def to_file(names: Sequence[str], weights: Sequence[Tensor], format: Foreign) -> Tensor:
    """Convert weights of vg into one tensor of a file; the inverse of from_file."""
    tensor = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    if format == "mmdet" and ".downsample." in names[0]:
        tensor = tensor.unflatten(-1, (4, -1))[..., MERGE_ORDER, :].mT.flatten(-2)
    if format == "transformers" and _is_class_scalar(names[0]):
        tensor = tensor.reshape(())
    return tensor.contiguous()


def _is_class_scalar(name: str) -> bool:
    return name.endswith((".log_scale", "class_head.bias")) or ".class_heads." in name
