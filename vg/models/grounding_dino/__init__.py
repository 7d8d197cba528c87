"""Grounding DINO: open-set detection, boxes for any number of phrases; read model.py first.

Where each equation is implemented, and the setting that belongs to it:

| equation | code | setting |
|---|---|---|
| sine encoding, PE(p, 2i) = sin(2 pi p / T^(2i/d)) | vg.models.layers.sine_encoding | model.position_temperature |
| softmax attention, softmax(Q K' / sqrt(d)) V | attention.Attention | model.heads |
| multi-scale deformable attention, sum_lp A_lp x(p + dp_lp) | attention.DeformableAttention, vg.ops | model.points |
| bi-directional cross-attention of image and text | feature_enhancer.FusionLayer | model.fusion=bidirectional |
| gated fusion, alpha * own + (1 - alpha) * attended | feature_enhancer.GatedFusionLayer | model.fusion=gated |
| query selection, top-N of max_t sim(image token, text token) | query_selection.QuerySelection | model.num_queries |
| class logits: dot product q't | heads.ClassHead | model.classes.similarity=dot |
| class logits: cosine q't / (|q| |t| temperature) | heads.ClassHead | model.classes.similarity=cosine, .scale=learned |
| box refinement, sigmoid(logit(box) + MLP(query)) | decoder.CrossModalityDecoder | model.logit_eps |
| score of a phrase, mean or max over its tokens | postprocess.phrase_scores | model.predict.score |
| non-maximum suppression | vg.nms.nms | model.predict.nms |
| Hungarian matching, argmin over assignments of the costs | vg.losses.matcher.match | model.loss.matching |
| focal loss, -alpha (1 - p)^gamma log p | vg.losses.terms.focal | model.loss.class_weight |
| L1 distance of boxes | vg.losses.terms.l1 | model.loss.l1 |
| generalized IoU of boxes | vg.losses.terms.giou | model.loss.giou |
| contrastive alignment, -log softmax(q't / temperature) (InfoNCE) | vg.losses.terms.alignment | model.loss.alignment |
| contrastive denoising | denoising.Denoising | model.denoising |

Options that no published model uses are off by default.
"""
