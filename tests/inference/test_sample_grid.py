"""Grids of predictions on evaluation data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from vg.checkpoint import write_model
from vg.cli import main
from vg.config import RunConfig
from vg.data.synthetic.shapes import ShapesConfig
from vg.inference.torch_backend import TorchBackend
from vg.types import Prediction, Sample


def test_batches_and_dataset_are_those_of_the_evaluation(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data={"eval_batch_size": 2})
    write_model(tmp_path, config.model.build(), config)
    predict_samples, build = TorchBackend.predict_samples, ShapesConfig.build
    sizes, opened = [], []

    def predict(self: TorchBackend, samples: Sequence[Sample]) -> list[Prediction]:
        sizes.append(len(samples))
        return predict_samples(self, samples)

    def record(self: ShapesConfig) -> object:
        opened.append(self.split)
        return build(self)

    monkeypatch.setattr(TorchBackend, "predict_samples", predict)
    monkeypatch.setattr(ShapesConfig, "build", record)
    main(["eval", str(tmp_path)])
    assert sizes == [2, 2, 1], "more may not fit in memory"
    assert opened == ["val"], "reading annotations again may take minutes"
    assert Image.open(tmp_path / "eval" / "predictions.png").width > 400
