"""Loss terms since the last log entry: their means, and the check that all are finite."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor

from vg.distributed import mean_over_processes
from vg.errors import TrainingError
from vg.types import LossName

TRAIN_IOU = LossName("train_iou")  # not a loss, but averaged like the terms
REMEDY = (
    "The newest checkpoint is from before; a lower optim.lr or optim.clip_norm, or train.precision=no, usually helps"
)


Row: TypeAlias = tuple[int, dict[LossName, Tensor]]  # a step, and the terms of its loss


class LossLog:
    """Buffers loss terms on their device: reading them at every step would synchronize with the GPU each time."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rows: list[Row] = []  # of this process
        self.averaged: list[Row] = []  # of earlier steps: means over all processes, on the CPU

    def means(self) -> dict[LossName, float]:
        """Return the mean of every term, and of TRAIN_IOU, over all buffered steps and all processes.

        Without a buffered step the result is empty.

        Raises:
            TrainingError: a term is NaN or infinite; the message names the first such step and all its terms.
        """
        self._average()
        if not self.averaged:
            return {}
        names = list(self.averaged[0][1])
        values = torch.stack([torch.stack([terms[name] for name in names]) for _, terms in self.averaged])
        for (step, _), row in zip(self.averaged, values, strict=True):
            if not row.isfinite().all():
                terms = ", ".join(
                    f"{name} = {value:.4g}"
                    for name, value in zip(names, row.tolist(), strict=True)
                    if name != TRAIN_IOU
                )
                raise TrainingError(f"the loss is not finite at step {step}: {terms}. {REMEDY}")
        return dict(zip(names, values.mean(dim=0).tolist(), strict=True))

    def clear(self) -> None:
        """Forget all buffered steps, because they are logged."""
        self.rows, self.averaged = [], []

    def _average(self) -> None:
        """Average the rows of the processes: one transfer from the device."""
        if not self.rows:
            return
        names = list(self.rows[0][1])
        rows = torch.stack([torch.stack([terms[name] for name in names]) for _, terms in self.rows])
        values = mean_over_processes(self.accelerator, rows.float()).cpu()  # [steps, terms]
        steps = [step for step, _ in self.rows]
        self.averaged += [(step, dict(zip(names, row, strict=True))) for step, row in zip(steps, values, strict=True)]
        self.rows = []

    def state(self) -> list[Any]:
        """Return the buffer as plain tuples and tensors, which `torch.load(weights_only=True)` accepts.

        All processes must call it; it is the same in all of them, whatever their number.
        """
        self._average()
        return [(step, {tuple(name): term.clone() for name, term in terms.items()}) for step, terms in self.averaged]

    def load_state(self, rows: list[Any]) -> None:
        self.averaged = [(step, {LossName(*key): term for key, term in terms.items()}) for step, terms in rows]
