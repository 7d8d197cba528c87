"""The cross-modality decoder: queries attend to each other, the text and the image, and refine boxes (section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vg.models.grounding_dino.attention import (
    Attention,
    DeformableAttention,
    FeedForward,
    additive_mask,
    inverse_sigmoid,
)
from vg.models.grounding_dino.backbone import ImageFeatures
from vg.models.grounding_dino.config import GroundingDinoConfig
from vg.models.grounding_dino.heads import BoxHead, ClassHead
from vg.models.grounding_dino.text_encoder import TextFeatures
from vg.models.layers import MLP, sine_encoding


class DecoderLayer(nn.Module):
    """Self-attention, text and image cross-attention, and a feed-forward network: a post-norm transformer layer.

    The paper has image before text cross-attention; the official code and all checkpoints have text first, as here.
    """

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.dropout = config.dropout
        self.self_attention = Attention(config.width, config.heads, config.dropout)
        self.text_attention = Attention(config.width, config.heads, config.dropout)
        self.image_attention = DeformableAttention(config.width, config.heads, config.levels, config.points)
        self.feedforward = FeedForward(config.width, config.feedforward, config.dropout)
        self.self_norm, self.text_norm, self.image_norm, self.feedforward_norm = (
            nn.LayerNorm(config.width) for _ in range(4)
        )

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        references: Tensor,
        image: ImageFeatures,
        text: TextFeatures,
        mask: Tensor | None,
    ) -> Tensor:
        """Return [R, Q, D].

        Args:
            x: [R, Q, D]
            positions: [R, Q, D], added to queries and to the keys of self-attention.
            references: [R, Q, levels or 1, 4] boxes cxcywh, 0..1 of the padded image.
            mask: broadcasts to [R, heads, Q, Q]; see additive_mask.
        """
        query = x + positions
        x = self.self_norm(x + self._drop(self.self_attention(query, query, x, mask)))
        text_mask = text.mask[:, None, None]  # [R, 1, 1, T]
        x = self.text_norm(x + self._drop(self.text_attention(x + positions, text.tokens, text.tokens, text_mask)))
        attended = self.image_attention(x + positions, references, image.tokens, image.shapes, image.mask)
        x = self.image_norm(x + self._drop(attended))
        return self.feedforward_norm(x + self._drop(self.feedforward(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class CrossModalityDecoder(nn.Module):
    """All layers of the decoder: every layer refines the boxes of the one before it and gives token logits."""

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width)
        self.query_position = MLP(2 * config.width, config.width, config.width)
        heads = 1 if config.shared_heads else config.decoder_layers
        self.box_heads = nn.ModuleList(BoxHead(config.width) for _ in range(heads))
        self.class_heads = nn.ModuleList(ClassHead(config.classes, config.width) for _ in range(heads))
        self.refine_eps, self.predict_eps = config.logit_eps
        self.mix_sizes = config.image.mix_sizes
        self.checkpointing = config.gradient_checkpointing

    def forward(
        self,
        content: Tensor,
        reference_logits: Tensor,
        image: ImageFeatures,
        text: TextFeatures,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode the queries.

        Args:
            content: [R, Q, D]
            reference_logits: [R, Q, 4] logits of boxes cxcywh, detached.
            mask: bool, broadcasts to [R, heads, Q, Q], True = the query of the row may attend to that of the column;
                None for no restriction.

        Returns:
            logits [L, R, Q, T], boxes [L, R, Q, 4] cxcywh 0..1, and the queries after the last layer [R, Q, D].
            L are all layers in training, and the last layer in evaluation.
        """
        logits, boxes = [], []
        # The content is expanded: its stride is 0, for which torch.compile would compile the layer again.
        x = content.contiguous()
        reference = reference_logits.sigmoid()  # [R, Q, 4]
        for index, layer in enumerate(self.layers):
            # One head for all layers, or one for each.
            box_head, class_head = (heads[index % len(heads)] for heads in (self.box_heads, self.class_heads))
            by_level = self._by_level(reference.detach(), image)
            # Published models encode positions in the padded image, which depend on the batch.
            positions = self._positions(by_level[:, :, 0] if self.mix_sizes else reference.detach())
            if mask is not None and index == 0:  # `positions` have the dtype of the queries, also under autocast
                mask = additive_mask(mask, positions.dtype)
            inputs = (x, positions, by_level, image, text, mask)
            x = (
                checkpoint(layer, *inputs, use_reentrant=False)
                if self.checkpointing and self.training
                else layer(*inputs)
            )
            if self.training or index == len(self.layers) - 1:
                # The prediction reads the normalized query, and its gradient reaches the layer before through the
                # reference ("look forward twice", DINO). The next reference reads the query without norm (published
                # quirk).
                queries = self.norm(x)
                boxes.append((box_head(queries) + inverse_sigmoid(reference, self.predict_eps)).sigmoid())
                logits.append(class_head(queries, text))
            if index < len(self.layers) - 1:
                reference = (box_head(x) + inverse_sigmoid(reference.detach(), self.refine_eps)).sigmoid()
        return torch.stack(logits), torch.stack(boxes), queries

    def _positions(self, reference: Tensor) -> Tensor:
        """[R, Q, 4] -> [R, Q, D]; the coordinates are encoded in the order y, x, width, height."""
        order = torch.cat((reference[..., :2].flip(-1), reference[..., 2:]), dim=-1)
        width = self.norm.normalized_shape[0]
        return self.query_position(sine_encoding(order, 2 * width, 10000.0, interleaved=True))

    @staticmethod
    def _by_level(reference: Tensor, image: ImageFeatures) -> Tensor:
        """[R, Q, 4] in 0..1 of the image -> [R, Q, levels or 1, 4] in 0..1 of each padded level."""
        if image.mask is None:
            return reference.unsqueeze(2)
        return reference.unsqueeze(2) * image.valid_ratios.repeat(1, 1, 2).unsqueeze(1)
