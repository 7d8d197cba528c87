"""What metrics have in common: rows collected over batches and processes, every sample known by its id."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from vg.types import Prediction, Target


class CollectingMetric(Metric):
    """Keeps tensors whose rows are what `compute` works on; before that, the rows of all processes come together.

    A sample is known by its id: seen twice, as distributed evaluation pads its last batch with repeats, it counts
    once, and neither the order of the samples nor their distribution over processes changes a number.
    """

    columns: ClassVar[dict[str, Tensor]]  # name -> empty tensor of the right type and shape
    numbers: ClassVar[tuple[str, ...]]  # what `compute` may return, most telling first
    title: ClassVar[str]  # how the first of them is written
    protocol: ClassVar[str]  # what a reader must know to compare the numbers with others
    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self.columns:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._append(self.columns)  # or a process that saw nothing joins the exchange with the wrong shape and type

    def absorb(self, other: CollectingMetric) -> None:
        """Add all that another metric of this class has seen, of other samples, in this process."""
        for name in self.columns:
            getattr(self, name).extend(getattr(other, name))
        self._update_count += other._update_count  # else torchmetrics warns of a metric that saw nothing

    def per_sample(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """What each of U samples of all processes contributes to the numbers that are means; every process must ask.

        Returns:
            [U] int64 `hashed` sample ids, and [U] float64 of each number, NaN where it is not about the sample.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._per_sample()

    def _per_sample(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        raise NotImplementedError(f"{type(self).__name__} has no numbers of single samples")

    def _append(self, rows: dict[str, Tensor]) -> None:
        for name, tensor in rows.items():
            getattr(self, name).append(tensor.detach().to(self.device, self.columns[name].dtype))

    def _collected(self) -> dict[str, np.ndarray]:
        return {name: dim_zero_cat(getattr(self, name)).cpu().numpy() for name in self.columns}


def check_pairs(predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
    """Raises ValueError where these are not of the same samples in the same order."""
    if [prediction.id for prediction in predictions] != [target.id for target in targets]:
        raise ValueError(
            "predictions and targets must be of the same samples in the same order, got the ids "
            f"{[prediction.id for prediction in predictions]} and {[target.id for target in targets]}"
        )


def hashed(text: str) -> int:
    """63 bits, the non-negative half of int64; the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
