"""Postprocessing: from token logits and boxes of queries to phrase scores and boxes in pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from vg import boxes as box_ops
from vg.models.grounding_dino.config import PredictConfig
from vg.nms import nms
from vg.types import Batch, Prediction


def phrase_scores(logits: Tensor, phrase_tokens: Tensor, extra_tokens: Tensor, score: str) -> Tensor:
    """Compute the score of every query for every phrase.

    Args:
        logits: [R, Q, T]
        phrase_tokens: [R, P, T] bool
        extra_tokens: [R, T] bool, tokens that "max" also takes for every phrase.
        score: "mean" of the token probabilities of a phrase, as in the official COCO evaluation, or "max", as in
            mmdetection's REC evaluation.

    Returns:
        [R, Q, P] in 0..1, and -1 for phrases that are not in the prompt.
    """
    present = phrase_tokens.any(dim=-1).unsqueeze(1)  # [R, 1, P]
    probability = logits.sigmoid()
    if score == "mean":
        weights = phrase_tokens / phrase_tokens.sum(dim=-1, keepdim=True).clamp(min=1)  # [R, P, T]
        scores = probability @ weights.to(probability.dtype).mT
    else:
        tokens = phrase_tokens | extra_tokens.unsqueeze(1)
        if torch.compiler.is_exporting():  # with any number of phrases; takes P times the memory
            scores = probability.unsqueeze(2).masked_fill(~tokens.unsqueeze(1), 0).amax(dim=-1)
        else:
            highest = [probability.masked_fill(~x.unsqueeze(1), 0).amax(dim=-1) for x in tokens.unbind(dim=1)]
            scores = torch.stack(highest, dim=-1)
    return scores.masked_fill(~present, -1.0)


def best_pairs(boxes: Tensor, scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Select the pairs of query and phrase with the highest scores, best first; a query may be in several.

    Args:
        boxes: [B, Q, 4]
        scores: [B, Q, P]

    Returns:
        Boxes [B, K, 4], scores [B, K] and phrase ids [B, K]; K is `top_k`, or Q P if that is less.
    """
    num_phrases = scores.shape[2]
    top = scores.flatten(1).topk(torch.sym_min(top_k, scores.shape[1] * num_phrases))
    query = top.indices // num_phrases
    return boxes.take_along_dim(query.unsqueeze(-1), 1), top.values, top.indices - query * num_phrases


def postprocess(logits: Tensor, boxes: Tensor, batch: Batch, config: PredictConfig) -> list[Prediction]:
    """Select the top-k pairs of query and phrase of every image, over all its prompts.

    As in the COCO protocol, a query may be predicted for several phrases. Boxes are clipped to the image, as in
    mmdetection; the official COCO evaluation does not clip. The "max" score of an image with a single phrase is taken
    over all tokens of its prompt, [CLS], [SEP] and "." included (published rule of REC), but not if the phrase is a
    span of a caption.

    Args:
        logits: [R, Q, T]
        boxes: [R, Q, 4] cxcywh, 0..1 of the image without padding.

    Returns:
        One prediction per image: K <= top_k boxes [K, 4] xyxy in pixels of the original image, best first.
    """
    text = batch.text
    sample_ids = text.sample_ids.tolist()
    expressions = [len(target.phrases) == 1 and target.caption is None for target in batch.targets]
    single = torch.tensor([expressions[sample] for sample in sample_ids], device=text.mask.device)
    scores = phrase_scores(logits, text.phrase_tokens, text.mask & single.unsqueeze(1), config.score)  # [R, Q, P]
    predictions = []
    for sample_id, target in enumerate(batch.targets):
        rows = [row for row, other in enumerate(sample_ids) if other == sample_id]
        candidates = boxes[rows].flatten(0, 1)[None], scores[rows].flatten(0, 1)[None]  # of all prompts of the image
        best, values, phrase_ids = (x[0] for x in best_pairs(*candidates, config.top_k))
        # Drops absent phrases (-1) and padded queries (0); NaN passes, so that check_finite raises.
        kept = (~((values < config.threshold) | (values <= 0))).nonzero().squeeze(1)  # waits for the device once
        values, phrase_ids = values[kept], phrase_ids[kept]
        pixels = box_ops.to_pixels(best[kept], target.size)
        if config.nms is not None:
            arrays = [x.detach().cpu().numpy() for x in (pixels, values.float(), phrase_ids)]
            kept = torch.from_numpy(nms(arrays[0], arrays[1], config.nms, arrays[2])).to(pixels.device)
            pixels, values, phrase_ids = pixels[kept], values[kept], phrase_ids[kept]
        predictions.append(Prediction(target.id, pixels, values, phrase_ids, target.phrases))
    return predictions
