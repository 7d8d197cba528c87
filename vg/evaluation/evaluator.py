"""Evaluation: every sample once, whatever the number of processes, and a result that says what it was measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from vg.cache.datasets import RunDataset, evaluation_dataset
from vg.config import DataConfig
from vg.data.mixture import sources_of
from vg.data.source import HasCategoryIds, Source, Task
from vg.distributed import mean_over_processes, progress_bar
from vg.errors import ConfigError
from vg.metrics import CocoMetric, GrecMetric, RecMetric
from vg.models.base import GroundingModel

# The data decides and not the model.
METRICS: dict[Task, type[RecMetric] | type[GrecMetric] | type[CocoMetric]] = {
    "expressions": RecMetric,
    "generalized": GrecMetric,
    "detection": CocoMetric,
}


class EvaluationSet:
    """One data set to judge models on, and the metric that its task asks for.

    Raises:
        ConfigError: a mixture of parts that ask for different metrics.
    """

    def __init__(self, name: str, data: RunDataset, config: DataConfig, accelerator: Accelerator):
        self.name = name
        self.accelerator = accelerator
        self.data = data
        loader: DataLoader[Any] = DataLoader(
            self.data,
            batch_size=config.eval_batch_size,
            num_workers=config.workers,
            collate_fn=data.collate,
            generator=torch.Generator(),  # else every pass would draw from the generator that training uses
            pin_memory=accelerator.device.type == "cuda",
        )
        self.loader: DataLoader[Any] = accelerator.prepare_data_loader(loader)
        tasks = {source.provenance.task for source in sources_of(data.source)}
        if len(tasks) > 1:
            raise ConfigError(
                f"data.eval{'.' * bool(name)}{name}: a mixture of {' and '.join(sorted(tasks))} has no number to say "
                "how good an answer is; list its parts as sets of their own: {first: {...}, second: {...}}"
            )
        self.metric = METRICS[data.source.provenance.task]().to(accelerator.device)

    def collect(self, model: GroundingModel) -> None:
        """Answer every sample and leave the answers with the metric, which forgets former ones."""
        self.metric.reset()
        title = f"evaluate {self.name}".strip()
        for batch in progress_bar(self.accelerator, iterable=self.loader, desc=title, leave=False):
            with self.accelerator.autocast():
                output = model(batch)
            self.metric.update(model.predict(output, batch), batch.targets)

    def run(self, model: GroundingModel) -> dict[str, Any]:
        """Flat results, see `summary`."""
        self.collect(model)
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """The numbers of what was collected, plus `data`, `split`, `protocol`, what else is known of the data (see
        vg.data.source.Provenance) and, if it has a name, `set`."""
        results: dict[str, Any] = self.metric.compute()
        provenance = self.data.source.provenance
        results |= {"data": provenance.data, "split": provenance.split, "protocol": self.metric.protocol}
        if provenance.partition is not None:
            results["partition"] = provenance.partition
        if provenance.official is not None:
            results["official"] = "yes" if provenance.official else "no"  # words: what is no text is taken for a number
        results |= {"set": self.name} if self.name else {}
        bad = mean_over_processes(self.accelerator, self.data.bad.float().to(self.accelerator.device))  # [samples]
        if bad.any():
            results["num_skipped"] = int(bad.count_nonzero())
        return results


class Evaluator:
    """The evaluation data of a run, ready to judge a model as often as wanted.

    The numbers of the first set stand under their own names, those of others under "<set>/<number>".
    """

    def __init__(self, config: DataConfig, model: GroundingModel, accelerator: Accelerator):
        self.sets = [
            EvaluationSet(name, evaluation_dataset(settings, config, model), config, accelerator)
            for name, settings in config.eval_datasets().items()
        ]

    @property
    def sources(self) -> list[Source]:
        return [each.data.source for each in self.sets]

    @torch.no_grad()
    def run(self, model: GroundingModel) -> dict[str, Any]:
        """Flat results of all sets, see `EvaluationSet.run`.

        Args:
            model: the network itself, not a wrapper that synchronises processes.

        Raises:
            ConfigError: a set has the name of a category or kind of the first one.
        """
        was_training = model.training
        model.eval()
        results = self.sets[0].run(model)
        for other in self.sets[1:]:
            more = {f"{other.name}/{name}": value for name, value in other.run(model).items()}
            if results.keys() & more.keys():
                raise ConfigError(
                    f"data.eval.{other.name}: {self.sets[0].name} has results of that name; rename the set"
                )
            results |= more
        model.train(was_training)
        return results

    def resolve_best_metric(self, name: str | None) -> str:
        """`name`, or by default the first number of the first set's metric; raises ConfigError if none is called so."""
        numbers = self.sets[0].metric.numbers
        prefix, _, number = (name or numbers[0]).rpartition("/")
        if number not in ([known for each in self.sets for known in each.metric.numbers] if prefix else numbers):
            raise ConfigError(f"train.best_metric: {name!r} is none of {', '.join(numbers)}")
        return name or numbers[0]

    @property
    def first_numbers(self) -> list[str]:
        """The first number of each set, as it is called in the results of `run`."""
        return [
            f"{each.name}/{each.metric.numbers[0]}" if place else each.metric.numbers[0]
            for place, each in enumerate(self.sets)
        ]

    def change(self, history: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> str:
        """What was gained or lost since the first evaluation: "gained 41.2 AP on raccoon, lost 1.3 AP on base".

        Args:
            history: rows of the history of the run, the oldest first; without an evaluation the answer is empty.
            results: of the present evaluation.
        """
        changes = []
        for each, key in zip(self.sets, self.first_numbers, strict=True):
            first = next((row[key] for row in history if key in row), None)
            if first is not None and key in results:
                points = 100 * (results[key] - first)
                verb, where = "lost" if points < 0 else "gained", each.name or each.data.source.provenance.data
                changes.append(f"{verb} {abs(points):.1f} {each.metric.title} on {where}")
        return ", ".join(changes)

    def detections(self) -> dict[str, list[dict[str, Any]]]:
        """What the last `run` found on each detection set, as rows of COCO's results json; every process must ask.

        Raises:
            ConfigError: there is no detection set, or its classes have no numbers.
        """
        rows = {}
        for each in self.sets:
            if isinstance(each.metric, CocoMetric):
                source = each.data.source
                if not isinstance(source, HasCategoryIds):
                    raise ConfigError(f"{source.provenance.data} has no numbers of its classes to write results with")
                rows[each.name] = each.metric.detections(source.category_ids)
        if not rows:
            raise ConfigError("data.eval has no detection set, whose boxes could be written as COCO results")
        return rows
