"""Evaluation: every sample once, whatever the number of processes, and a result that says what it was measured on."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vg.config import DataConfig
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset
from vg.distributed import mean_over_processes
from vg.metrics import RecMetric
from vg.models.base import GroundingModel


def progress_bar(accelerator: Accelerator, **options: Any) -> tqdm:
    """A bar with an ETA on the main process; in a log file a line now and then instead of a moving bar."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(disable=not accelerator.is_main_process, mininterval=interval, dynamic_ncols=True, **options)


class Evaluator:
    """The evaluation data of a run, ready to judge a model as often as wanted."""

    def __init__(self, config: DataConfig, model: GroundingModel, accelerator: Accelerator):
        self.accelerator = accelerator
        self.data = GroundingDataset(config.eval.build(), bad_samples=config.bad_samples)
        loader = DataLoader(
            self.data,
            batch_size=config.eval_batch_size,
            num_workers=config.workers,
            collate_fn=Collator(model.image_spec, model.text_spec),
            generator=torch.Generator(),  # else every pass would draw from the generator that training uses
            pin_memory=accelerator.device.type == "cuda",
        )
        self.loader: DataLoader[Any] = accelerator.prepare_data_loader(loader)
        self.metric = RecMetric().to(accelerator.device)

    @torch.no_grad()
    def run(self, model: GroundingModel) -> dict[str, Any]:
        """Flat results: `miou`, `acc@0.5`, ..., plus `data`, `split` and `protocol`.

        Args:
            model: the network itself, not a wrapper that synchronises processes.
        """
        was_training = model.training
        model.eval()
        self.metric.reset()
        for batch in progress_bar(self.accelerator, iterable=self.loader, desc="evaluate", leave=False):
            with self.accelerator.autocast():
                output = model(batch)
            self.metric.update(model.predict(output, batch), batch.targets)
        model.train(was_training)
        results: dict[str, Any] = self.metric.compute()
        provenance = self.data.source.provenance
        results |= {"data": provenance.data, "split": provenance.split, "protocol": self.metric.protocol}
        bad = mean_over_processes(self.accelerator, self.data.bad.float().to(self.accelerator.device))  # [samples]
        if bad.any():
            results["num_skipped"] = int(bad.count_nonzero())
        return results


def table(results: dict[str, Any]) -> str:
    """The numbers of an evaluation as text: a row for all expressions and one for each kind."""
    kinds = sorted({key.split("/")[0] for key in results if "/" in key})
    names = [key for key, value in results.items() if isinstance(value, float) and "/" not in key]
    width = max(map(len, ("all", *kinds)))
    lines = [" ".join((" " * width, *(f"{name:>9}" for name in names), f"{'number':>9}"))]
    for kind in ("all", *kinds):
        prefix = "" if kind == "all" else f"{kind}/"
        numbers = (f"{results[prefix + name]:9.4f}" for name in names)
        lines.append(" ".join((f"{kind:<{width}}", *numbers, f"{results[prefix + 'num_expressions']:>9}")))
    return "\n".join([f"{results['data']}, {results['split']} ({results['protocol']})", *lines])
