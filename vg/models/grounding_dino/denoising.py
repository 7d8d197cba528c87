"""Contrastive denoising (DINO, Zhang et al. 2022): further queries learn to reconstruct boxes from noisy ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vg import boxes as box_ops
from vg.models.grounding_dino.attention import inverse_sigmoid
from vg.models.grounding_dino.config import DenoisingConfig
from vg.types import PromptTargets

NUM_LABELS = 256  # of MM-Grounding-DINO, whose labels are positions in a sampled prompt


class DenoisingQueries(NamedTuple):
    """M denoising queries, which precede the Q matching queries."""

    content: Tensor  # [R, M, D]
    reference_logits: Tensor  # [R, M, 4] logits of noisy boxes cxcywh
    mask: Tensor  # [M + Q, M + Q] bool, True = the query of the row may attend to that of the column
    assignment: Tensor  # [R, M] int64, index of the box that a query reconstructs, -1 for background; for SetLoss


class Denoising(nn.Module):
    """Generate denoising queries as mmdetection does.

    Queries come in groups. In every group, each box of a prompt has a positive query, whose sides are off by up to
    half the box size, and a negative query, which is off by more and must predict background. Prompts with fewer boxes
    than others are padded with zero queries, which must predict background, too. The content of a query is an
    embedding of the phrase id, which is replaced at random in some queries.
    """

    def __init__(self, config: DenoisingConfig, width: int):
        super().__init__()
        self.config = config
        self.is_sized = config.num_labels is not None
        self.labels = nn.Embedding(config.num_labels or NUM_LABELS, width)

    def resize(self, num_labels: int) -> None:
        """Replace the label embedding by a random one of another size, which becomes part of the configuration."""
        if num_labels != self.labels.num_embeddings:
            self.labels = nn.Embedding(num_labels, self.labels.embedding_dim)
        self.config.num_labels = num_labels

    def forward(self, targets: PromptTargets, num_queries: int) -> DenoisingQueries:
        """Draw queries with torch's global generator; M = 0 if the batch has no boxes.

        Args:
            num_queries: Q, the number of matching queries.
        """
        num_rows, num_boxes = targets.phrase_ids.shape
        groups = max(1, self.config.num_queries // max(1, num_boxes))
        # M is flattened from [groups, positive or negative, N].
        shape = (num_rows, groups, 2, num_boxes)
        real = targets.mask[:, None, None].expand(shape)
        content = self.labels(self._noisy_labels(targets.phrase_ids[:, None, None].expand(shape)))  # [..., D]
        reference_logits = inverse_sigmoid(self._noisy_boxes(targets.boxes[:, None, None].expand(*shape, 4)), eps=1e-3)
        box = torch.arange(num_boxes, device=real.device).expand(shape)
        negative = torch.arange(2, device=real.device).view(2, 1) == 1
        return DenoisingQueries(
            content=(content * real.unsqueeze(-1)).flatten(1, 3),
            reference_logits=(reference_logits * real.unsqueeze(-1)).flatten(1, 3),
            mask=self._mask(groups, 2 * num_boxes, num_queries, real.device),
            assignment=box.masked_fill(~real | negative, -1).flatten(1),
        )

    def _noisy_labels(self, phrase_ids: Tensor) -> Tensor:
        """Replace labels at random with probability label_noise / 2; the new label may be the true one."""
        labels = phrase_ids % self.labels.num_embeddings
        random = torch.randint_like(labels, self.labels.num_embeddings)
        replaced = torch.rand(labels.shape, device=labels.device) < self.config.label_noise / 2
        return torch.where(replaced, random, labels)

    def _noisy_boxes(self, boxes: Tensor) -> Tensor:
        """Move the sides of boxes [R, groups, 2, N, 4] cxcywh, those of negative queries farther.

        The sides of a negative box may cross; inverse_sigmoid clamps its negative size to the smallest one.
        """
        amount = torch.rand_like(boxes)
        amount[:, :, 1] += 1
        sign = torch.randint_like(boxes, 2) * 2 - 1
        size = boxes[..., 2:].repeat(1, 1, 1, 1, 2)  # (w, h, w, h)
        sides = box_ops.cxcywh_to_xyxy(boxes) + sign * amount * size * self.config.box_noise / 2
        return box_ops.xyxy_to_cxcywh(sides.clamp(0, 1))

    @staticmethod
    def _mask(groups: int, group_size: int, num_queries: int, device: torch.device) -> Tensor:
        """Hide the queries of a group from all other queries: their boxes reveal the ground truth."""
        group = torch.arange(groups, device=device).repeat_interleave(group_size)  # [M]
        group = torch.cat((group, group.new_full((num_queries,), -1)))  # [M + Q]
        return (group < 0) | (group == group.unsqueeze(1))
