"""A grid of images with what a model predicts on samples of the evaluation data."""

from __future__ import annotations

from pathlib import Path

from vg.config import DataConfig
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset
from vg.inference.grids import prediction_grid
from vg.inference.torch_backend import TorchBackend
from vg.models.base import GroundingModel

NUM_DRAWN = 24


def draw_samples(model: GroundingModel, config: DataConfig, path: Path) -> None:
    """Draw a grid of samples and predictions, evenly spaced over the first evaluation dataset."""
    settings = next(iter(config.eval_datasets().values()))
    collate = Collator(model.image_spec, model.text_spec)
    data = GroundingDataset(settings.build(), bad_samples=config.bad_samples, collate=collate)
    count = min(NUM_DRAWN, len(data))
    # Rounded, so that the spacing is not constant: consecutive samples may cycle through the expression types.
    samples = [data[round(index * (len(data) - 1) / max(1, count - 1))] for index in range(count)]
    predictions = TorchBackend(model, str(model.device)).predict_samples(samples)
    prediction_grid(list(zip(samples, predictions, strict=True)), 6, path)
