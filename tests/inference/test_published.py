"""Published Grounding DINO checkpoints run without conversion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.models.grounding_dino.published import TEXT, bert_tokenizer
from tests.models.grounding_dino.tiny import tiny_model
from vg import Grounder, load_model, predict_and_crop
from vg.errors import CheckpointError
from vg.models.grounding_dino.checkpoints import write_checkpoint

IMAGE = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)


@pytest.mark.parametrize("format", ["official", "mmdet", "transformers"])
def test_every_checkpoint_format_gives_equal_predictions(tmp_path: Path, format: str) -> None:
    eps = (1e-5, 1e-5) if format == "transformers" else (1e-3, 1e-3)
    model = tiny_model(points=4, logit_eps=eps, text=TEXT)
    model.use_tokenizer(bert_tokenizer(tmp_path / "bert"))
    path = tmp_path / "published"
    if format == "transformers":
        path.mkdir()
    write_checkpoint(model.own_state_dict(), model.config, model.text_spec.tokenizer, path, format)
    expected = Grounder(model, "cpu").predict(IMAGE, ["a dog", "cat"], threshold=0.2)
    opened = load_model(path, None if format == "transformers" else str(tmp_path / "bert"))
    opened.config.image = model.config.image  # checkpoint files do not contain the image size
    found = Grounder(opened, "cpu").predict(IMAGE, ["a dog", "cat"], threshold=0.2)
    assert found.phrases == ("a dog", "cat")
    assert (found.phrase_ids == expected.phrase_ids).all()
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    crop, _, drawn = predict_and_crop(IMAGE, "cat", opened)
    assert drawn.shape == IMAGE.shape
    assert crop.size


def test_missing_checkpoint_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Grounder(tmp_path / "nowhere")
