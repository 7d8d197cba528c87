"""Running statistics of BatchNorm: the same in all processes, and for all splits of a step into batches."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vg.distributed import mean_over_processes


class RunningStatistics:
    """Makes a step update running means and variances once, by the mean of the updates of all its batches.

    DistributedDataParallel leaves every process the statistics of its own batches: processes would evaluate different
    models, and only that of the main process is saved. A step that is skipped leaves them as they were.

        statistics = RunningStatistics(model, accelerator)
        for batch in batches:
            ...  # forward and backward pass
            statistics.collect()
        statistics.update()  # unless the step is skipped
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        self.accelerator = accelerator
        layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.training]
        self.counts = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
        both = (x for layer in layers for x in (layer.running_mean, layer.running_var) if x is not None)
        self.statistics: list[Tensor] = list(both)  # [C] each
        self.before = [x.clone() for x in (*self.statistics, *self.counts)]
        self.sums = [torch.zeros_like(x) for x in self.statistics]  # over the batches
        self.num_batches = 0

    def collect(self) -> None:
        """Add the statistics after a batch, and return to those before the step."""
        self.num_batches += 1
        for total, values in zip(self.sums, self.statistics, strict=True):
            total += values
        for values, before in zip((*self.statistics, *self.counts), self.before, strict=True):
            values.copy_(before)

    def update(self) -> None:
        """Set the statistics to the mean over the batches of all processes; every process must call it."""
        if not self.statistics:
            return
        total = torch.cat(self.sums)
        mean = mean_over_processes(self.accelerator, total / self.num_batches)
        for values, new in zip(self.statistics, mean.split([len(x) for x in self.statistics]), strict=True):
            values.copy_(new)
        for count in self.counts:
            count += 1
