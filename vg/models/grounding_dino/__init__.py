"""Grounding DINO: boxes for any number of phrases; model.py tells the story in reading order.

Where the equations are, and which settings choose between those that stand beside each other:

| equation | code | setting |
|---|---|---|
| sine positions, PE(p, 2i) = sin(p / T^(2i/d)) | vg.models.layers.sine_encoding | model.position_temperature |
| softmax attention, softmax(Q K' / sqrt(d)) V | attention.Attention | |
| multi-scale deformable attention, sum_lp A_lp x(p + dp_lp) | attention.DeformableAttention, vg.ops | model.points |
| bi-directional cross-attention of image and text | encoder.FusionLayer | model.fusion=bidirectional |
| gated fusion, alpha * image + (1 - alpha) * text | encoder.GatedFusionLayer | model.fusion=gated |
| query selection, top-N of max_t sim(image token, text token) | queries.QuerySelection | model.num_queries |
| similarity of classes: dot product q't | queries.ClassHead | model.classes.similarity=dot |
| similarity of classes: cosine q't / (|q| |t|) / temperature | queries.ClassHead | model.classes.similarity=cosine |
| refinement, sigmoid(logit(box) + MLP(query)) | decoder.Decoder | model.logit_eps |
| score of a phrase, mean or max over the tokens | answer.phrase_scores | model.predict.score |
| non-maximum suppression | vg.boxes.nms | model.predict.nms |
| Hungarian matching, argmin over assignments of the costs | vg.losses.matcher.match | model.loss.matching |
| focal loss, -alpha (1 - p)^gamma log p | vg.losses.terms.focal | model.loss.class_weight |
| L1 and generalised IoU of boxes | vg.losses.terms.l1, giou | model.loss.l1, model.loss.giou |
| contrastive alignment, -log softmax(q't / temperature) (InfoNCE) | vg.losses.terms.alignment | model.loss.alignment |
| contrastive denoising | denoising.Denoising | model.denoising |

Everything that is not a default of the published models is off unless a setting switches it on.
"""
