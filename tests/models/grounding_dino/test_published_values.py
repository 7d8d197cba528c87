"""Published outputs of published checkpoints on one COCO image; `pytest -m hub` downloads the checkpoints.

Without that option a test runs if its environment variable gives the checkpoint (a transformers folder, or an official
or mmdetection .pth, with VG_BERT_TOKENIZER as its tokenizer), or if the Hub
cache contains it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vg.data.collate import Collator
from vg.errors import CheckpointError
from vg.inference.grounder import Grounder
from vg.inference.load import load_model
from vg.models.grounding_dino.model import GroundingDino
from vg.models.saved import local_path
from vg.types import Sample

DATA = Path(__file__).parents[3] / ".." / "shared" / "data"
CATS = DATA / "hf_coco_sample" / "000000039769.png"  # 640 x 480
VOCABULARY = DATA / "weights" / "bert-base-uncased-tokenizer.json"
pytestmark = [pytest.mark.hub, pytest.mark.skipif(not CATS.exists(), reason="shared/data/hf_coco_sample is not here")]


@dataclass(frozen=True)
class Published:
    variable: str
    id: str


TINY = Published("VG_GROUNDING_DINO_TINY", "IDEA-Research/grounding-dino-tiny")
MM = "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg"
MM_GOLDG = Published("VG_MM_GROUNDING_DINO_TINY_GOLDG", MM)
MM_V3DET = Published("VG_MM_GROUNDING_DINO_TINY", f"{MM}_v3det")
MM_GRIT_V3DET = Published("VG_MM_GROUNDING_DINO_TINY_GRIT_V3DET", f"{MM}_grit_v3det")


def load(published: Published, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> GroundingDino:
    """Load the model, or skip the test if there is no checkpoint; errors of an existing checkpoint are raised."""
    place = os.environ.get(published.variable)
    if place is None:
        if "hub" in request.config.option.markexpr.split():  # requested explicitly: network access is allowed
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        try:
            place = str(local_path(published.id))
        except CheckpointError as error:
            pytest.skip(f"no {published.id}: set {published.variable}, or run `pytest -m hub` with a network ({error})")
    tokenizer = os.environ.get("VG_BERT_TOKENIZER") or (str(VOCABULARY) if VOCABULARY.exists() else None)
    model = load_model(place, tokenizer if Path(place).is_file() else None)
    assert isinstance(model, GroundingDino)
    model.config.predict = replace(model.config.predict, score="max")  # as transformers scores
    return model


def outputs(model: GroundingDino, *phrases: str) -> tuple[Tensor, Tensor]:
    """Logits [Q, T] and boxes [Q, 4] cxcywh 0..1."""
    pixels = np.array(Image.open(CATS).convert("RGB"))
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    batch = Collator(model.image_spec, model.text_spec)([Sample("cats", pixels, phrases, *nothing)])
    assert batch.images.shape == (1, 3, 800, 1066)
    assert torch.allclose(batch.images[0, 0, 0, :3], torch.tensor([0.2796, 0.3138, 0.3481]), atol=1e-4)
    if phrases == ("a cat",):
        assert batch.text.token_ids.tolist() == [[101, 1037, 4937, 1012, 102]]
    with torch.no_grad():
        output = model(batch)
    return output.logits[-1, 0], output.boxes[-1, 0]


def check_predictions(
    model: GroundingDino,
    phrases: tuple[str, ...],
    threshold: float,
    wanted: list[tuple[str, float, list[float]]],
    tolerance: tuple[float, float],
) -> None:
    """Compare with (phrase, score, box xyxy in pixels) in any order; tolerance is (scores, pixels)."""
    found = Grounder(model, "cpu").predict(CATS, phrases, threshold)
    assert len(found.boxes) == len(wanted)
    for phrase, score, box in wanted:
        distance = (found.boxes - torch.tensor(box)).abs().amax(dim=1)  # [K]
        nearest = int(distance.argmin())
        assert distance[nearest] <= tolerance[1], (phrase, found.boxes)
        assert found.phrases[found.phrase_ids[nearest]] == phrase
        assert found.scores[nearest] == pytest.approx(score, abs=tolerance[0])


# The best three queries after the last layer: (cx, cy, width), and the logits of [CLS], "a" and "cat".
FIRST_QUERIES = {
    TINY: (
        [[0.7674, 0.4136, 0.4572], [0.2566, 0.5463, 0.4760], [0.2585, 0.5442, 0.4641]],
        [[-4.8915, -0.1900, -0.2161], [-4.9658, -0.3716, -0.3948], [-5.9596, -3.3763, -3.3103]],
        [0.4526, 0.4082],
        [344.8143, 23.1796, 637.4004, 373.8295],
    ),
    MM_V3DET: (
        [[0.7666, 0.4142, 0.4590], [0.2557, 0.5480, 0.4812], [0.5049, 0.5133, 0.9767]],
        [[-5.1160, -0.2143, -0.2089], [-5.0592, -0.4269, -0.4169], [-4.9087, -1.7608, -1.7372]],
        [0.4480, 0.3973],
        [343.7321, 23.8182, 637.5044, 373.8593],
    ),
}


@pytest.mark.parametrize("published", FIRST_QUERIES, ids=lambda published: published.id.split("/")[1])
def test_a_cat(published: Published, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(published, request, monkeypatch)
    wanted_boxes, wanted_logits, scores, first_box = FIRST_QUERIES[published]
    logits, boxes = outputs(model, "a cat")
    assert logits.shape == (900, 5)
    torch.testing.assert_close(boxes[:3, :3], torch.tensor(wanted_boxes), atol=2e-4, rtol=0)
    torch.testing.assert_close(logits[:3, :3], torch.tensor(wanted_logits), atol=2e-3, rtol=0)
    found = Grounder(model, "cpu").predict(CATS, "a cat", threshold=0.35)
    assert found.scores.tolist() == pytest.approx(scores, abs=1e-3)
    torch.testing.assert_close(found.boxes[0], torch.tensor(first_box), atol=0.1, rtol=0)


def test_two_phrases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        ("a cat", 0.479, [344.7, 23.11, 637.18, 374.28]),
        ("a cat", 0.438, [12.27, 51.91, 316.86, 472.44]),
        ("a remote control", 0.478, [38.57, 70.0, 176.78, 118.18]),
    ]
    model = load(TINY, request, monkeypatch)
    check_predictions(model, ("a cat", "a remote control"), 0.4, wanted, (2e-3, 0.5))


CATS_AND_REMOTES = {  # scores, and boxes xyxy 0..1, from the conversion script in transformers
    MM_GOLDG: [
        ("remote", 0.7722, [0.5212, 0.1594, 0.5792, 0.3895]),
        ("cat", 0.7584, [0.5424, 0.0513, 0.9996, 0.7757]),
        ("remote", 0.7984, [0.0629, 0.1526, 0.2746, 0.2447]),
        ("cat", 0.7163, [0.0091, 0.1127, 0.4945, 0.9911]),
    ],
    MM_GRIT_V3DET: [
        ("cat", 0.8381, [0.0099, 0.1129, 0.4942, 0.9903]),
        ("cat", 0.8204, [0.5413, 0.0506, 0.9998, 0.7753]),
        ("remote", 0.7970, [0.0626, 0.1527, 0.2744, 0.2443]),
        ("remote", 0.7175, [0.5211, 0.1596, 0.5790, 0.3890]),
    ],
}


@pytest.mark.parametrize("published", CATS_AND_REMOTES, ids=lambda published: published.id.split("/")[1])
def test_cats_and_remotes(
    published: Published, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [
        (phrase, score, [x * side for x, side in zip(box, (640, 480, 640, 480), strict=True)])
        for phrase, score, box in CATS_AND_REMOTES[published]
    ]
    model = load(published, request, monkeypatch)
    check_predictions(model, ("cat", "remote"), 0.4, wanted, (2e-3, 1.0))
