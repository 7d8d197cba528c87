"""Robust fine-tuning (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903): weights between those before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from vg.evaluation import Evaluator
from vg.models.base import GroundingModel
from vg.types import CheckpointError


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


def evaluations(
    model: GroundingModel, mixtures: Interpolation, weights: Sequence[float], evaluator: Evaluator
) -> Iterator[dict[str, Any]]:
    """The results of each mixture, with its `weight`; the model then has the weights of the last one."""
    for weight in weights:
        model.load_own_state_dict(mixtures.at(weight))
        yield {"weight": weight, **evaluator.run(model)}


def to_text(rows: Sequence[Mapping[str, Any]], names: Sequence[str], best: Mapping[str, Any]) -> str:
    """A line for each mixture, with these numbers of its results; the best one is marked."""
    widths = [max(9, len(name)) for name in names]
    lines = [["weight", *(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))]]
    for row in rows:
        cells = [f"{row[name]:>{width}.4f}" for name, width in zip(names, widths, strict=True)]
        lines.append([f"{row['weight']:<6g}", *cells, *(["best"] if row is best else [])])
    return "\n".join("  ".join(line) for line in lines)
