"""Accuracy of an exported model beside that of the model in PyTorch, on the evaluation data of its run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from tqdm import tqdm

from vg.config import DataConfig
from vg.datasets import evaluation_dataset
from vg.evaluation.evaluator import new_metric
from vg.inference.onnx_backend import OnnxBackend
from vg.inference.torch_backend import TorchBackend
from vg.types import Prediction, Sample

NUM_SAMPLES = 300


def accuracy_loss(expected: TorchBackend, exported: OnnxBackend, data: DataConfig) -> Iterator[str]:
    """Yield a line per evaluation dataset: its main metric before and after, on the first NUM_SAMPLES samples."""
    data = replace(data, cache=None)  # ONNX takes images
    for name, settings in data.eval_datasets().items():
        dataset = evaluation_dataset(settings, data, expected.model)
        before, after = new_metric(dataset.source), new_metric(dataset.source)
        count = min(NUM_SAMPLES, len(dataset))
        for index in tqdm(range(count), desc=f"evaluate {name}".strip(), leave=False):
            sample = dataset[index]
            assert isinstance(sample, Sample)
            targets = expected.collate([sample]).targets
            before.update(expected.predict_samples([sample]), targets)
            after.update([_prediction(exported, sample)], targets)
        key = "acc@0.5" if "acc@0.5" in before.metric_names else before.metric_names[0]
        values = [100 * metric.compute().metrics[key] for metric in (before, after)]
        yield (
            f"{name or dataset.source.provenance.data}: {key} {values[0]:.1f} before, {values[1]:.1f} after int8 "
            f"({values[1] - values[0]:+.1f}, {count} samples)"
        )


def _prediction(exported: OnnxBackend, sample: Sample) -> Prediction:
    found = exported.predict(exported.prepare([sample.image], [sample.phrases]))[0]
    boxes, scores, phrase_ids = map(torch.from_numpy, found)
    return Prediction(sample.id, boxes, scores, phrase_ids, sample.phrases)
