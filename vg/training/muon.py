"""Muon for weight matrices and AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon

MIN_SIDE = 16  # rows and columns; smaller matrices are outputs, such as scores and boxes


def matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights that Muon is meant for: those of linear layers, without embeddings and small outputs."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 2 and min(parameter.shape) >= MIN_SIDE:
                    yield parameter


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon and torch.optim.AdamW with common parameter groups and a common state.

    Muon (Jordan et al. 2024) makes the update of a matrix orthogonal. Its size is matched to that of AdamW (Liu et al.
    2025, arXiv 2502.16982), so that one learning rate and one weight decay serve both.

    Args:
        matrices: parameter groups of Muon, each with "params", "lr" and "weight_decay".
        remaining: parameter groups of AdamW.
        betas: of AdamW.
    """

    def __init__(
        self, matrices: Sequence[dict[str, Any]], remaining: Sequence[dict[str, Any]], betas: tuple[float, float]
    ):
        self.muon = Muon(matrices, adjust_lr_fn="match_rms_adamw")
        self.adamw = AdamW(remaining, betas=betas, fused=True) if remaining else None
        super().__init__([*self.muon.param_groups, *(self.adamw.param_groups if self.adamw else [])], {})
        self._share()

    def _share(self) -> None:
        split = len(self.muon.param_groups)
        self.muon.param_groups, self.muon.state = self.param_groups[:split], self.state
        if self.adamw:
            self.adamw.param_groups, self.adamw.state = self.param_groups[split:], self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.muon.step()
        if self.adamw:
            self.adamw.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # makes new groups and a new state
        self._share()
