"""The text side: BERT reads each phrase of a prompt on its own, as if the others were not there (section 3.4)."""

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
    positions: Tensor  # [R, T, D] encoding of the place within the phrase, to be added to queries and keys
    blocks: Tensor  # [R, T, T] bool, which tokens see one another: those of one phrase and its full stop
    mask: Tensor  # [R, T] bool, False = padding

    def select(self, rows: Tensor | slice) -> TextFeatures:
        return TextFeatures(*(x[rows] for x in self))


def phrase_blocks(token_ids: Tensor, delimiters: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Sub-sentence masks and positions, by the rule of the official implementation (paper, figure 4c).

    A delimiter closes the phrase before it and belongs to it; positions count from 0 in every phrase. What is not
    closed, a delimiter in the first or last column, and padding see themselves only. (So a caption without its full
    stop, closed by [SEP], depends on whether its row is padded; prompts made by vg always end with a full stop.)

    Args:
        token_ids: [R, T]
        delimiters: ids of [CLS], [SEP], "." and "?".

    Returns:
        [R, T, T] bool and [R, T] int64
    """
    length = token_ids.shape[1]
    column = torch.arange(length, device=token_ids.device)
    is_delimiter = torch.stack([token_ids == delimiter for delimiter in delimiters]).any(dim=0)  # [R, T]
    end = (
        torch.where(is_delimiter, column, length).flip(1).cummin(dim=1).values.flip(1)
    )  # the next delimiter, or itself
    before = torch.where(is_delimiter, column, -1).cummax(dim=1).values.roll(1, dims=1)
    before[:, :1] = -1  # [R, T] the last delimiter left of the token
    closed = (end > 0) & (end < length - 1)
    same = (end.unsqueeze(1) == end.unsqueeze(2)) & closed.unsqueeze(1)
    itself = torch.eye(length, dtype=torch.bool, device=token_ids.device)
    return same | itself, (column - before - 1) * closed


class TextEncoder(Encoder):
    """BERT with one attention block per phrase, and a projection to the width of the image tokens."""

    REMEMBERED = 128  # prompts

    def __init__(self, config: BertConfig, width: int, pretrained: bool):
        if not pretrained and config.id == BertConfig.id:  # its sizes are the defaults of transformers: ask no Hub
            config = replace(config, architecture={"model_type": "bert"})
        super().__init__(config, pretrained, add_pooling_layer=False)
        self.projection = nn.Linear(self.width, width)
        self._memory: dict[tuple[int, ...], TextFeatures] = {}
        self._memory_of: tuple[Any, ...] = ()
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, token_ids: Tensor, mask: Tensor, delimiters: tuple[int, ...]) -> TextFeatures:
        """token_ids [R, T] int64, mask [R, T] bool (False = padding), delimiters as in phrase_blocks."""
        blocks, places = phrase_blocks(token_ids, delimiters)
        x = self.run(
            input_ids=token_ids,
            attention_mask=blocks.unsqueeze(1),  # [R, 1, T, T]
            position_ids=places,
            token_type_ids=torch.zeros_like(token_ids),
        )
        tokens = self.projection(x)  # [R, T, D]
        positions = sine_encoding(places.unsqueeze(-1), tokens.shape[-1], 10000.0, interleaved=True)
        return TextFeatures(tokens, positions, blocks, mask)

    def train(self, mode: bool = True) -> TextEncoder:
        self._memory = {}  # optimisers change weights without a trace
        super().train(mode)
        return self

    def recall(self, token_ids: Tensor, mask: Tensor, delimiters: tuple[int, ...]) -> TextFeatures:
        """The same, but prompts that were read lately are remembered until the weights change; without gradients."""
        device = token_ids.device.type
        versions = ((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters())
        state = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), *versions)
        if self._memory_of != state:
            self._memory, self._memory_of = {}, state
        rows = [tuple(row) for row in token_ids.tolist()]
        new = {row: number for number, row in enumerate(rows) if row not in self._memory}
        if new:
            picked = list(new.values())
            features = self(token_ids[picked], mask[picked], delimiters)
            for place, row in enumerate(new):
                self._memory[row] = features.select(slice(place, place + 1))
        found = [self._memory[row] for row in rows]
        while len(self._memory) > self.REMEMBERED:
            del self._memory[next(iter(self._memory))]
        return TextFeatures(*(torch.cat(parts) for parts in zip(*found, strict=True)))
