"""Base class of metrics: rows collected over batches and processes, with samples identified by their ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from vg.metrics.result import MetricResult
from vg.types import Prediction, Target


class CollectingMetric(Metric):
    """Keeps tensors of rows; `compute` gets the concatenated rows of all processes.

    A sample that comes twice counts once: the next good one replaces a skipped one (`data.bad_samples`). Neither the
    order of the samples nor their distribution over processes changes a result. A metric defines the class variables,
    `_rows` and `compute`.
    """

    columns: ClassVar[dict[str, Tensor]]  # name -> empty tensor with the dtype and shape of the rows; "ids" is required
    metric_names: ClassVar[tuple[str, ...]]  # metrics that `compute` may return, the main one first
    label: ClassVar[str]  # the main metric as people write it
    protocol: ClassVar[str]  # how predictions are evaluated, as far as comparisons with other results depend on it
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self.columns:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Remove all rows."""
        super().reset()
        self._append(self.columns)  # else a process without samples joins the gather with the wrong shape and dtype

    def update(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        """Add a batch.

        Args:
            predictions: boxes xyxy in pixels of the original image, best first, on any device.
            targets: the same samples in the same order, boxes cxcywh in 0..1.

        Raises:
            ValueError: predictions and targets are not of the same samples, or a target does not suit the metric.
                Nothing of the batch is added then.
        """
        found, expected = [prediction.id for prediction in predictions], [target.id for target in targets]
        if found != expected:
            raise ValueError(f"predictions and targets must be of the same samples in order: {found} != {expected}")
        if targets:
            self._append({"ids": torch.tensor(list(map(stable_hash, expected)))} | self._rows(predictions, targets))

    def compute(self) -> MetricResult:
        """Compute the metrics of all samples of all processes; every process must call it.

        Raises:
            ValueError: there are no samples, or different samples share an id.
        """
        raise NotImplementedError

    def absorb(self, other: CollectingMetric) -> None:
        """Add the rows of another metric of this class, with other samples, in this process."""
        for name in self.columns:
            getattr(self, name).extend(getattr(other, name))
        self._update_count += other._update_count  # else torchmetrics warns of a metric without updates

    def per_sample(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the contributions of U samples of all processes to metrics that are means; every process must call it.

        Returns:
            [U] int64 `stable_hash` of the sample ids, and name -> [U] float64, NaN where a sample does not count.
        """
        if self._is_synced:  # called by `compute`
            return self._per_sample()
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._per_sample()

    def _per_sample(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        raise NotImplementedError(f"{type(self).__name__} has no metrics of single samples")

    def _rows(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the `columns` of a batch, all but "ids"; raise ValueError for a target that does not suit."""
        raise NotImplementedError

    def _append(self, rows: dict[str, Tensor]) -> None:
        for name, tensor in rows.items():
            getattr(self, name).append(tensor.detach().to(self.device, self.columns[name].dtype))

    def _collected(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Return all rows, and [U] the first row of each sample, and [rows] the sample of each row, 0..U-1."""
        rows = {name: dim_zero_cat(getattr(self, name)).cpu().numpy() for name in self.columns}
        if not len(rows["ids"]):
            name = type(self).__name__
            raise ValueError(f"{name} got no sample: the evaluated data is empty or every sample was skipped")
        _, first, sample = np.unique(rows["ids"], return_index=True, return_inverse=True)
        return rows, first, sample


def stable_hash(text: str) -> int:
    """Hash to 63 bits, the non-negative half of int64; equal in all processes, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
