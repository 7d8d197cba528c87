"""Muon for the weights of linear layers and convolutions, AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

MIN_SIDE = 16  # rows and columns; smaller matrices are outputs, such as scores and boxes
LAYERS = (nn.Linear, nn.MultiheadAttention, nn.Conv1d, nn.Conv2d, nn.Conv3d)
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of x, x^3 and x^5 in an iteration
ITERATIONS = 5
EPSILON = 1e-7  # of norms
ADAMW_SCALE = 0.2  # root mean square of an update of AdamW, in learning rates


def matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights that Muon is meant for: those of linear layers and of convolutions that mix all channels.

    Embeddings, small outputs and grouped convolutions are left out: each group has a matrix of its own.
    """
    for module in model.modules():
        if isinstance(module, LAYERS) and getattr(module, "groups", 1) == 1:
            for parameter in module.parameters(recurse=False):
                if parameter.dim() >= 2 and min(parameter.flatten(1).shape) >= MIN_SIDE:
                    yield parameter


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and torch.optim.AdamW with a common state.

    Muon (Jordan et al. 2024) makes the update of a matrix orthogonal. Its size is matched to that of AdamW (Liu et al.
    2025, arXiv 2502.16982), so that one learning rate and one weight decay serve both. The updates equal those of
    torch.optim.Muon, but matrices of one shape are computed together, which is faster. The kernels of a convolution are
    a matrix with one row per output channel.

    Args:
        matrices: parameter groups of Muon, each with "params", "lr" and "weight_decay".
        remaining: parameter groups of AdamW.
        betas: of AdamW.
    """

    def __init__(
        self, matrices: Sequence[dict[str, Any]], remaining: Sequence[dict[str, Any]], betas: tuple[float, float]
    ):
        self.adamw = AdamW(remaining, betas=betas, fused=True) if remaining else None
        super().__init__([*matrices, *(self.adamw.param_groups if self.adamw else [])], {})
        self.split = len(matrices)
        self._share()

    def _share(self) -> None:
        if self.adamw:
            self.adamw.param_groups, self.adamw.state = self.param_groups[self.split :], self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups[: self.split]:
            parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step(parameters, group["lr"], group["weight_decay"])
        if self.adamw:
            self.adamw.step()

    def _step(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        nesterov = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        updates = orthogonalized([update.flatten(1) for update in nesterov])
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.add_(update.view_as(parameter), alpha=-lr * (ADAMW_SCALE * math.sqrt(max(update.shape))))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # makes new groups and a new state
        self._share()


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Bring the singular values of each matrix near 1 by Newton-Schulz iterations in bf16; shapes may differ."""
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT for matrix in matrices]
    same_shape = defaultdict(list)
    for index, matrix in enumerate(wide):
        same_shape[matrix.shape].append(index)
    found = list(wide)
    a, b, c = NEWTON_SCHULZ
    for indices in same_shape.values():
        x = torch.stack([wide[index] for index in indices]).bfloat16()  # [N, rows, columns]
        x /= x.flatten(1).norm(dim=1).clamp(min=EPSILON)[:, None, None]
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        for index, matrix in zip(indices, x, strict=True):
            found[index] = matrix
    return [x if x.shape == matrix.shape else x.mT for x, matrix in zip(found, matrices, strict=True)]
