"""Robust fine-tuning (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903): weights between those before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vg.checkpoint import write_weights
from vg.config import CheckpointConfig
from vg.errors import CheckpointError
from vg.evaluation.evaluator import Evaluator
from vg.files import write_json
from vg.models.base import GroundingModel


class Interpolation:
    """Every mixture (1 - weight) x initial + weight x final of two checkpoints of one model.

    Attributes:
        added: names of the weights that only the final checkpoint has, for example of denoising; all mixtures have
            them as they are.

    Raises:
        CheckpointError: the initial checkpoint has weights that the final one has not, or of other shapes.
    """

    def __init__(self, initial: Mapping[str, Tensor], final: Mapping[str, Tensor]):
        trouble = [f"only in the initial one: {key}" for key in initial.keys() - final.keys()]
        for key in initial.keys() & final.keys():
            if initial[key].shape != final[key].shape:
                trouble.append(f"shape: {key} was {tuple(initial[key].shape)}, is {tuple(final[key].shape)}")
        if trouble:
            raise CheckpointError("these are not checkpoints of one model:\n  " + "\n  ".join(sorted(trouble)))
        self.added = sorted(final.keys() - initial.keys())
        self.initial = {key: value.cpu().clone() for key, value in initial.items()}
        self.final = {key: value.cpu().clone() for key, value in final.items()}

    def at(self, weight: float) -> dict[str, Tensor]:
        """Weights at 0 (initial) to 1 (final), both as they were; what is no float is that of the final checkpoint."""
        return {
            key: self.initial[key].lerp(value, weight) if key in self.initial and value.is_floating_point() else value
            for key, value in self.final.items()
        }


class Sweep:
    """The results of several mixtures; its text is a table of them.

    Args:
        model: takes the weights of one mixture after the other.
        weights: of the mixtures, each from 0 to 1.
        deciding: the number of the results that is highest for the best mixture.

    Attributes:
        rows: the results of each mixture, with its `weight`.
        best: one of them.
    """

    def __init__(
        self,
        model: GroundingModel,
        mixtures: Interpolation,
        weights: Sequence[float],
        evaluator: Evaluator,
        deciding: str,
    ):
        self.mixtures = mixtures
        self.names = list(dict.fromkeys([deciding, *evaluator.first_numbers]))
        self.rows: list[dict[str, Any]] = []
        for weight in weights:
            model.load_own_state_dict(mixtures.at(weight))
            self.rows.append({"weight": weight, **evaluator.run(model)})
        self.best = max(self.rows, key=lambda row: row[deciding])

    def write(self, folder: Path, config: CheckpointConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the best mixture into an existing folder as a checkpoint, and beside it interpolation.json."""
        write_weights(folder, self.mixtures.at(self.best["weight"]), config, tokenizer)
        write_json(folder / "interpolation.json", {"best": self.best["weight"], "results": self.rows})

    def __str__(self) -> str:
        """A line for each mixture, with the deciding number and the first one of each set; the best one is marked."""
        widths = [max(9, len(name)) for name in self.names]
        lines = [["weight", *(f"{name:>{width}}" for name, width in zip(self.names, widths, strict=True))]]
        for row in self.rows:
            cells = [f"{row[name]:>{width}.4f}" for name, width in zip(self.names, widths, strict=True)]
            lines.append([f"{row['weight']:<6g}", *cells, *(["best"] if row is self.best else [])])
        return "\n".join("  ".join(line) for line in lines)
