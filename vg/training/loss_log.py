"""Loss terms since the last log entry: their means, and the check that all are finite."""

from __future__ import annotations

from typing import Any

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


class LossLog:
    """Buffers loss terms on their device: reading them at every step would synchronize with the GPU each time."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rows: list[tuple[int, dict[LossName, Tensor]]] = []  # step and the terms of its loss in this process

    def means(self) -> dict[LossName, float]:
        """Return the mean of every term, and of TRAIN_IOU, over all buffered steps and all processes.

        Without a buffered step the result is empty.

        Raises:
            TrainingError: a term is NaN or infinite; the message names the first such step and all its terms.
        """
        if not self.rows:
            return {}
        names = list(self.rows[0][1])
        rows = torch.stack([torch.stack([terms[name] for name in names]) for _, terms in self.rows])
        values = mean_over_processes(self.accelerator, rows.float()).cpu()  # [steps, terms]
        for (step, _), row in zip(self.rows, values, strict=True):
            if not row.isfinite().all():
                terms = ", ".join(
                    f"{name} = {value:.4g}"
                    for name, value in zip(names, row.tolist(), strict=True)
                    if name != TRAIN_IOU
                )
                raise TrainingError(f"the loss is not finite at step {step}: {terms}. {REMEDY}")
        return dict(zip(names, values.mean(dim=0).tolist(), strict=True))

    def state(self) -> list[Any]:
        """Return the buffer as plain tuples and tensors, which `torch.load(weights_only=True)` accepts."""
        return [(step, {tuple(name): term.cpu() for name, term in terms.items()}) for step, terms in self.rows]

    def load_state(self, rows: list[Any]) -> None:
        device = self.accelerator.device
        self.rows = [(step, {_name(key): term.to(device) for key, term in terms.items()}) for step, terms in rows]


def _name(key: tuple[Any, ...] | str) -> LossName:
    """The key of a saved term: the fields of its name, or in older checkpoints "term", "term_component_layer0", ..."""
    if not isinstance(key, str):
        return LossName(*key)
    name, _, layer = key.partition("_layer")
    term, _, component = name.partition("_")
    return LossName(term, component, int(layer) if layer else None)
