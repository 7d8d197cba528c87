"""The text backbone: BERT with sub-sentence masks, so that phrases are encoded independently (section 3.4)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vg.models.encoders import Encoder
from vg.models.grounding_dino.config import BertConfig
from vg.models.layers import sine_encoding


class TextFeatures(NamedTuple):
    tokens: Tensor  # [R, T, D]
    positions: Tensor  # [R, T, D] sine encoding of the position within the phrase, added to queries and keys
    sub_sentences: Tensor  # [R, T, T] bool, True = may attend: tokens of the same phrase, its full stop included
    mask: Tensor  # [R, T] bool, False = padding

    def select(self, rows: Tensor | slice) -> TextFeatures:
        return TextFeatures(*(x[rows] for x in self))


def sub_sentence_masks(token_ids: Tensor, delimiters: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Compute attention masks and positions of sub-sentences (figure 4c), by the rule of the official implementation.

    A delimiter closes the phrase before it and belongs to it; positions restart from 0 in every phrase. Unclosed
    tokens, delimiters in the first or last column and padding attend to themselves only. (Published quirk, kept for
    equal results: [SEP] closes a caption without a final full stop, unless it is in the last column, so the result
    depends on padding. Prompts made by vg always end with a full stop.)

    Args:
        token_ids: [R, T]
        delimiters: ids of [CLS], [SEP], "." and "?".

    Returns:
        mask [R, T, T] bool, True = may attend, and positions [R, T] int64
    """
    length = token_ids.shape[1]
    column = torch.arange(length, device=token_ids.device)
    is_delimiter = torch.stack([token_ids == delimiter for delimiter in delimiters]).any(dim=0)  # [R, T]
    is_delimiter, row = is_delimiter.unsqueeze(1), column.unsqueeze(1)  # [R, 1, T], [T, 1]
    # [R, T] column of the next delimiter (or of the token itself, if it is one), and of the last one before it
    end = torch.where(is_delimiter & (column >= row), column, length).amin(dim=2)
    before = torch.where(is_delimiter & (column < row), column, -1).amax(dim=2)
    closed = (end > 0) & (end < length - 1)
    same_phrase = (end.unsqueeze(1) == end.unsqueeze(2)) & closed.unsqueeze(1)
    diagonal = torch.eye(length, dtype=torch.bool, device=token_ids.device)
    return same_phrase | diagonal, (column - before - 1) * closed


class TextEncoder(Encoder):
    """BERT with sub-sentence attention masks, and a projection to the width of the image tokens."""

    CACHE_SIZE = 128  # prompts

    def __init__(self, config: BertConfig, width: int, pretrained: bool):
        if not pretrained and config.id == BertConfig.id:  # the default sizes of transformers; no Hub access needed
            config = replace(config, architecture={"model_type": "bert"})
        super().__init__(config, pretrained, add_pooling_layer=False)
        self.projection = nn.Linear(self.width, width)
        self._cache: dict[tuple[int, ...], TextFeatures] = {}
        self._cache_key: tuple[Any, ...] = ()
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, token_ids: Tensor, mask: Tensor, delimiters: tuple[int, ...]) -> TextFeatures:
        """token_ids [R, T] int64, mask [R, T] bool (False = padding), delimiters as in sub_sentence_masks."""
        sub_sentences, position_ids = sub_sentence_masks(token_ids, delimiters)
        attention_mask = sub_sentences.unsqueeze(1)  # [R, 1, T, T]
        if self.network.config._attn_implementation == "eager":  # adds the mask to the logits of attention
            zeros = torch.zeros_like(attention_mask, dtype=self.projection.weight.dtype)
            attention_mask = zeros.masked_fill(~attention_mask, -torch.inf)
        x = self.run(
            input_ids=token_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=torch.zeros_like(token_ids),
        )
        tokens = self.projection(x)  # [R, T, D]
        positions = sine_encoding(position_ids.unsqueeze(-1), tokens.shape[-1], 10000.0, interleaved=True)
        return TextFeatures(tokens, positions, sub_sentences, mask)

    def train(self, mode: bool = True) -> TextEncoder:
        self._cache = {}  # fused optimizers change weights without increasing their version
        super().train(mode)
        return self

    def cached(self, token_ids: Tensor, mask: Tensor, delimiters: tuple[int, ...]) -> TextFeatures:
        """Like forward, without gradients; features of recent prompts are reused until the weights change."""
        if any(p.is_inference() for p in self.parameters()):  # they have no version, so changes would go unnoticed
            return self(token_ids, mask, delimiters)
        device = token_ids.device.type
        versions = ((p.data_ptr(), p._version) for p in self.parameters())
        key = (delimiters, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), *versions)
        if self._cache_key != key:
            self._cache, self._cache_key = {}, key
        prompts = [tuple(row) for row in token_ids.tolist()]
        new = {prompt: row for row, prompt in enumerate(prompts) if prompt not in self._cache}
        if new:
            rows = list(new.values())
            features = self(token_ids[rows], mask[rows], delimiters)
            for index, prompt in enumerate(new):
                self._cache[prompt] = features.select(slice(index, index + 1))
        found = [self._cache[prompt] for prompt in prompts]
        while len(self._cache) > self.CACHE_SIZE:
            del self._cache[next(iter(self._cache))]
        return TextFeatures(*(torch.cat(field) for field in zip(*found, strict=True)))
