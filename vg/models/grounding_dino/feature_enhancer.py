"""The feature enhancer: cross-attention between image and text, then self-attention in both (section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vg.models.grounding_dino.attention import Attention, DeformableAttention, FeedForward, drop_path
from vg.models.grounding_dino.backbone import ImageFeatures
from vg.models.grounding_dino.config import GroundingDinoConfig
from vg.models.grounding_dino.text_encoder import TextFeatures
from vg.models.layers import full_precision

CHUNK_TOKENS = 1024  # of all prompts together
LONG_PROMPT = 64  # tokens


def token_chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors [R, S, ...] along S for inference on a CPU, where the activations of a chunk fit into its cache."""
    if tensors[0].device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return [tensors]
    size = max(1, CHUNK_TOKENS // len(tensors[0]))
    return list(zip(*(x.split(size, dim=1) for x in tensors), strict=True))


class ImageNorm(nn.LayerNorm):
    """LayerNorm with float32 statistics that keeps tokens in bfloat16, which autocast would make float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if x.device.type != "cpu":  # only the kernel of the CPU takes tokens and weights of different dtypes
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)  # type: ignore[assignment]
        with full_precision(x):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class FoldedLinear(nn.Linear):
    """Linear whose weight is folded into another matmul; it is never called, so forward hooks and LoRA do not apply."""


def _lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min / 2


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Bias of attention scores [R, 1, 1, K] for keys [R, K]; finite, so that a row without any key is a mean."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, _lowest(dtype))[:, None, None]


class FusionLayer(nn.Module):
    """Bi-directional cross-attention: one similarity matrix, softmax over rows for the image, columns for the text.

    It is that of GLIP (Li et al. 2022, section 3.2), which Grounding DINO takes over. With image tokens X, text tokens
    T, and `feedforward / 2` inner channels, which heads of d channels share:

        A = (X Wq) (T Wk)' / sqrt(d)
        image = X + gate * softmax(A) (T Wv) Wo
        text = T + gate * softmax(A') (X Wv) Wo, with other gates, Wv and Wo

    `attend_unfolded` is this computation, `attend_folded` a cheaper one with the same weights.
    """

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        width, inner = config.width, config.feedforward // 2
        self.heads = config.heads // 2
        self.dropout = config.fusion_dropout
        self.drop_path = config.fusion_drop_path
        self.image_norm = ImageNorm(width)
        self.text_norm = nn.LayerNorm(width)
        self.image_query, self.text_key = FoldedLinear(width, inner), nn.Linear(width, inner)
        self.image_value, self.text_value = FoldedLinear(width, inner), nn.Linear(width, inner)
        self.image_output, self.text_output = FoldedLinear(inner, width), nn.Linear(inner, width)
        self.image_gate = nn.Parameter(torch.full((width,), 1e-4))
        self.text_gate = nn.Parameter(torch.full((width,), 1e-4))

    def reset_parameters(self) -> None:
        for projection in self.children():
            if isinstance(projection, nn.Linear):
                nn.init.zeros_(projection.bias)

    def forward(
        self, image: Tensor, text: Tensor, image_mask: Tensor | None, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[R, S, D], [R, T, D], masks [R, S] and [R, T] bool (False = padding) -> updated [R, S, D], [R, T, D].

        Published quirk, which all checkpoints are trained with: the residual is the normalized stream, not the input.
        """
        image, text = self.image_norm(image), self.text_norm(text)
        to_image, to_text = self.attend(image, text, image_mask, text_mask)
        return self.update_image(image, to_image), self.update_text(text, to_text)

    def update_image(self, image: Tensor, attended: Tensor) -> Tensor:
        return image + drop_path(self.image_gate.to(image.dtype) * attended, self.drop_path, self.training)

    def update_text(self, text: Tensor, attended: Tensor) -> Tensor:
        return text + drop_path(self.text_gate * attended, self.drop_path, self.training)

    def attend(
        self, image: Tensor, text: Tensor, image_mask: Tensor | None, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return image tokens attending to text [R, S, D], and text tokens attending to image [R, T, D]."""
        # Folding costs S x heads x T scores in memory, several times; a GPU has kernels that need none.
        long = image.device.type == "cuda" and text.shape[1] > LONG_PROMPT
        return (self.attend_unfolded if long else self.attend_folded)(image, text, image_mask, text_mask)

    def _split_heads(self, x: Tensor, dim: int = -1) -> Tensor:
        """[..., inner, ...] -> [..., heads, d, ...], the channels d of each head."""
        return x.unflatten(dim, (self.heads, -1))

    def attend_unfolded(
        self, image: Tensor, text: Tensor, image_mask: Tensor | None, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend with the published projections and without scores in memory; not run on a GPU yet.

        The queries of the image are the keys of the text, and vice versa. The kernels add masks to float32 scores, so
        float16 needs no clamp. A row of padding only, which no batch has, gets the same values as in attend_folded, but
        another gradient.
        """

        def by_head(x: Tensor) -> Tensor:  # [R, S or T, inner] -> [R, heads, S or T, d]
            return self._split_heads(x).transpose(1, 2)

        dropout = self.dropout if self.training else 0.0
        key, text_value = by_head(self.text_key(text)), by_head(self.text_value(text))
        query = by_head(F.linear(image, self.image_query.weight, self.image_query.bias))
        image_value = by_head(F.linear(image, self.image_value.weight))  # its bias is added after dropout
        over_text = _bias(text_mask, key.dtype)
        over_image = None if image_mask is None else _bias(image_mask, key.dtype)
        to_image = F.scaled_dot_product_attention(query, key, text_value, over_text, dropout)
        to_text = F.scaled_dot_product_attention(key, query, image_value, over_image, dropout)
        to_image, to_text = (x.transpose(1, 2).flatten(2) for x in (to_image, to_text))  # [R, S or T, inner]
        to_image = F.linear(to_image, self.image_output.weight, self.image_output.bias)
        return to_image, self.text_output(to_text + self.image_value.bias)

    def attend_folded(
        self, image: Tensor, text: Tensor, image_mask: Tensor | None, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend with the projections of the image folded into those of the text.

        The published computation projects all image tokens X three times (query, value, output). Image tokens are many
        and text tokens few, so we multiply these matrices with the text first: X Wq K' = X (Wq K'),
        P (X Wv) = (P X) Wv, and P (V Wo) is P times one [T, D] matrix per head. Results differ by rounding only (and by
        the bias of the image values, which dropout of P does not scale).
        """
        split = self._split_heads
        key, value = split(self.text_key(text)), split(self.text_value(text))  # [R, T, heads, d]
        key = key * key.shape[-1] ** -0.5
        folded_query = torch.einsum("rthd,hdc->rhtc", key, split(self.image_query.weight, 0)).flatten(1, 2)
        offset = torch.einsum("rthd,hd->rht", key, split(self.image_query.bias, 0)).flatten(1).unsqueeze(1)
        folded_output = torch.einsum("rthd,chd->rhtc", value, split(self.image_output.weight)).flatten(1, 2)
        text_bias = _bias(text_mask, offset.dtype)

        # The softmax over image tokens is accumulated chunk by chunk relative to the running maximum (flash attention).
        highest = offset.new_full(offset.shape, -torch.inf, dtype=torch.float32)  # [R, 1, heads * T]
        total = torch.zeros_like(highest)
        attended = torch.zeros_like(folded_query, dtype=torch.float32)  # [R, heads * T, D]
        to_image = []
        for tokens, *masks in token_chunks(image) if image_mask is None else token_chunks(image, image_mask):
            scores = torch.baddbmm(offset, tokens, folded_query.mT)  # [R, chunk of S, heads * T]
            if scores.dtype == torch.float16:
                scores = scores.clamp(-50000, 50000)  # infinity minus infinity would be NaN
            over_text = (split(scores) + text_bias).softmax(dim=-1)  # [R, chunk of S, heads, T]
            over_text = F.dropout(over_text, self.dropout, self.training).flatten(2)
            to_image.append(torch.baddbmm(self.image_output.bias, over_text, folded_output))  # [R, chunk of S, D]

            for mask in masks:
                scores = scores.masked_fill(~mask.unsqueeze(-1), _lowest(scores.dtype))
            before, highest = highest, torch.maximum(highest, scores.detach().amax(dim=1, keepdim=True))
            rescale, weights = (before - highest).exp(), (scores - highest).exp()
            total = total * rescale + weights.sum(dim=1, keepdim=True)
            chunk_total = weights.sum(dim=1, keepdim=True).clamp(min=1e-30)
            # Sums over thousands of tokens overflow half precision, so it is used for means only.
            means = F.dropout(weights / chunk_total, self.dropout, self.training).to(tokens.dtype).mT @ tokens
            attended = attended * rescale.mT + chunk_total.mT * means
        attended = split((attended / total.mT).to(image.dtype), 1)  # [R, heads, T, D]
        attended = torch.einsum("rhtc,hdc->rthd", attended, split(self.image_value.weight, 0)).flatten(2)
        return torch.cat(to_image, dim=1), self.text_output(attended + self.image_value.bias)


class GatedFusionLayer(FusionLayer):
    """The same attention, mixed by a learned gate per channel: alpha * own + (1 - alpha) * attended. Not published."""

    def __init__(self, config: GroundingDinoConfig):
        super().__init__(config)
        del self.image_gate, self.text_gate
        self.image_alpha = nn.Linear(2 * config.width, config.width)
        self.text_alpha = nn.Linear(2 * config.width, config.width)

    def update_image(self, image: Tensor, attended: Tensor) -> Tensor:
        return self._mix(self.image_alpha, image, attended)

    def update_text(self, text: Tensor, attended: Tensor) -> Tensor:
        return self._mix(self.text_alpha, text, attended)

    def _mix(self, gate: nn.Linear, own: Tensor, attended: Tensor) -> Tensor:
        alpha = gate(torch.cat((own, attended), dim=-1)).sigmoid()
        return own + drop_path((1 - alpha) * (attended - own), self.drop_path, self.training)


class TextEnhancerLayer(nn.Module):
    """Self-attention of text tokens within their phrase: a post-norm transformer layer."""

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.attention = Attention(config.width, config.heads // 2)
        self.attention_norm = nn.LayerNorm(config.width)
        self.feedforward = FeedForward(config.width, config.feedforward // 2)
        self.feedforward_norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, text: TextFeatures) -> Tensor:
        """[R, T, D] -> [R, T, D].

        The official code and mmdetection mix up the masks of rows with different captions; here a row keeps its own.
        """
        query = x + text.positions
        x = self.attention_norm(x + self.attention(query, query, x, text.sub_sentences.unsqueeze(1)))
        return self.feedforward_norm(x + self.feedforward(x))


class ImageEnhancerLayer(nn.Module):
    """Deformable self-attention of image tokens over all levels: a post-norm transformer layer."""

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.dropout = config.dropout
        self.attention = DeformableAttention(config.width, config.heads, config.levels, config.points)
        self.attention_norm = ImageNorm(config.width)
        self.feedforward = FeedForward(config.width, config.feedforward, config.dropout)
        self.feedforward_norm = ImageNorm(config.width)

    def forward(self, x: Tensor, image: ImageFeatures, references: Tensor) -> Tensor:
        """[R, S, D] -> [R, S, D]; references: [R, S, levels or 1, 2] token centers in 0..1 of each padded level."""
        attended = self.attention(x + image.positions, references, x, image.shapes, image.mask)
        return torch.cat([self._residual(*chunk) for chunk in token_chunks(x, attended)], dim=1)

    def _residual(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.attention_norm(x + F.dropout(attended, self.dropout, self.training))
        return self.feedforward_norm(x + F.dropout(self.feedforward(x), self.dropout, self.training))


class FeatureEnhancerLayer(nn.Module):
    """Cross-attention between image and text (fusion), then self-attention in both."""

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.fusion = (FusionLayer if config.fusion == "bidirectional" else GatedFusionLayer)(config)
        self.text = TextEnhancerLayer(config)
        self.image = ImageEnhancerLayer(config)

    def forward(
        self, image_tokens: Tensor, text_tokens: Tensor, image: ImageFeatures, text: TextFeatures, references: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the updated tokens of the image [R, S, D] and the text [R, T, D].

        Args:
            image_tokens: [R, S, D]
            text_tokens: [R, T, D]
            image: positions, masks and shapes; its tokens are those before the first layer.
            text: as `image`.
            references: [R, S, levels or 1, 2] token centers in 0..1 of each padded level.
        """
        image_tokens, text_tokens = self.fusion(image_tokens, text_tokens, image.mask, text.mask)
        return self.image(image_tokens, image, references), self.text(text_tokens, text)


class FeatureEnhancer(nn.Module):
    """All layers of the feature enhancer."""

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.layers = nn.ModuleList(FeatureEnhancerLayer(config) for _ in range(config.encoder_layers))
        self.checkpointing = config.gradient_checkpointing

    def forward(self, image: ImageFeatures, text: TextFeatures) -> tuple[ImageFeatures, TextFeatures]:
        """Return the same features with enhanced tokens."""
        references = image.centers.unsqueeze(2)  # [R, S, 1, 2]
        if image.mask is not None:
            references = references * image.valid_ratios.unsqueeze(1)  # [R, S, levels, 2]
        # The residual stream of the image has the dtype of autocast, but the range of float16 is too small for sums.
        stream = torch.float32 if text.tokens.dtype == torch.float16 else text.tokens.dtype
        image = image._replace(tokens=image.tokens.to(stream), positions=image.positions.to(stream))
        # torch.compile compiles a layer again if its input has another dtype or is a view.
        text_tokens = text.tokens.to(torch.promote_types(text.tokens.dtype, torch.float32), copy=True)
        image_tokens = image.tokens
        for layer in self.layers:
            inputs = (image_tokens, text_tokens, image, text, references)
            if self.checkpointing and self.training:
                image_tokens, text_tokens = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                image_tokens, text_tokens = layer(*inputs)
        return image._replace(tokens=image_tokens), text._replace(tokens=text_tokens)
