"""The loss of the steps since the last log entry, and what is said where it stops being a number."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vg.distributed import mean_over_processes
from vg.errors import TrainingError

REMEDY = (
    "The newest checkpoint is from before; a lower optim.lr or optim.clip_norm, or train.precision=no, usually helps"
)


class LossLog:
    """Collects loss terms where they were computed: looking at every step would make a GPU wait for each."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rows: list[tuple[int, dict[str, Tensor]]] = []  # step and the terms of its loss in this process

    def add(self, step: int, terms: dict[str, Tensor]) -> None:
        self.rows.append((step, terms))

    def means(self) -> dict[str, float]:
        """Every term, its mean over all steps collected and all processes; empty where there is none.

        Raises:
            TrainingError: a term is not finite; the first step where one is not is named.
        """
        if not self.rows:
            return {}
        names = list(self.rows[0][1])
        rows = [torch.stack([terms[name] for name in names]) for _, terms in self.rows]
        values = mean_over_processes(self.accelerator, torch.stack(rows).float()).cpu()  # [steps, terms]
        for (step, _), row in zip(self.rows, values, strict=True):
            if not row.isfinite().all():
                terms = ", ".join(f"{name} = {value:.4g}" for name, value in zip(names, row.tolist(), strict=True))
                raise TrainingError(f"the loss is not finite at step {step}: {terms}. {REMEDY}")
        return dict(zip(names, values.mean(dim=0).tolist(), strict=True))

    def clear(self) -> None:
        self.rows = []

    def state(self) -> list[Any]:
        return [(step, {name: term.cpu() for name, term in terms.items()}) for step, terms in self.rows]

    def load_state(self, rows: list[Any]) -> None:
        device = self.accelerator.device
        self.rows = [(step, {name: term.to(device) for name, term in terms.items()}) for step, terms in rows]
