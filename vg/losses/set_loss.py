"""The set prediction loss of DETR-like grounding: match queries with boxes, then classify tokens and regress boxes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vg.losses import terms
from vg.losses.config import LossConfig
from vg.losses.matcher import match
from vg.types import LossName, PromptTargets

Output = tuple[str, int | None]  # component and layer of LossName
Denoising = tuple[Tensor, Tensor, Tensor]


class SetLoss:
    """Focal loss over text tokens, L1 and GIoU for every decoder layer, the encoder output and denoising queries.

    Sums are divided by the number of boxes in the batch, those of denoising by the number of denoised boxes.
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
        denoising: Denoising | None = None,
        vectors: tuple[Tensor, Tensor] | None = None,
    ) -> dict[LossName, Tensor]:
        """Compute the weighted loss terms of one batch.

        Args:
            logits: [L, R, Q, T] of all decoder layers, the last layer last; values at padded tokens are ignored.
            boxes: [L, R, Q, 4] cxcywh 0..1.
            mask: [R, T] bool, True = a real token.
            encoder: logits [R, Q, T] and boxes [R, Q, 4] of the image tokens selected as queries.
            denoising: logits [L, R, M, T] and boxes [L, R, M, 4] of the denoising queries, and their assignment
                [R, M] int64: the index of the box that each of them reconstructs, -1 for background.
            vectors: queries of the last layer [R, Q, D] and text tokens [R, T, D] for the alignment loss.

        Returns:
            Weighted scalars: "class" and the box terms of every layer and component, "alignment" of the last layer.
            Terms with weight zero are left out.
        """
        with torch.autocast(logits.device.type, enabled=False):
            num_boxes, num_denoised = self._counts(targets, denoising)
            factors = self._layer_factors(len(logits))
            logits, boxes = logits[-len(factors) :], boxes[-len(factors) :]
            last = len(factors) - 1
            if encoder and self.config.encoder:
                factors["encoder", None] = self.config.encoder
                logits, boxes = torch.cat((logits, encoder[0][None])), torch.cat((boxes, encoder[1][None]))
            assignment = match(logits, boxes, targets, mask, self.config)  # [L, R, Q]
            losses = self._terms(factors, logits, boxes, assignment, targets, mask, num_boxes)
            if vectors and self.config.alignment:
                positive = _gather_boxes(targets.positive_map, assignment[last])  # [R, Q, T]
                alignment = terms.alignment(*vectors, positive, mask, self.config.alignment_temperature)  # [R]
                losses[LossName("alignment")] = self.config.alignment * alignment.sum() / num_boxes
            if denoising and self.config.denoising:
                logits, boxes, assignment = denoising
                factors = self._layer_factors(len(logits), "denoising", self.config.denoising)
                logits, boxes = logits[-len(factors) :], boxes[-len(factors) :]
                losses |= self._terms(factors, logits, boxes, assignment[None], targets, mask, num_denoised)
        return losses

    def _layer_factors(self, num_layers: int, component: str = "", factor: float = 1.0) -> dict[Output, float]:
        """The decoder layers that are supervised, first to last, each with the factor of its terms."""
        auxiliary = self.config.auxiliary * factor
        earlier: dict[Output, float] = {(component, layer): auxiliary for layer in range(num_layers - 1) if auxiliary}
        return earlier | {(component, None): factor}

    @staticmethod
    def _counts(targets: PromptTargets, denoising: Denoising | None) -> Tensor:
        """[2] float32: the numbers of boxes and of denoised boxes, both at least 1; no synchronization with a GPU."""
        num_boxes = targets.mask.sum()
        num_denoised = (denoising[2] >= 0).sum() if denoising else torch.zeros_like(num_boxes)
        return torch.stack((num_boxes, num_denoised)).float().clamp(min=1)

    def _terms(
        self,
        factors: dict[Output, float],
        logits: Tensor,
        boxes: Tensor,
        assignment: Tensor,
        targets: PromptTargets,
        mask: Tensor,
        count: Tensor,
    ) -> dict[LossName, Tensor]:
        """The terms of queries [L, R, Q] with an assignment [L or 1, R, Q]; `factors` has one entry for each layer."""
        config = self.config
        matched = assignment >= 0  # [L, R, Q]
        positive = _gather_boxes(targets.positive_map, assignment)  # [L, R, Q, T], all False for unmatched queries
        target = _gather_boxes(targets.boxes, assignment)  # [L, R, Q, 4]
        valid = mask.unsqueeze(1) & ~logits.isneginf()  # [L, R, Q, T]; padded queries are -inf everywhere
        logits = logits.float().masked_fill(~valid, 0.0)  # before the loss: infinite logits have no gradient
        values = {
            "class": (terms.focal(logits, positive, config.focal_alpha, config.focal_gamma) * valid).sum(dim=-1),
        }  # [L, R, Q] each
        values |= {t: x.where(matched, 0.0) for t, x in terms.box_terms(config, boxes.float(), target).items()}
        weights = {"class": config.class_weight} | vars(config)
        used = [term for term in values if weights[term]]
        if not used:
            return {}
        # All terms as one tensor, because an operation per term costs more time than the term.
        weight = [[weights[term] * factor for factor in factors.values()] for term in used]
        scale = torch.tensor(weight, pin_memory=logits.is_cuda).to(
            logits.device, non_blocking=logits.device.type != "mps"
        )
        losses = scale * torch.stack([values[term].sum(dim=(1, 2)) for term in used]) / count  # [terms, L]
        names = [LossName(term, *output) for term in used for output in factors]
        return dict(zip(names, losses.flatten().unbind(), strict=True))


def _gather_boxes(values: Tensor, assignment: Tensor) -> Tensor:
    """Values per box [R, N, C], assignment [..., R, Q] -> values of the matched boxes [..., R, Q, C], zeros for -1."""
    values = F.pad(values, (0, 0, 0, 1))  # [R, N + 1, C], so that index -1 reads zeros
    return values[torch.arange(len(values), device=values.device).unsqueeze(1), assignment]
