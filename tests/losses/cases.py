"""Random predictions and ground truth for the tests of matching and set loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vg.movable import map_tensors
from vg.types import PromptTargets


class Case(NamedTuple):
    logits: Tensor  # [L, R, Q, T]
    boxes: Tensor  # [L, R, Q, 4]
    targets: PromptTargets
    mask: Tensor  # [R, T]

    def rows(self, rows: list[int]) -> Case:
        """Select or reorder the prompts of a batch."""
        targets = map_tensors(self.targets, lambda x: x[rows])._replace(
            counts=tuple(self.targets.counts[r] for r in rows)
        )
        return Case(self.logits[:, rows], self.boxes[:, rows], targets, self.mask[rows])

    def cut(self) -> Case:
        """Remove padding that all rows have in common."""
        boxes, tokens = max(self.targets.counts), int(self.mask.sum(dim=1).max())
        targets = PromptTargets(
            self.targets.boxes[:, :boxes],
            self.targets.positive_map[:, :boxes, :tokens],
            self.targets.phrase_ids[:, :boxes],
            self.targets.mask[:, :boxes],
            self.targets.counts,
        )
        return Case(self.logits[..., :tokens], self.boxes, targets, self.mask[:, :tokens])


def random_boxes(*shape: int) -> Tensor:
    """[..., 4] cxcywh inside 0..1."""
    size = torch.rand(*shape, 2) * 0.4 + 0.05
    return torch.cat((size / 2 + torch.rand(*shape, 2) * (1 - size), size), dim=-1)


def random_case(
    counts: tuple[int, ...] = (3, 0, 5, 1), lengths: tuple[int, ...] = (9, 4, 12, 6), queries: int = 8, layers: int = 3
) -> Case:
    """Draw prompts with these numbers of boxes and tokens; the padding of both contains random values."""
    torch.manual_seed(0)
    rows, num_boxes, num_tokens = len(counts), max(counts) + 1, max(lengths) + 2
    mask = torch.arange(num_tokens) < torch.tensor(lengths).unsqueeze(1)  # [R, T]
    tokens = torch.rand(rows, num_boxes, num_tokens) < 0.3
    tokens[..., 1] = True  # every box has a positive token
    tokens &= mask.unsqueeze(1)
    real = torch.arange(num_boxes) < torch.tensor(counts).unsqueeze(1)  # [R, N]
    tokens &= real.unsqueeze(-1)
    targets = PromptTargets(random_boxes(rows, num_boxes), tokens, torch.randint(9, (rows, num_boxes)), real, counts)
    logits = (torch.randn(layers, rows, queries, num_tokens) * 2).masked_fill(~mask.unsqueeze(1), -torch.inf)
    return Case(logits, random_boxes(layers, rows, queries), targets, mask)
