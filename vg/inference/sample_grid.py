"""A grid of images with what a model predicts on samples of the evaluation data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vg.config import DataConfig
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset, SourceDataset
from vg.inference.grids import prediction_grid
from vg.inference.torch_backend import TorchBackend
from vg.models.base import GroundingModel

NUM_DRAWN = 24


def draw_samples(
    model: GroundingModel, config: DataConfig, path: Path, dataset: SourceDataset[Any] | None = None
) -> None:
    """Draw a grid of samples and predictions, evenly spaced over the first evaluation dataset.

    Args:
        dataset: that dataset if it is open; it is opened again if it has cached features instead of images.
    """
    if not isinstance(dataset, GroundingDataset):
        settings = next(iter(config.eval_datasets().values()))
        collate = Collator(model.image_spec, model.text_spec)
        dataset = GroundingDataset(settings.build(), bad_samples=config.bad_samples, collate=collate)
    count = min(NUM_DRAWN, len(dataset))
    # Rounded, so that the spacing is not constant: consecutive samples may cycle through the expression types.
    samples = [dataset[round(index * (len(dataset) - 1) / max(1, count - 1))] for index in range(count)]
    backend, size = TorchBackend(model, str(model.device)), config.eval_batch_size
    batches = [samples[start : start + size] for start in range(0, count, size)]
    predictions = [prediction for batch in batches for prediction in backend.predict_samples(batch)]
    prediction_grid(list(zip(samples, predictions, strict=True)), 6, path)
