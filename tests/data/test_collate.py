"""Batches: shapes, pixels, boxes in the spelling of the models, tokens, and errors that name the sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer

import vg
from vg.data.collate import Collator
from vg.data.source import DataError
from vg.types import Sample, StretchedImage, TextSpec

SPEC = StretchedImage(height=16, width=24)


@pytest.fixture(scope="module")
def text() -> TextSpec:
    vocabulary = Path(vg.__file__).parent / "models" / "small_vocabulary.txt"
    return TextSpec(BertTokenizer(vocab=str(vocabulary)), max_tokens=6)


def make(name: str = "a", height: int = 48, width: int = 64, phrase: str = "red circle") -> Sample:
    return Sample(
        id=name,
        image=np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8),
        phrases=(phrase,),
        boxes=np.array([[0, height / 2, width / 4, height]], np.float32),
        phrase_ids=np.zeros(1, np.int64),
        kind="colour",
    )


def test_shapes_types_and_boxes(text: TextSpec) -> None:
    samples = [make(), make("b", 30, 20, "the big red circle")]
    batch = Collator(SPEC, text)(samples)
    assert len(batch) == 2
    assert batch.images.shape == (2, 3, 16, 24)
    assert batch.images.dtype == torch.float32
    assert batch.sizes == ((16, 24), (16, 24)), "nothing is padded"
    assert batch.text.token_ids.shape == batch.text.mask.shape == (2, 6)
    assert batch.text.mask.sum(1).tolist() == [4, 6], "with [CLS] and [SEP]"
    assert (batch.text.token_ids.dtype, batch.text.mask.dtype) == (torch.int64, torch.bool)
    assert torch.equal(batch.text.phrase_tokens, batch.text.mask.unsqueeze(1)), "[R, 1, T]: the whole prompt"
    assert batch.text.image_ids.tolist() == [0, 1]
    for sample, target in zip(samples, batch.targets, strict=True):
        assert (target.id, target.phrases, target.kind) == (sample.id, sample.phrases, "colour")
        assert target.size == sample.image.shape[:2]
        torch.testing.assert_close(target.boxes, torch.tensor([[0.125, 0.75, 0.25, 0.5]]))
        assert target.phrase_ids.tolist() == [0]


def test_pixels_are_resized_by_pil_and_normalised(text: TextSpec) -> None:
    sample = make()
    pixels = Collator(SPEC, text)([sample]).images[0]
    resized = Image.fromarray(sample.image).resize((24, 16), Image.Resampling.BILINEAR)
    expected = (np.asarray(resized) / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)  # [H, W, 3]
    np.testing.assert_allclose(pixels.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_a_picture_of_the_right_size_is_not_touched_and_not_shared(text: TextSpec) -> None:
    sample = make(height=16, width=24)
    sample.image.setflags(write=False)
    spec = replace(SPEC, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    pixels = Collator(spec, text)([sample]).images[0]
    np.testing.assert_allclose(pixels.numpy(), sample.image.transpose(2, 0, 1), rtol=1e-6)


def test_black_and_white(text: TextSpec) -> None:
    samples = [replace(make(), image=np.full((9, 9, 3), value, np.uint8)) for value in (0, 255)]
    black, white = Collator(SPEC, text)(samples).images[:, 0, 0, 0].tolist()
    assert black == pytest.approx(-0.485 / 0.229, abs=1e-5)
    assert white == pytest.approx((1 - 0.485) / 0.229, abs=1e-5)


def test_an_expression_that_is_too_long_is_named(text: TextSpec) -> None:
    long = make("train/7", phrase="red circle left of the big blue square")
    with pytest.raises(DataError, match=r"train/7: the expression has 10 tokens, the model takes 6 .*max_tokens.*'red"):
        Collator(SPEC, text)([make(), long])


@pytest.mark.parametrize("phrases", [("red circle", "blue square"), ()])
def test_one_expression_for_each_picture(text: TextSpec, phrases: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=rf"b has {len(phrases)} phrases, this model takes one expression"):
        Collator(SPEC, text)([make(), replace(make("b"), phrases=phrases)])


def test_a_batch_moves_as_a_whole(text: TextSpec) -> None:
    batch = Collator(SPEC, text)([make()])
    moved = batch.to("meta")
    tensors = [moved.images, *moved.text, moved.targets[0].boxes, moved.targets[0].phrase_ids]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.targets[0].id == "a"
