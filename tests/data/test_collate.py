"""Batches: shapes, pixels, boxes as cxcywh, tokens, and errors that name the sample."""

from __future__ import annotations

import json
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import BertTokenizer

import vg
from vg.data.collate import Collator
from vg.errors import DataError
from vg.types import Batch, EncodedBatch, Features, FittedImage, Sample, StretchedImage, Target, TextSpec

CATS = Path(__file__).parents[2] / ".." / "shared" / "data" / "hf_coco_sample"
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
        expression_type="color",
    )


@pytest.mark.parametrize("delimiters", [(), (".", "?")], ids=["expressions", "prompts"])
@pytest.mark.parametrize("start", sorted(multiprocessing.get_all_start_methods()))
def test_batches_of_a_data_worker(start: str, delimiters: tuple[str, ...], text: TextSpec) -> None:
    """The usual ways to start a process on Linux, macOS and Windows."""
    collate = Collator(SPEC, TextSpec(text.tokenizer, 16, delimiters))
    samples = [make("a"), make("b", phrase="猫")]
    loader = DataLoader(samples, 2, collate_fn=collate, num_workers=1, multiprocessing_context=start)
    (batch,) = loader
    torch.testing.assert_close(batch.images, collate(samples).images)
    assert [target.id for target in batch.targets] == ["a", "b"]


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
    assert batch.text.sample_ids.tolist() == [0, 1]
    for sample, target in zip(samples, batch.targets, strict=True):
        assert (target.id, target.phrases, target.expression_type) == (sample.id, sample.phrases, "color")
        assert target.size == sample.image.shape[:2]
        torch.testing.assert_close(target.boxes, torch.tensor([[0.125, 0.75, 0.25, 0.5]]))
        assert target.phrase_ids.tolist() == [0]


def test_pixels_are_resized_by_pil_and_normalized(text: TextSpec) -> None:
    sample = make()
    pixels = Collator(SPEC, text)([sample]).images[0]
    resized = Image.fromarray(sample.image).resize((24, 16), Image.Resampling.BILINEAR)
    expected = (np.asarray(resized) / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)  # [H, W, 3]
    np.testing.assert_allclose(pixels.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_an_image_of_the_right_size_is_copied_unchanged(text: TextSpec) -> None:
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


def test_too_long_an_expression_is_named(text: TextSpec) -> None:
    long = make("train/7", phrase="red circle left of the big blue square")
    with pytest.raises(DataError, match=r"train/7: the expression has 10 tokens, the model takes 6 .*max_tokens.*'red"):
        Collator(SPEC, text)([make(), long])


@pytest.mark.parametrize("phrases", [("red circle", "blue square"), ()])
def test_a_sample_must_have_one_expression(text: TextSpec, phrases: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=rf"b has {len(phrases)} phrases, this model takes one expression"):
        Collator(SPEC, text)([make(), replace(make("b"), phrases=phrases)])


def test_smaller_images_are_padded_right_and_below(text: TextSpec) -> None:
    samples = [make("wide", 30, 60), make("high", 60, 30), make("small", 20, 20)]
    batch = Collator(FittedImage(20, 100), text)(samples)
    assert batch.images.shape == (3, 3, 40, 40)
    assert batch.sizes == ((20, 40), (40, 20), (20, 20))
    for sample, image, (height, width), target in zip(samples, batch.images, batch.sizes, batch.targets, strict=True):
        alone = Collator(FittedImage(20, 100), text)([sample]).images[0]
        assert torch.equal(image[:, :height, :width], alone), "normalized as in a batch of its own"
        assert alone.count_nonzero() == alone.numel()
        assert image.count_nonzero() == alone.numel(), "padding is zero after normalization"
        torch.testing.assert_close(target.boxes, torch.tensor([[0.125, 0.75, 0.25, 0.5]]))
        assert target.size == sample.image.shape[:2]


def test_images_of_a_batch_can_have_one_size(text: TextSpec) -> None:
    """That of the median aspect ratio, with sides of multiples of 32 px; boxes stay relative to the image."""
    samples = [make("wide", 300, 420), make("wider", 300, 450), make("widest", 200, 310)]
    for normalize in (True, False):
        batch = Collator(FittedImage(200, 333), text, normalize=normalize, one_size=True)(samples).to("cpu")
        assert batch.sizes == ((192, 288),) * 3
        assert batch.images.shape == (3, 3, 192, 288)
        pixels = Image.fromarray(samples[2].image).resize((288, 192), Image.Resampling.BILINEAR)
        expected = (np.asarray(pixels) / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)
        np.testing.assert_allclose(batch.images[2].numpy(), expected.transpose(2, 0, 1), atol=1e-5)
        for target in batch.targets:
            torch.testing.assert_close(target.boxes, torch.tensor([[0.125, 0.75, 0.25, 0.5]]))
    assert Collator(FittedImage(8, 9), text, one_size=True)(samples).sizes == ((32, 32),) * 3
    at_most = Collator(FittedImage(200, 285), text, one_size=True)(samples).sizes[0]
    assert at_most == (192, 256), "rounding does not exceed the longest side"
    assert Collator(SPEC, text, one_size=True)(samples).sizes == ((16, 24),) * 3


@pytest.mark.skipif(not CATS.exists(), reason="no shared/data beside the repository")
def test_preprocessing_of_the_cats_image_equals_the_official_one(text: TextSpec) -> None:
    """With a second, padded image; boxes are relative to the image, while transformers divides by the padded size."""
    with Image.open(CATS / "000000039769.png") as image:
        image = image.convert("RGB")
        pixels, square = np.array(image), np.array(image.resize((800, 800)))
    annotations = json.loads((CATS / "coco_annotations.json").read_text())["annotations"]
    left_top, size = np.split(np.array([annotation["bbox"] for annotation in annotations], np.float32), 2, axis=1)
    boxes = np.concatenate((left_top, left_top + size), axis=1)  # [N, 4] xyxy
    sample = Sample("39769", pixels, ("cat",), boxes, np.zeros(len(boxes), np.int64))
    batch = Collator(FittedImage(800, 1333), text)([sample, replace(make(), image=square)])
    assert batch.images.shape == (2, 3, 800, 1066)
    assert batch.sizes == ((800, 1066), (800, 800))
    np.testing.assert_allclose(batch.images[0, 0, 0, :3], [0.2796, 0.3138, 0.3481], atol=1e-4)
    assert batch.images[1, :, :, 800:].count_nonzero() == 0
    assert batch.images[1, :, :, 799].count_nonzero() > 0
    expected = [
        [0.5503, 0.2765, 0.0604, 0.2215],
        [0.1695, 0.2016, 0.2080, 0.0940],
        [0.5006, 0.4933, 0.9977, 0.9865],
        [0.5008, 0.5002, 0.9983, 0.9955],
        [0.2627, 0.5456, 0.4707, 0.8646],
        [0.7715, 0.4115, 0.4570, 0.7161],
    ]
    np.testing.assert_allclose(batch.targets[0].boxes, expected, atol=1e-4)
    assert batch.targets[0].size == (480, 640)


def many(name: str = "many") -> Sample:
    """Return a sample with three phrases; two boxes belong to the second, one to the first and one to the third."""
    boxes = np.array([[0, 0, 8, 8], [0, 0, 16, 16], [0, 0, 32, 32], [0, 0, 48, 48]], np.float32)
    return replace(
        make(name),
        phrases=("red circle", "dog", "big blue square"),
        boxes=boxes,
        phrase_ids=np.array([0, 1, 1, 2]),
        crowd=np.array([True, False, True, False]),
        areas=np.arange(4, dtype=np.float32),
    )


def test_many_phrases(text: TextSpec) -> None:
    """Phrases that do not fit into one prompt go into further ones, and none is lost."""
    batch = Collator(SPEC, replace(text, delimiters=(".", "?")))([many(), make()])
    assert batch.text.sample_ids.tolist() == [0, 0, 0, 1], "of six tokens each"
    assert batch.text.phrase_tokens[:3].sum(dim=(0, 2)).tolist() == [2, 1, 3]
    target = batch.targets[0]
    assert (target.phrases, target.phrase_ids.tolist()) == (many().phrases, [0, 1, 1, 2])
    assert target.crowd is not None
    assert target.areas is not None
    assert (target.crowd.tolist(), target.areas.tolist()) == ([True, False, True, False], [0, 1, 2, 3])
    assert batch.targets[1].crowd is batch.targets[1].areas is None


def test_one_prompt_drops_boxes_and_warns_once(text: TextSpec, caplog: pytest.LogCaptureFixture) -> None:
    collate = Collator(SPEC, replace(text, delimiters=(".", "?"), max_tokens=7), one_prompt=True)
    with caplog.at_level(logging.WARNING):
        collate([make(), make("b", phrase="dog")])
        assert not caplog.records, "all phrases fit"
        batch = collate([make(), many("train/7")])
        collate([many()])
    assert batch.text.sample_ids.tolist() == [0, 1]
    target = batch.targets[1]
    assert target.phrases == many().phrases, "they keep their ids"
    assert target.phrase_ids.tolist() == [0, 1, 1]
    torch.testing.assert_close(target.boxes[:, 2] * 64, torch.tensor([8.0, 16.0, 32.0]))
    assert target.crowd is not None
    assert target.areas is not None
    assert (target.crowd.tolist(), target.areas.tolist()) == ([True, False, True], [0, 1, 2])
    (record,) = caplog.records
    assert "train/7: dropped 1 of 4 boxes" in record.getMessage()
    assert "max_tokens" in record.getMessage()


def test_a_sample_without_boxes(text: TextSpec) -> None:
    sample = replace(make(), boxes=np.zeros((0, 4), np.float32), phrase_ids=np.zeros(0, np.int64))
    for one_prompt in (False, True):
        target = Collator(SPEC, replace(text, delimiters=(".", "?")), one_prompt)([sample]).targets[0]
        assert (target.boxes.shape, target.phrase_ids.shape) == ((0, 4), (0,))


def test_a_batch_moves_as_a_whole(text: TextSpec) -> None:
    batch = Collator(SPEC, text)([make()])
    moved = batch.to("meta")
    tensors = [moved.images, *moved.text[:4], moved.targets[0].boxes, moved.targets[0].phrase_ids]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.targets[0].id == "a"


def test_an_encoded_batch_moves_as_a_whole() -> None:
    image, text = torch.zeros(1, 9, 8, dtype=torch.half), torch.zeros(2, 5, 4, dtype=torch.half)
    features = Features(image, (2, 2), text, torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, dtype=torch.long))
    target = Target("a", (48, 64), ("x",), torch.zeros(1, 4), torch.zeros(1, dtype=torch.long))
    batch = EncodedBatch(features, [target, replace(target, crowd=torch.zeros(1, dtype=torch.bool))])
    assert len(batch) == 2
    moved = batch.to("meta")
    assert moved.features.grid == (2, 2)
    tensors = [value for value in moved.features if isinstance(value, torch.Tensor)]
    tensors += [moved.targets[0].boxes, moved.targets[0].phrase_ids, moved.targets[1].crowd]
    assert len(tensors) == 7
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("packed", [False, True])
def test_pixels_that_are_normalized_on_the_device_are_equal_bit_for_bit(text: TextSpec, packed: bool) -> None:
    spec = FittedImage(20, 100, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.7))
    samples = [make(height=20, width=40), make("b", 40, 20), make("c", 30, 30)]
    expected = Collator(spec, text)(samples)
    batch = Collator(spec, text, normalize=False)(samples)
    assert batch.images.dtype == torch.uint8
    moved = (batch.pack() if packed else batch).to("cpu", non_blocking=True)
    assert type(moved) is Batch
    assert moved.images.is_contiguous()
    assert moved.sizes == expected.sizes
    for found, tensor in zip(moved.tensors(), expected.tensors(), strict=True):
        assert found.dtype == tensor.dtype
        assert found.equal(tensor)


def test_a_packed_batch_moves_in_one_copy(text: TextSpec) -> None:
    """Among its tensors are some without elements."""
    annotated = replace(make(), crowd=np.array([True]), areas=np.array([3.0], np.float32))
    without = replace(make("b"), boxes=np.zeros((0, 4), np.float32), phrase_ids=np.zeros(0, np.int64))
    batch = Collator(SPEC, replace(text, delimiters=(".", "?")))([annotated, without])
    packed = batch.pack()
    assert len({tensor.untyped_storage().data_ptr() for tensor in packed.tensors()}) == 1
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default:
                copies.append((kwargs["device"].type, kwargs["non_blocking"]))
            return func(*args, **kwargs or {})

    with Copies():
        moved = packed.to("meta", non_blocking=True)
    assert copies == [("meta", True)]
    assert len(batch.tensors()) == 1 + 4 + 2 * 2 + 2 + 4 + 1
    for tensor, original in zip(moved.tensors(), packed.tensors(), strict=True):
        assert (tensor.device.type, tensor.dtype, tensor.shape) == ("meta", original.dtype, original.shape)
        assert tensor.storage_offset() == original.storage_offset()
    for value in (packed, packed.to("cpu")):
        assert value.sizes == batch.sizes
        for tensor, original in zip(value.tensors(), batch.tensors(), strict=True):
            assert tensor.dtype == original.dtype
            assert tensor.equal(original)
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % 64 == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA has page-locked memory")
def test_an_encoded_batch_is_pinned_as_a_whole() -> None:
    image, text = torch.zeros(1, 9, 8, dtype=torch.half), torch.zeros(2, 5, 4, dtype=torch.half)
    features = Features(image, (2, 2), text, torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, dtype=torch.long))
    pinned = EncodedBatch(features, []).pin_memory()
    assert all(value.is_pinned() for value in pinned.features if isinstance(value, torch.Tensor))
