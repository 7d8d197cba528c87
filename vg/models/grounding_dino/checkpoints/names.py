"""The name of every weight of vg in the published checkpoints: one table for both directions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch

from vg.models.grounding_dino.config import GroundingDinoConfig

Foreign = Literal["official", "transformers", "mmdet"]
Dialect = Literal["vg", "official", "transformers", "mmdet"]

# Columns: vg, official, transformers, mmdetection; a single column is valid for all four, the second of two for all but
# vg. `=` repeats the column of vg, `-` means that the dialect has no such weight. A line that ends with a dot is the
# prefix of the indented lines below it. `*` stands for weight and bias, `+` also for the statistics of a batch norm.
# `a|b|c` are row blocks of one tensor if the other side has a single name.
TABLE = """
neck.level_encoding  transformer.level_embed         model.level_embed         level_embed
text.projection.*    feat_map.*                      model.text_projection.*   text_feat_map.*
queries.content      transformer.tgt_embed.weight    model.query_position_embeddings.weight  query_embedding.weight
queries.memory_projection.*  transformer.enc_output.*       model.enc_output.*       memory_trans_fc.*
queries.memory_norm.*        transformer.enc_output_norm.*  model.enc_output_norm.*  memory_trans_norm.*
queries.  transformer.  model.  bbox_head.
    box_head.  enc_out_bbox_embed.layers.  encoder_output_bbox_embed.layers.  reg_branches.{decoder_layers}.
        0|2|4.*  0|1|2.*  0|1|2.*  =
    class_head.bias       -  encoder_output_class_embed.bias  cls_branches.{decoder_layers}.bias
    class_head.log_scale  -  -                                cls_branches.{decoder_layers}.log_scale
denoising.labels.weight  -  -  dn_query_generator.label_embedding.weight

decoder.  transformer.decoder.  model.decoder.  decoder.
    norm.*                =                             layer_norm.*                         =
    query_position.0|2.*  ref_point_head.layers.0|1.*   reference_points_head.layers.0|1.*   ref_point_head.layers.0|1.*
    layers.{layer}.
        self_attention.query|key|value.*  self_attn.in_proj_*  self_attn.query|key|value.*  self_attn.attn.in_proj_*
        self_attention.output.*  self_attn.out_proj.*  self_attn.out_proj.*          self_attn.attn.out_proj.*
        self_norm.*              norm2.*               self_attn_layer_norm.*        norms.0.*
        text_norm.*              catext_norm.*         encoder_attn_text_layer_norm.*  norms.1.*
        image_norm.*             norm1.*               encoder_attn_layer_norm.*     norms.2.*
        feedforward.0|2.*        linear1|linear2.*     fc1|fc2.*                     ffn.layers.0.0|ffn.layers.1.*
        feedforward_norm.*       norm3.*               final_layer_norm.*            norms.3.*
