"""Robust fine-tuning (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903): weights between those before and after."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from vg.checkpoint import write_weights
from vg.config import SavedConfig
from vg.distributed import seed_everything
from vg.errors import CheckpointError
from vg.evaluation.evaluator import Evaluator
from vg.evaluation.results import EvaluationResult
from vg.files import write_json
from vg.models.base import GroundingModel
from vg.models.saved import read_weights

if TYPE_CHECKING:
    from vg.training.trainer import Trainer

logger = logging.getLogger(__name__)

INTERPOLATION = "interpolation.json"  # beside the weights of the best mixture


class Interpolation:
    """Mixtures (1 - weight) x initial + weight x final of two checkpoints of one model.

    Attributes:
        added: names of the weights that only the final checkpoint has, for example of denoising; all mixtures have
            them unchanged.

    Raises:
        CheckpointError: the initial checkpoint has weights that the final one lacks, or of other shapes.
    """

    def __init__(self, initial: Mapping[str, Tensor], final: Mapping[str, Tensor]):
        differences = [f"only in the initial one: {key}" for key in initial.keys() - final.keys()]
        for key in initial.keys() & final.keys():
            if initial[key].shape != final[key].shape:
                differences.append(f"shape: {key} was {tuple(initial[key].shape)}, is {tuple(final[key].shape)}")
        if differences:
            raise CheckpointError("these are not checkpoints of one model:\n  " + "\n  ".join(sorted(differences)))
        self.added = sorted(final.keys() - initial.keys())
        self.initial = {key: value.cpu().clone() for key, value in initial.items()}
        self.final = {key: value.cpu().clone() for key, value in final.items()}

    def at(self, weight: float) -> dict[str, Tensor]:
        """Return the weights at 0 (exactly initial) to 1 (exactly final); integer tensors are always the final ones."""
        return {
            key: self.initial[key].lerp(value, weight) if key in self.initial and value.is_floating_point() else value
            for key, value in self.final.items()
        }


class Sweep:
    """Evaluations of mixtures with these weights (0..1); `str` returns a table, `best_weight` is that of the best one.

    Args:
        model: gets the weights of one mixture after another.
        evaluator: its `best_metric` selects the best mixture.
    """

    def __init__(self, model: GroundingModel, mixtures: Interpolation, weights: Sequence[float], evaluator: Evaluator):
        self.mixtures = mixtures
        self.columns = list(dict.fromkeys([evaluator.best_metric, *evaluator.main_metrics]))
        self.results: list[tuple[float, EvaluationResult]] = []
        for weight in weights:
            model.load_own_state_dict(mixtures.at(weight))
            self.results.append((weight, evaluator.run(model)))
        self.best_weight, _ = max(self.results, key=lambda entry: entry[1].score)  # the first of equal scores

    def write(self, folder: Path, config: SavedConfig, model: GroundingModel) -> None:
        """Write the best mixture into an existing folder as a checkpoint, with interpolation.json beside it.

        Args:
            model: has the tokenizer and the classes.
        """
        write_weights(folder, self.mixtures.at(self.best_weight), config, model.text_spec, model.classes)
        rows = [{"weight": weight, **result.flat()} for weight, result in self.results]
        write_json(folder / INTERPOLATION, {"best": self.best_weight, "results": rows})

    def __str__(self) -> str:
        """A line per mixture with the best metric and the main metric of each dataset; the best mixture is marked."""
        lines = [["weight", *(f"{name:>9}" for name in self.columns)]]
        for weight, result in self.results:
            metrics = result.flat_metrics()
            cells = [f"{metrics[name]:>{max(9, len(name))}.4f}" for name in self.columns]
            lines.append([f"{weight:<6g}", *cells, *(["best"] if weight == self.best_weight else [])])
        return "\n".join("  ".join(line) for line in lines)


def interpolate_run(trainer: Trainer, weights: Sequence[float]) -> None:
    """Evaluate interpolations between the initial and the best weights of a finished run, and save the best one."""
    config, folder, device = trainer.config, trainer.folder, trainer.accelerator.device
    seed_everything(config.train.seed)
    model = config.model.build()  # with the weights before the first step
    mixtures = Interpolation(model.own_state_dict(), read_weights(folder.best))
    sweep = Sweep(model.to(device), mixtures, weights, trainer.evaluator)
    folder.save(folder.path / "interpolated", lambda path: sweep.write(path, config, trainer.unwrapped_model))
    if trainer.accelerator.is_main_process:
        logger.info("interpolation between the initial weights (0) and the best ones (1):\n%s", sweep)
