"""The set loss of DETR-like grounding: queries are matched with boxes and learn to name and to place them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vg.losses import terms
from vg.losses.config import LossConfig
from vg.losses.matcher import match
from vg.losses.targets import PromptTargets


class SetLoss:
    """Focal loss over text tokens, L1 and GIoU for every decoder layer, the encoder output and denoising queries.

    All sums are divided by the number of boxes, those of denoising by the number of boxes to restore.
    """

    def __init__(self, config: LossConfig):
        self.config = config

    def __call__(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: PromptTargets,
        mask: Tensor,
        encoder: tuple[Tensor, Tensor] | None = None,
        denoising: tuple[Tensor, Tensor, Tensor] | None = None,
        vectors: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Judge the answers of one batch.

        Args:
            logits: [L, R, Q, T] of the decoder layers, the last one last; anything at tokens that are none.
            boxes: [L, R, Q, 4] cxcywh 0..1.
            mask: [R, T] bool, True = a real token.
            encoder: logits [R, Q, T] and boxes [R, Q, 4] that the encoder proposed.
            denoising: logits [L, R, M, T] and boxes [L, R, M, 4] of the denoising queries, and which box each of them
                is to restore: [R, M] int64, -1 for none.
            vectors: of the queries of the last layer [R, Q, D] and of the text tokens [R, T, D], to be aligned.

        Returns:
            Weighted scalars: "class", "l1" and "giou" of the last layer, with "_layer0", "_layer1", ... of the ones
            before, "_encoder" of the encoder, "_denoising" and "_denoising_layer0", ... of denoising; "alignment".
        """
        with torch.autocast(logits.device.type, enabled=False):
            num_boxes, num_restored = self._counts(targets, denoising, logits.device)
            parts = self._layers(len(logits))
            logits, boxes = logits[-len(parts) :], boxes[-len(parts) :]
            if encoder and self.config.encoder:
                parts["_encoder"] = self.config.encoder
                logits, boxes = torch.cat((logits, encoder[0][None])), torch.cat((boxes, encoder[1][None]))
            assignment = match(logits, boxes, targets, mask, self.config)  # [L, R, Q]
            losses = self._terms(parts, logits, boxes, assignment, targets, mask, num_boxes)
            if vectors and self.config.alignment:
                named = _of_queries(targets.tokens, assignment[list(parts).index("")])  # [R, Q, T]
                alignment = terms.alignment(*vectors, named, mask, self.config.alignment_temperature)  # [R]
                losses["alignment"] = self.config.alignment * alignment.sum() / num_boxes
            if denoising and self.config.denoising:
                logits, boxes, restores = denoising
                parts = self._layers(len(logits), "_denoising", self.config.denoising)
                logits, boxes = logits[-len(parts) :], boxes[-len(parts) :]
                losses |= self._terms(parts, logits, boxes, restores[None], targets, mask, num_restored)
        return losses

    def _layers(self, number: int, part: str = "", factor: float = 1.0) -> dict[str, float]:
        """How the decoder layers that count are called in the names of terms, first to last, and their factors."""
        auxiliary = self.config.auxiliary * factor
        earlier = {f"{part}_layer{layer}": auxiliary for layer in range(number - 1)} if auxiliary else {}
        return earlier | {part: factor}

    def _counts(
        self, targets: PromptTargets, denoising: tuple[Tensor, Tensor, Tensor] | None, device: torch.device
    ) -> Tensor:
        """[2] float32: boxes and boxes to restore, each at least 1."""
        num_boxes = torch.tensor(sum(targets.counts), device=device)
        num_restored = (denoising[2] >= 0).sum() if denoising else torch.zeros_like(num_boxes)
        return torch.stack((num_boxes, num_restored)).float().clamp(min=1)

    def _terms(
        self,
        parts: dict[str, float],
        logits: Tensor,
        boxes: Tensor,
        assignment: Tensor,
        targets: PromptTargets,
        mask: Tensor,
        count: Tensor,
    ) -> dict[str, Tensor]:
        """The terms of queries [L, R, Q] with an assignment [L or 1, R, Q], one part of the loss for each layer."""
        config = self.config
        shows_box = assignment >= 0  # [L, R, Q]
        named = _of_queries(targets.tokens, assignment)  # [L, R, Q, T], all False where no box is shown
        target = _of_queries(targets.boxes, assignment)  # [L, R, Q, 4]
        real = mask.unsqueeze(1) & ~logits.isneginf()  # [L, R, Q, T]; a query that is none has -inf everywhere
        logits = logits.float().masked_fill(~real, 0.0)  # before the loss: infinite logits have no gradient
        values = {
            "class": (terms.focal(logits, named, config.focal_alpha, config.focal_gamma) * real).sum(dim=-1),
            "l1": terms.l1(boxes.float(), target).where(shows_box, 0.0),
            "giou": terms.giou(boxes.float(), target).where(shows_box, 0.0),
        }  # [L, R, Q] each
        weights = {"class": config.class_weight, "l1": config.l1, "giou": config.giou}
        return {
            f"{name}{part}": weights[name] * factor * value / count
            for name in values
            if weights[name]
            for (part, factor), value in zip(parts.items(), values[name].sum(dim=(1, 2)), strict=True)
        }


def _of_queries(values: Tensor, assignment: Tensor) -> Tensor:
    """Values of boxes [R, N, C], assignment [..., R, Q] -> [..., R, Q, C] of the box of each query, or zeros."""
    values = F.pad(values, (0, 0, 0, 1))  # [R, N + 1, C], so that number -1 is no box
    return values[torch.arange(len(values), device=values.device).unsqueeze(1), assignment]
