"""The dense head for expressions that name no object, one, or several: a probability and a box of every token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vg import boxes as box_ops
from vg.models.rec.config import DenseHeadConfig
from vg.models.rec.heads import DenseHead, DenseOutput

MAX_POSITIVES = 9  # tokens of an object, the number of candidates that ATSS selects (Zhang et al. 2020)
PRIOR = 0.01  # probability of a token before training, as in focal loss (Lin et al. 2017)
SAME_OBJECT = 0.5  # IoU above which a box is another prediction of an object that is found already


class AnyObjectsHead(DenseHead):
    """A DenseHead in which the score of a token is the probability that an object of the expression is there.

    Probabilities are learned by cross-entropy, a proper scoring rule, without weights that depend on the ground truth:
    these would shift them. An object has at most MAX_POSITIVES positive tokens, so that large ones do not dominate.
    """

    def __init__(self, config: DenseHeadConfig, vision_width: int, text_width: int):
        super().__init__(config, vision_width, text_width)
        nn.init.constant_(self.score.bias, math.log(PRIOR / (1 - PRIOR)))

    def loss(self, output: DenseOutput, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return means over the expressions: of the sum over tokens, and for boxes of the sum over objects."""
        target, mask = F.pad(target, (0, 0, 0, 1)), F.pad(mask, (0, 1))  # append one padded box, so that N >= 1
        positive = self.positive_tokens_of_many(output.centers, target, mask)  # [R, N, S]
        found = positive.any(dim=1)  # [R, S]
        entropy = F.binary_cross_entropy_with_logits(output.logits.float(), found.float(), reduction="none")
        # A token of several objects predicts the smallest one.
        areas = target[..., 2:].prod(dim=-1, keepdim=True)  # [R, N, 1]
        owner = torch.where(positive, areas, torch.inf).argmin(dim=1, keepdim=True)  # [R, 1, S]
        owned = torch.zeros_like(positive).scatter(1, owner, True) & positive  # [R, N, S]
        shares = (owned / owned.sum(dim=2, keepdim=True).clamp(min=1)).sum(dim=1)  # [R, S]
        target = target.gather(1, owner.squeeze(1).unsqueeze(-1).expand(-1, -1, 4))  # [R, S, 4]
        token = self.config.loss.token * entropy.sum(dim=1).mean()
        return {"token": token, **self._box_losses(output.boxes, target, shares)}

    @staticmethod
    def positive_tokens_of_many(centers: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Return the MAX_POSITIVES tokens closest to the center of each box, of those inside: [R, N, S] bool.

        As in DenseHead.positive_tokens, a box without any token inside gets the nearest one.
        """
        offset = (centers.unsqueeze(-3) - target[:, :, None, :2]).abs()  # [R, N, S, 2]
        count = min(MAX_POSITIVES, offset.shape[2])
        closest = offset.sum(dim=-1).topk(count, dim=2, largest=False).indices  # [R, N, count]
        inside = (offset <= target[:, :, None, 2:] / 2).all(dim=-1)
        positive = torch.zeros_like(inside).scatter(2, closest, True) & inside
        return positive.scatter(2, closest[..., :1], True) & mask.unsqueeze(-1)

    def select_boxes(self, output: DenseOutput, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Return boxes [R, K, 4] and their probabilities [R, K], best first, after non-maximum suppression.

        K is as in DenseHead; where fewer objects are found, the remaining boxes have probability 0.
        """
        scores, corners = output.logits.float().sigmoid(), box_ops.cxcywh_to_xyxy(output.boxes)  # [R, S], [R, S, 4]
        boxes, best_scores = [], []
        for _ in range(min(limit or self.config.num_boxes, scores.shape[1])):
            score, best = scores.max(dim=1, keepdim=True)  # [R, 1]
            row = best.unsqueeze(-1)  # [R, 1, 1]
            boxes.append(output.boxes.take_along_dim(row, 1))  # [R, 1, 4]
            best_scores.append(score)
            same = box_ops.iou(corners.take_along_dim(row, 1), corners) > SAME_OBJECT  # [R, S]
            scores = scores.masked_fill(same, 0.0).scatter(1, best, 0.0)
        return torch.cat(boxes, dim=1), torch.cat(best_scores, dim=1)
