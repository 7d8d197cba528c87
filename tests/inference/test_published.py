"""A published Grounding DINO is asked without being converted first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.grounding_dino.tiny import tiny_model
from vg import Grounder, load_model, predict_and_crop
from vg.errors import CheckpointError
from vg.models.grounding_dino.checkpoints import write_checkpoint

IMAGE = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)


@pytest.mark.parametrize("dialect", ["official", "mmdet", "transformers"])
def test_any_dialect(tmp_path: Path, dialect: str) -> None:
    model = tiny_model(points=4, logit_eps=(1e-5, 1e-5) if dialect == "transformers" else (1e-3, 1e-3))
    place = tmp_path / "published"
    if dialect == "transformers":
        place.mkdir()
    write_checkpoint(model.own_state_dict(), model.config, model.text_spec.tokenizer, place, dialect)
    wanted = Grounder(model, "cpu").predict(IMAGE, ["a dog", "cat"], threshold=0.2)
    tokenizer = tmp_path / "bert"
    model.text_spec.tokenizer.save_pretrained(str(tokenizer))
    model.text.network.config.save_pretrained(str(tokenizer))
    opened = load_model(place, None if dialect == "transformers" else str(tokenizer))
    opened.config.image = model.config.image  # no file says how large images are to be
    found = Grounder(opened, "cpu").predict(IMAGE, ["a dog", "cat"], threshold=0.2)
    assert found.phrases == ("a dog", "cat")
    assert torch.equal(found.phrase_ids, wanted.phrase_ids)
    assert torch.allclose(found.scores, wanted.scores, atol=1e-5)
    crop, _, drawn = predict_and_crop(IMAGE, "cat", opened)
    assert drawn.shape == IMAGE.shape
    assert crop.size


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Grounder(tmp_path / "nowhere")
