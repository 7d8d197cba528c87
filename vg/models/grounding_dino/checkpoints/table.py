"""The name of every weight of vg in the published checkpoints: one table for both directions."""

from __future__ import annotations

from typing import Literal, NamedTuple

Dialect = Literal["official", "transformers", "mmdet", "vg"]
Foreign = Literal["official", "transformers", "mmdet"]


class Section(NamedTuple):
    """Rows that share a prefix and are repeated in a loop, such as over layers (see `repeats` in names.py).

    The columns of a row are vg, official, transformers, mmdetection; a single column is valid for all four. `=` repeats
    the column of vg, `-` means that the dialect has no such weight, `*` stands for weight and bias, `+` also for the
    statistics of a batch norm. `a|b|c` are row blocks of one tensor if the other side has a single name.
    """

    loop: str
    vg: str
    official: str
    transformers: str
    mmdet: str
    rows: str


TABLE = (
    Section("model", "", "", "", "", """
        neck.level_encoding          transformer.level_embed         model.level_embed            level_embed
        text.projection.*            feat_map.*                      model.text_projection.*      text_feat_map.*
        queries.memory_projection.*  transformer.enc_output.*        model.enc_output.*           memory_trans_fc.*
        queries.memory_norm.*        transformer.enc_output_norm.*   model.enc_output_norm.*      memory_trans_norm.*
        queries.content  transformer.tgt_embed.weight  model.query_position_embeddings.weight  query_embedding.weight
        decoder.norm.*               transformer.decoder.norm.*      model.decoder.layer_norm.*   decoder.norm.*
        """),
    Section("model", "decoder.query_position.", "transformer.decoder.ref_point_head.layers.",
            "model.decoder.reference_points_head.layers.", "decoder.ref_point_head.layers.", """
        0.*  0.*  0.*  0.*
        2.*  1.*  1.*  1.*
        """),
    Section("model", "queries.box_head.", "transformer.enc_out_bbox_embed.layers.",
            "model.encoder_output_bbox_embed.layers.", "bbox_head.reg_branches.{decoder_layers}.", """
        0.*  0.*  0.*  0.*
        2.*  1.*  1.*  2.*
        4.*  2.*  2.*  4.*
        """),
    Section("class bias", "queries.class_head.", "", "model.encoder_output_class_embed.",
            "bbox_head.cls_branches.{decoder_layers}.", "bias  -  bias  bias"),
    Section("class scale", "queries.class_head.", "", "", "bbox_head.cls_branches.{decoder_layers}.",
            "log_scale  -  -  log_scale"),
    # A head shared by all decoder layers has one name in vg, but one name per layer elsewhere.
    Section("box head", "decoder.box_heads.{head}.", "bbox_embed.{layer}.layers.",
            "bbox_embed.{layer}.layers.", "bbox_head.reg_branches.{layer}.", """
        0.*  0.*  0.*  0.*
        2.*  1.*  1.*  2.*
        4.*  2.*  2.*  4.*
        """),
    Section("box head", "decoder.box_heads.{head}.", "transformer.decoder.bbox_embed.{layer}.layers.",
            "model.decoder.bbox_embed.{layer}.layers.", "", """
        0.*  0.*  0.*  -
        2.*  1.*  1.*  -
        4.*  2.*  2.*  -
        """),
    Section("class head bias", "decoder.class_heads.{head}.", "", "class_embed.{layer}.",
            "bbox_head.cls_branches.{layer}.", "bias  -  bias  bias"),
    Section("class head bias", "decoder.class_heads.{head}.", "", "model.decoder.class_embed.{layer}.", "",
            "bias  -  bias  -"),
    Section("class head scale", "decoder.class_heads.{head}.", "", "", "bbox_head.cls_branches.{layer}.",
            "log_scale  -  -  log_scale"),
    Section("denoising", "", "", "", "", "denoising.labels.weight  -  -  dn_query_generator.label_embedding.weight"),
    Section("decoder layer", "decoder.layers.{layer}.", "transformer.decoder.layers.{layer}.",
            "model.decoder.layers.{layer}.", "decoder.layers.{layer}.", """
        self_attention.query|key|value.*  self_attn.in_proj_*  self_attn.query|key|value.*  self_attn.attn.in_proj_*
        self_attention.output.*   self_attn.out_proj.*  self_attn.out_proj.*               self_attn.attn.out_proj.*
        self_norm.*               norm2.*               self_attn_layer_norm.*             norms.0.*
        text_norm.*               catext_norm.*         encoder_attn_text_layer_norm.*     norms.1.*
        image_norm.*              norm1.*               encoder_attn_layer_norm.*          norms.2.*
        feedforward.0.*           linear1.*             fc1.*                              ffn.layers.0.0.*
        feedforward.2.*           linear2.*             fc2.*                              ffn.layers.1.*
        feedforward_norm.*        norm3.*               final_layer_norm.*                 norms.3.*
        """),
    Section("decoder layer", "decoder.layers.{layer}.text_attention.", "transformer.decoder.layers.{layer}.ca_text.",
            "model.decoder.layers.{layer}.encoder_attn_text.", "decoder.layers.{layer}.cross_attn_text.attn.", """
        query|key|value.*  in_proj_*   =           in_proj_*
        output.*           out_proj.*  out_proj.*  out_proj.*
        """),
    Section("decoder layer", "decoder.layers.{layer}.image_attention.",
            "transformer.decoder.layers.{layer}.cross_attn.", "model.decoder.layers.{layer}.encoder_attn.",
            "decoder.layers.{layer}.cross_attn.", """
        offsets.*  sampling_offsets.*   sampling_offsets.*   sampling_offsets.*
        weights.*  attention_weights.*  attention_weights.*  attention_weights.*
        value.*    value_proj.*         value_proj.*         value_proj.*
        output.*   output_proj.*        output_proj.*        output_proj.*
        """),
    Section("encoder layer", "encoder.layers.{layer}.fusion.", "transformer.encoder.fusion_layers.{layer}.",
            "model.encoder.layers.{layer}.fusion_layer.", "encoder.fusion_layers.{layer}.", """
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
        """),
    Section("encoder layer", "encoder.layers.{layer}.text.", "transformer.encoder.text_layers.{layer}.",
            "model.encoder.layers.{layer}.text_enhancer_layer.", "encoder.text_layers.{layer}.", """
        attention.query|key|value.*  self_attn.in_proj_*  self_attn.query|key|value.*  self_attn.attn.in_proj_*
        attention.output.*           self_attn.out_proj.* self_attn.out_proj.*         self_attn.attn.out_proj.*
        attention_norm.*             norm1.*              layer_norm_before.*          norms.0.*
        feedforward.0.*              linear1.*            fc1.*                        ffn.layers.0.0.*
        feedforward.2.*              linear2.*            fc2.*                        ffn.layers.1.*
        feedforward_norm.*           norm2.*              layer_norm_after.*           norms.1.*
        """),
    Section("encoder layer", "encoder.layers.{layer}.image.", "transformer.encoder.layers.{layer}.",
            "model.encoder.layers.{layer}.deformable_layer.", "encoder.layers.{layer}.", """
        attention.offsets.*  self_attn.sampling_offsets.*   self_attn.sampling_offsets.*   self_attn.sampling_offsets.*
        attention.weights.*  self_attn.attention_weights.*  self_attn.attention_weights.*  self_attn.attention_weights.*
        attention.value.*    self_attn.value_proj.*         self_attn.value_proj.*         self_attn.value_proj.*
        attention.output.*   self_attn.output_proj.*        self_attn.output_proj.*        self_attn.output_proj.*
        attention_norm.*     norm1.*                        self_attn_layer_norm.*         norms.0.*
        feedforward.0.*      linear1.*                      fc1.*                          ffn.layers.0.0.*
        feedforward.2.*      linear2.*                      fc2.*                          ffn.layers.1.*
        feedforward_norm.*   norm2.*                        final_layer_norm.*             norms.1.*
        """),
    Section("level", "neck.projections.{level}.", "input_proj.{level}.", "model.input_proj_vision.{level}.",
            "neck.convs.{level}.", """
        0.*  0.*  0.*  conv.*
        1.*  1.*  1.*  gn.*
        """),
    Section("extra level", "neck.projections.{level}.", "input_proj.{level}.", "model.input_proj_vision.{level}.",
            "neck.extra_convs.{extra}.", """
        0.*  0.*  0.*  conv.*
        1.*  1.*  1.*  gn.*
        """),
    Section("swin", "backbone.network.embeddings.", "backbone.0.patch_embed.",
            "model.backbone.conv_encoder.model.embeddings.", "backbone.patch_embed.", """
        patch_embeddings.projection.*  proj.*  =  projection.*
        norm.*                         norm.*  =  norm.*
        """),
    Section("swin block", "backbone.network.encoder.layers.{stage}.blocks.{block}.",
            "backbone.0.layers.{stage}.blocks.{block}.",
            "model.backbone.conv_encoder.model.encoder.layers.{stage}.blocks.{block}.",
            "backbone.stages.{stage}.blocks.{block}.", """
        layernorm_before.*        norm1.*      =  norm1.*
        attention.output.dense.*  attn.proj.*  =  attn.w_msa.proj.*
        layernorm_after.*         norm2.*      =  norm2.*
        intermediate.dense.*      mlp.fc1.*    =  ffn.layers.0.0.*
        output.dense.*            mlp.fc2.*    =  ffn.layers.1.*
        """),
    Section("swin block", "backbone.network.encoder.layers.{stage}.blocks.{block}.attention.self.",
            "backbone.0.layers.{stage}.blocks.{block}.attn.",
            "model.backbone.conv_encoder.model.encoder.layers.{stage}.blocks.{block}.attention.self.",
            "backbone.stages.{stage}.blocks.{block}.attn.w_msa.", """
        query|key|value.*  qkv.*  =  qkv.*
        relative_position_bias_table
        """),
    Section("swin merge", "backbone.network.encoder.layers.{stage}.downsample.",
            "backbone.0.layers.{stage}.downsample.",
            "model.backbone.conv_encoder.model.encoder.layers.{stage}.downsample.",
            "backbone.stages.{stage}.downsample.", """
        reduction.weight
        norm.*
        """),
    Section("swin output", "backbone.network.hidden_states_norms.stage{number}.", "backbone.0.norm{stage}.",
            "model.backbone.conv_encoder.model.hidden_states_norms.stage{number}.", "backbone.norm{stage}.", "*"),
    Section("resnet", "backbone.network.embedder.embedder.", "backbone.0.body.",
            "model.backbone.conv_encoder.model.embedder.embedder.", "backbone.", """
        convolution.weight  conv1.weight  =  conv1.weight
        normalization.+     bn1.+         =  bn1.+
        """),
    Section("resnet block", "backbone.network.encoder.stages.{stage}.layers.{block}.layer.",
            "backbone.0.body.layer{number}.{block}.",
            "model.backbone.conv_encoder.model.encoder.stages.{stage}.layers.{block}.layer.",
            "backbone.layer{number}.{block}.", """
        0.convolution.weight  conv1.weight  =  conv1.weight
        0.normalization.+     bn1.+         =  bn1.+
        1.convolution.weight  conv2.weight  =  conv2.weight
        1.normalization.+     bn2.+         =  bn2.+
        2.convolution.weight  conv3.weight  =  conv3.weight
        2.normalization.+     bn3.+         =  bn3.+
        """),
    Section("resnet stage", "backbone.network.encoder.stages.{stage}.layers.0.shortcut.",
            "backbone.0.body.layer{number}.0.downsample.",
            "model.backbone.conv_encoder.model.encoder.stages.{stage}.layers.0.shortcut.",
            "backbone.layer{number}.0.downsample.", """
        convolution.weight  0.weight  =  0.weight
        normalization.+     1.+       =  1.+
        """),
    Section("model", "text.network.embeddings.", "bert.embeddings.", "model.text_backbone.embeddings.",
            "language_model.language_backbone.body.model.embeddings.", """
        word_embeddings.weight
        position_embeddings.weight
        token_type_embeddings.weight
        LayerNorm.*
        """),
    Section("text layer", "text.network.encoder.layer.{layer}.", "bert.encoder.layer.{layer}.",
            "model.text_backbone.encoder.layer.{layer}.",
            "language_model.language_backbone.body.model.encoder.layer.{layer}.", """
        attention.self.query.*
        attention.self.key.*
        attention.self.value.*
        attention.output.dense.*
        attention.output.LayerNorm.*
        intermediate.dense.*
        output.dense.*
        output.LayerNorm.*
        """),
)  # fmt: skip

IGNORABLE = {
    "official": r".*\.relative_position_index|bert\.pooler\..*|bert\.embeddings\.position_ids|label_enc\.weight",
    # The last line is of LLMDet (Fu et al. 2025), whose language model is used in training only.
    "transformers": r".*\.relative_position_index|.*\.num_batches_tracked|.*text_backbone\.pooler\..*"
    r"|.*\.position_ids|model\.backbone\.conv_encoder\.model\.(swin\.)?layernorm\..*"
    r"|(lmm|connector|region_connector|image_seperate|ref_point_head)[._].*",
    "mmdet": r".*\.relative_position_index|.*\.num_batches_tracked|.*\.model\.pooler\..*|.*\.position_ids"
    r"|dn_query_generator\.label_embedding\.weight"
    r"|(lmm|connector|region_connector|image_seperate|ref_point_head)[._].*",
}
"""Tensors to ignore, as regular expressions of full names: computed buffers and unused modules."""
