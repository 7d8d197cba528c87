"""From the logits of queries and tokens to boxes in pixels, scored per phrase."""

from __future__ import annotations

import torch
from torch import Tensor

from vg import boxes as box_ops
from vg.models.grounding_dino.config import PredictConfig
from vg.types import Batch, Prediction


def phrase_scores(logits: Tensor, phrase_tokens: Tensor, everything: Tensor, score: str) -> Tensor:
    """How well each query fits each phrase.

    Args:
        logits: [R, Q, T]
        phrase_tokens: [R, P, T] bool
        everything: [R, T] bool, the tokens that count for a phrase which its image is asked for alone.
        score: "mean" over the probabilities of the tokens of a phrase, as the official COCO evaluation has it; "max"
            over them, or for a lone phrase over all tokens of its prompt, as mmdetection's REC evaluation has it.

    Returns:
        [R, Q, P] in 0..1, and -1 for phrases that are not in the prompt.
    """
    present = phrase_tokens.any(dim=-1).unsqueeze(1)  # [R, 1, P]
    probability = logits.sigmoid()
    if score == "mean":
        share = phrase_tokens / phrase_tokens.sum(dim=-1, keepdim=True).clamp(min=1)  # [R, P, T]
        scores = probability @ share.to(probability.dtype).mT
    else:
        tokens_of = (phrase_tokens | everything.unsqueeze(1)).unbind(dim=1)
        best = [probability.masked_fill(~tokens.unsqueeze(1), 0).amax(dim=-1) for tokens in tokens_of]
        scores = torch.stack(best, dim=-1)
    return scores.masked_fill(~present, -1.0)


def answers(logits: Tensor, boxes: Tensor, batch: Batch, config: PredictConfig) -> list[Prediction]:
    """The best pairs of box and phrase for each image: logits [R, Q, T], boxes [R, Q, 4] cxcywh 0..1.

    A query may answer several phrases (as the COCO protocol counts); all prompts of an image compete. Boxes are clipped
    to the image, as mmdetection does; the official COCO evaluation does not.
    """
    text = batch.text
    image_ids = text.image_ids.tolist()
    alone = torch.tensor([len(batch.targets[image].phrases) == 1 for image in image_ids], device=text.mask.device)
    everything = text.mask & alone.unsqueeze(1)
    scores = phrase_scores(logits, text.phrase_tokens, everything, config.score)  # [R, Q, P]
    predictions = []
    for index, target in enumerate(batch.targets):
        rows = [row for row, image in enumerate(image_ids) if image == index]
        own = scores[rows].flatten()  # [rows * Q * P]
        best = own.topk(min(config.top_k, len(own)))
        kept = (best.values >= config.threshold) & (best.values > 0)  # neither absent phrases nor absent queries
        values, places = best.values[kept], best.indices[kept]
        phrase_ids = places % scores.shape[2]
        pixels = box_ops.to_pixels(boxes[rows].flatten(0, 1)[places // scores.shape[2]], target.size)
        if config.nms is not None:
            kept = box_ops.nms(pixels, values, config.nms, phrase_ids)
            pixels, values, phrase_ids = pixels[kept], values[kept], phrase_ids[kept]
        predictions.append(Prediction(target.id, pixels, values, phrase_ids, target.phrases))
    return predictions
