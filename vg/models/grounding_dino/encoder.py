"""The feature enhancer: six times, image and text look at each other, then each at itself (section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vg.models.grounding_dino.attention import Attention, DeformableAttention, FeedForward, drop_path
from vg.models.grounding_dino.config import GroundingDinoConfig
from vg.models.grounding_dino.image import ImageFeatures
from vg.models.grounding_dino.text import TextFeatures

TOKENS_AT_ONCE = 1024


def in_parts(*streams: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors [R, S, ...] along S where that pays: what a layer makes of a part stays in the cache of a CPU."""
    if streams[0].device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return [streams]
    size = max(1, TOKENS_AT_ONCE // len(streams[0]))
    return list(zip(*(x.split(size, dim=1) for x in streams), strict=True))


class Factor(nn.Linear):
    """A linear map that is never called, for its weights go into another one; so what wraps calls would do nothing."""


class FusionLayer(nn.Module):
    """Bi-directional cross-attention: one table of similarities, read by rows for the image, by columns for the text.

    The published module projects all image tokens three times (query, value, output) to `feedforward / 2` channels.
    There are thousands of them and few text tokens, so these matrices are multiplied with the text first:
    X Wq K' = X (Wq K'), P (X Wv) = (P X) Wv, P (V Wo) is P times one [T, D] matrix per head. Weights and results are
    the same but for rounding (and for the bias of the image values, which dropout of P does not scale).
    """

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        width, inner = config.width, config.feedforward // 2
        self.heads = config.heads // 2
        self.dropout = config.fusion_dropout
        self.drop_path = config.fusion_drop_path
        self.image_norm = nn.LayerNorm(width)
        self.text_norm = nn.LayerNorm(width)
        self.image_query, self.text_key = Factor(width, inner), nn.Linear(width, inner)
        self.image_value, self.text_value = Factor(width, inner), nn.Linear(width, inner)
        self.image_output, self.text_output = Factor(inner, width), nn.Linear(inner, width)
        self.image_gate = nn.Parameter(torch.full((width,), 1e-4))
        self.text_gate = nn.Parameter(torch.full((width,), 1e-4))

    def reset_parameters(self) -> None:
        for projection in self.children():
            if isinstance(projection, nn.Linear):
                nn.init.zeros_(projection.bias)

    def forward(
        self, image: Tensor, text: Tensor, image_mask: Tensor | None, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[R, S, D], [R, T, D], masks [R, S] and [R, T] bool (False = padding) -> the two streams, enhanced.

        The sum starts from the normalised stream, not from the input, in every published implementation.
        """
        image, text = self.image_norm(image), self.text_norm(text)
        for_image, for_text = self.attend(image, text, image_mask, text_mask)
        return self.join_image(image, for_image), self.join_text(text, for_text)

    def join_image(self, image: Tensor, attended: Tensor) -> Tensor:
        return image + drop_path(self.image_gate * attended, self.drop_path, self.training)

    def join_text(self, text: Tensor, attended: Tensor) -> Tensor:
        return text + drop_path(self.text_gate * attended, self.drop_path, self.training)

    def attend(
        self, image: Tensor, text: Tensor, image_mask: Tensor | None, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What image tokens take from the text [R, S, D], and text tokens from the image [R, T, D]."""

        def by_head(x: Tensor, dim: int = -1) -> Tensor:  # inner channels -> heads, channels of a head
            return x.unflatten(dim, (self.heads, -1))

        key, value = by_head(self.text_key(text)), by_head(self.text_value(text))  # [R, T, heads, d]
        key = key * key.shape[-1] ** -0.5
        directions = torch.einsum("rthd,hdc->rhtc", key, by_head(self.image_query.weight, 0)).flatten(1, 2)
        offset = torch.einsum("rthd,hd->rht", key, by_head(self.image_query.bias, 0)).flatten(1).unsqueeze(1)
        outputs = torch.einsum("rthd,chd->rhtc", value, by_head(self.image_output.weight)).flatten(1, 2)
        lowest = torch.finfo(offset.dtype).min / 2
        no_padding = torch.zeros_like(text_mask, dtype=offset.dtype).masked_fill(~text_mask, lowest)[:, None, None]

        # The softmax over image tokens is summed up part by part (as in flash attention), relative to the best so far.
        best = offset.new_full(offset.shape, -torch.inf, dtype=torch.float32)  # [R, 1, heads * T]
        total = torch.zeros_like(best)
        seen = torch.zeros_like(directions, dtype=torch.float32)  # [R, heads * T, D]
        for_image = []
        for tokens, *inside in in_parts(image) if image_mask is None else in_parts(image, image_mask):
            scores = torch.baddbmm(offset, tokens, directions.mT)  # [R, part of S, heads * T]
            if scores.dtype == torch.float16:
                scores = scores.clamp(-50000, 50000)  # infinity minus infinity would be NaN
            over_text = (by_head(scores) + no_padding).softmax(dim=-1)  # [R, part of S, heads, T]
            over_text = F.dropout(over_text, self.dropout, self.training).flatten(2)
            for_image.append(torch.baddbmm(self.image_output.bias, over_text, outputs))  # [R, part of S, D]

            for mask in inside:
                scores = scores.masked_fill(~mask.unsqueeze(-1), lowest)
            before, best = best, torch.maximum(best, scores.detach().amax(dim=1, keepdim=True))
            shrink, weights = (before - best).exp(), (scores - best).exp()
            total = total * shrink + weights.sum(dim=1, keepdim=True)
            share = weights.sum(dim=1, keepdim=True).clamp(min=1e-30)  # half precision holds means, but not these sums
            means = F.dropout(weights / share, self.dropout, self.training).to(tokens.dtype).mT @ tokens
            seen = seen * shrink.mT + share.mT * means
        seen = by_head((seen / total.mT).to(image.dtype), 1)  # [R, heads, T, D]
        seen = torch.einsum("rhtc,hdc->rthd", seen, by_head(self.image_value.weight, 0)).flatten(2)
        return torch.cat(for_image, dim=1), self.text_output(seen + self.image_value.bias)


class GatedFusionLayer(FusionLayer):
    """The same attention, mixed in by a learned share per channel: alpha * own + (1 - alpha) * attended."""

    def __init__(self, config: GroundingDinoConfig):
        super().__init__(config)
        del self.image_gate, self.text_gate
        self.image_alpha = nn.Linear(2 * config.width, config.width)
        self.text_alpha = nn.Linear(2 * config.width, config.width)

    def join_image(self, image: Tensor, attended: Tensor) -> Tensor:
        alpha = self.image_alpha(torch.cat((image, attended), dim=-1)).sigmoid()
        return alpha * image + (1 - alpha) * attended

    def join_text(self, text: Tensor, attended: Tensor) -> Tensor:
        alpha = self.text_alpha(torch.cat((text, attended), dim=-1)).sigmoid()
        return alpha * text + (1 - alpha) * attended


class TextLayer(nn.Module):
    """Text tokens attend to those of their own phrase; a post-norm transformer layer."""

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.attention = Attention(config.width, config.heads // 2)
        self.attention_norm = nn.LayerNorm(config.width)
        self.feedforward = FeedForward(config.width, config.feedforward // 2)
        self.feedforward_norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, text: TextFeatures) -> Tensor:
        """[R, T, D] -> [R, T, D]. (Official and mmdetection give the mask of one row to the heads of others.)"""
        query = x + text.positions
        x = self.attention_norm(x + self.attention(query, query, x, text.blocks.unsqueeze(1)))
        return self.feedforward_norm(x + self.feedforward(x))


class ImageLayer(nn.Module):
    """Image tokens sample the pyramid around themselves; a post-norm transformer layer with deformable attention."""

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.dropout = config.dropout
        self.attention = DeformableAttention(config.width, config.heads, config.levels, config.points)
        self.attention_norm = nn.LayerNorm(config.width)
        self.feedforward = FeedForward(config.width, config.feedforward, config.dropout)
        self.feedforward_norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, image: ImageFeatures, references: Tensor) -> Tensor:
        """[R, S, D] -> [R, S, D]; references: [R, S, L or 1, 2] where the tokens are in each padded level."""
        attended = self.attention(x + image.positions, references, x, image.shapes, image.mask)
        return torch.cat([self._add(*part) for part in in_parts(x, attended)], dim=1)

    def _add(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.attention_norm(x + F.dropout(attended, self.dropout, self.training))
        return self.feedforward_norm(x + F.dropout(self.feedforward(x), self.dropout, self.training))


class EncoderLayer(nn.Module):
    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.fusion = (FusionLayer if config.fusion == "bidirectional" else GatedFusionLayer)(config)
        self.text = TextLayer(config)
        self.image = ImageLayer(config)

    def forward(
        self, image_tokens: Tensor, text_tokens: Tensor, image: ImageFeatures, text: TextFeatures, references: Tensor
    ) -> tuple[Tensor, Tensor]:
        image_tokens, text_tokens = self.fusion(image_tokens, text_tokens, image.mask, text.mask)
        return self.image(image_tokens, image, references), self.text(text_tokens, text)


class FeatureEnhancer(nn.Module):
    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.checkpointing = config.gradient_checkpointing

    def forward(self, image: ImageFeatures, text: TextFeatures) -> tuple[ImageFeatures, TextFeatures]:
        """Returns the same features with enhanced tokens."""
        references = image.centers.unsqueeze(2)  # [R, S, 1, 2]
        if image.mask is not None:
            references = references * image.valid_ratios.unsqueeze(1)  # [R, S, L, 2]
        image_tokens, text_tokens = image.tokens, text.tokens
        for layer in self.layers:
            inputs = (image_tokens, text_tokens, image, text, references)
            if self.checkpointing and self.training:
                image_tokens, text_tokens = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                image_tokens, text_tokens = layer(*inputs)
        return image._replace(tokens=image_tokens), text._replace(tokens=text_tokens)
