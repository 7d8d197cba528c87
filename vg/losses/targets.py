"""What the prompts of a batch ask for: boxes, and the tokens that name them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vg.types import Target, Text


class PromptTargets(NamedTuple):
    """The boxes of each prompt, padded to the most that one has."""

    boxes: Tensor  # [R, N, 4] cxcywh 0..1
    tokens: Tensor  # [R, N, T] bool, the tokens that name the box
    phrase_ids: Tensor  # [R, N] int64, the number of its phrase among those of the image
    counts: tuple[int, ...]  # R times how many boxes there are: they come first, what follows has no meaning

    @property
    def mask(self) -> Tensor:
        """[R, N] bool, True = a box, False = padding."""
        slots = torch.arange(self.boxes.shape[1], device=self.boxes.device)
        return slots < torch.tensor(self.counts, device=self.boxes.device).unsqueeze(1)


def prompt_targets(text: Text, targets: Sequence[Target]) -> PromptTargets:
    """The boxes that each prompt asks for: those of its image whose phrase it holds, in their order, without crowds."""
    rows = text.image_ids
    boxes = pad_sequence([target.boxes for target in targets], batch_first=True)[rows]  # [R, N, 4]
    phrase_ids = pad_sequence([target.phrase_ids for target in targets], batch_first=True)[rows]  # [R, N]
    counted = pad_sequence([_counted(target) for target in targets], batch_first=True)[rows]  # [R, N]
    named_by = phrase_ids.unsqueeze(-1).expand(-1, -1, text.mask.shape[1])
    tokens = text.phrase_tokens.gather(1, named_by) & counted.unsqueeze(-1)  # [R, N, T]
    asked = tokens.any(dim=-1)  # [R, N]
    counts = tuple(asked.sum(dim=1).tolist())
    order = (~asked).int().argsort(dim=1, stable=True)[:, : max(counts)]  # [R, most of counts]
    row = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    return PromptTargets(boxes[row, order], tokens[row, order], phrase_ids[row, order], counts)


def _counted(target: Target) -> Tensor:
    """[N] bool: boxes of one thing each."""
    return torch.ones_like(target.phrase_ids, dtype=torch.bool) if target.crowd is None else ~target.crowd
