"""The set prediction loss (section 3.5; Carion et al. 2020): match queries, then classify tokens and regress boxes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vg.losses import terms
from vg.losses.config import LossConfig
from vg.losses.matcher import is_valid, match
from vg.types import LossName, PromptTargets


class DenoisingOutput(NamedTuple):
    """Predictions of M denoising queries per prompt."""

    logits: Tensor  # [L, R, M, T]
    boxes: Tensor  # [L, R, M, 4] cxcywh 0..1
    assignment: Tensor  # [R, M] int64, index of the box that a query reconstructs, -1 for background


class Supervised(NamedTuple):
    """Predictions that have a loss: of decoder layers, and of the encoder as one more layer."""

    factors: dict[tuple[str, int | None], float]  # (component, layer) of LossName -> factor of its terms; L entries
    logits: Tensor  # [L, R, Q, T]
    boxes: Tensor  # [L, R, Q, 4]


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
        denoising: DenoisingOutput | None = None,
        vectors: tuple[Tensor, Tensor] | None = None,
    ) -> dict[LossName, Tensor]:
        """Compute the weighted loss terms of one batch.

        Args:
            logits: [L, R, Q, T] of all decoder layers, the last layer last; values at padded tokens are ignored, padded
                queries are -inf.
            boxes: [L, R, Q, 4] cxcywh 0..1.
            mask: [R, T] bool, True = a real token.
            encoder: logits [R, Q, T] and boxes [R, Q, 4] of the image tokens selected as queries.
            vectors: queries of the last layer [R, Q, D] and text tokens [R, T, D] for the alignment loss.

        Returns:
            Weighted scalars: "class" and the box terms of every layer and component, "alignment" of the last layer.
            Terms with weight zero are left out.
        """
        with torch.autocast(logits.device.type, enabled=False):
            num_boxes, num_denoised = self._counts(targets, denoising)
            decoder = self._supervised(logits, boxes)
            # The encoder is matched with the decoder layers, because every call of `match` waits for the device.
            queries = decoder if encoder is None else self._with_encoder(decoder, *encoder)
            assignment = match(queries.logits, queries.boxes, targets, mask, self.config)  # [L, R, Q]
            losses = self._terms(queries, assignment, targets, mask, num_boxes)
            if vectors and self.config.alignment:
                last = len(decoder.factors) - 1
                positive = _gather_boxes(targets.positive_map, assignment[last])  # [R, Q, T]
                valid = is_valid(logits[-1], mask)
                alignment = terms.alignment(*vectors, positive, valid, self.config.alignment_temperature)  # [R]
                losses[LossName("alignment")] = self.config.alignment * alignment.sum() / num_boxes
            if denoising and self.config.denoising:
                noisy = self._supervised(denoising.logits, denoising.boxes, "denoising", self.config.denoising)
                losses |= self._terms(noisy, denoising.assignment[None], targets, mask, num_denoised)
        return losses

    def _supervised(self, logits: Tensor, boxes: Tensor, component: str = "", factor: float = 1.0) -> Supervised:
        """Select the decoder layers that have a loss: all of them, or the last one if `auxiliary` is 0."""
        auxiliary, layers = self.config.auxiliary * factor, range(len(logits) - 1)
        factors: dict[tuple[str, int | None], float] = {(component, layer): auxiliary for layer in layers if auxiliary}
        factors[component, None] = factor
        return Supervised(factors, logits[-len(factors) :], boxes[-len(factors) :])

    def _with_encoder(self, decoder: Supervised, logits: Tensor, boxes: Tensor) -> Supervised:
        return Supervised(
            {**decoder.factors, ("encoder", None): self.config.encoder},
            torch.cat((decoder.logits, logits[None])),
            torch.cat((decoder.boxes, boxes[None])),
        )

    @staticmethod
    def _counts(targets: PromptTargets, denoising: DenoisingOutput | None) -> Tensor:
        """[2] float32: the numbers of boxes and of denoised boxes, both at least 1; no synchronization with a GPU."""
        num_boxes = targets.mask.sum()
        num_denoised = (denoising.assignment >= 0).sum() if denoising else torch.zeros_like(num_boxes)
        return torch.stack((num_boxes, num_denoised)).float().clamp(min=1)

    def _terms(
        self, queries: Supervised, assignment: Tensor, targets: PromptTargets, mask: Tensor, count: Tensor
    ) -> dict[LossName, Tensor]:
        """Compute the terms of queries [L, R, Q] with an assignment [L or 1, R, Q]; sums are divided by `count`."""
        config = self.config
        factors, logits, boxes = queries
        matched = assignment >= 0  # [L, R, Q]
        positive = _gather_boxes(targets.positive_map, assignment)  # [L, R, Q, T], all False for unmatched queries
        target = _gather_boxes(targets.boxes, assignment)  # [L, R, Q, 4]
        valid = is_valid(logits, mask)  # [L, R, Q, T]
        logits = logits.float().masked_fill(~valid, 0.0)  # before the loss: infinite logits have no gradient
        values = {
            "class": (terms.focal(logits, positive, config.focal_alpha, config.focal_gamma) * valid).sum(dim=-1),
        }  # [L, R, Q] each
        values |= {t: x.where(matched, 0.0) for t, x in terms.box_terms(config, boxes.float(), target).items()}
        weights = {"class": config.class_weight, **config.box_weights()}
        used = [term for term in values if weights[term]]
        if not used:
            return {}
        # One stacked tensor: launching an operation per term would cost more than the arithmetic.
        weight = [[weights[term] * factor for factor in factors.values()] for term in used]
        scale = torch.tensor(weight, pin_memory=logits.is_cuda).to(
            logits.device, non_blocking=logits.device.type != "mps"
        )
        losses = scale * torch.stack([values[term].sum(dim=(1, 2)) for term in used]) / count  # [terms, L]
        names = [LossName(term, component, layer) for term in used for component, layer in factors]
        return dict(zip(names, losses.flatten().unbind(), strict=True))


def _gather_boxes(values: Tensor, assignment: Tensor) -> Tensor:
    """Values per box [R, N, C], assignment [..., R, Q] -> values of the matched boxes [..., R, Q, C], zeros for -1."""
    values = F.pad(values, (0, 0, 0, 1))  # [R, N + 1, C], so that index -1 reads zeros
    return values[torch.arange(len(values), device=values.device).unsqueeze(1), assignment]
