"""Inference with a trained model: image and phrases in, boxes out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from PIL import Image

from vg.checkpoint import is_checkpoint, read_model
from vg.data.collate import Collator
from vg.data.images import array_to_rgb, read_image
from vg.errors import ConfigError, DataError
from vg.inference.download import download, is_url
from vg.inference.draw import draw_boxes
from vg.models.base import GroundingModel, check_finite
from vg.models.grounding_dino.checkpoints import open_model
from vg.types import Prediction, Sample

ImageLike = np.ndarray | Image.Image | str | Path  # an array, a PIL image, a path or an http(s) URL
Box: TypeAlias = tuple[float, float, float, float]  # (left, top, right, bottom) in pixels


def to_array(image: ImageLike) -> np.ndarray:
    """Read an image, rotated by its EXIF orientation -> [H, W, 3] uint8, RGB.

    Raises:
        DataError: see `vg.inference.download`, `vg.data.images.array_to_rgb` and `vg.data.images.read_image`.
    """
    if isinstance(image, np.ndarray):
        return array_to_rgb(image, "given as an array")
    if isinstance(image, Image.Image):
        return read_image(image, "given", upright=True)
    content = download(str(image)) if is_url(str(image)) else Path(image)
    return read_image(content, str(image), upright=True)


class Grounder:
    """Runs inference: grounds phrases in images.

    Args:
        model: a model, or a path for `load_model`: the folder of a run or checkpoint, or a published Grounding DINO.
        device: "cpu", "cuda" or "mps"; by default the fastest one available. The model is moved there.
        tokenizer, overrides: see `load_model`.

    Raises:
        ConfigError: this machine does not have the device.
        CheckpointError: see `load_model`.
    """

    def __init__(
        self,
        model: str | Path | GroundingModel,
        device: str | None = None,
        tokenizer: str | None = None,
        overrides: Sequence[str] = (),
    ):
        device = best_device() if device is None else checked_device(device)
        self.model = model if isinstance(model, GroundingModel) else load_model(model, tokenizer, overrides)
        self.model.to(device).eval()
        self.collate = Collator(self.model.image_spec, self.model.text_spec)

    @property
    def takes_many(self) -> bool:
        """Whether the model takes any number of phrases with any number of boxes, not one expression with one box."""
        return bool(self.model.text_spec.delimiters)

    def predict(self, image: ImageLike, phrases: str | Sequence[str], threshold: float | None = None) -> Prediction:
        """Predict boxes for one or more phrases, xyxy in pixels of the image, best first.

        Args:
            image: [H, W, 3] uint8 array, PIL image, path or http(s) URL.
            phrases: one or more phrases to ground; box k of the prediction belongs to ``phrases[phrase_ids[k]]``.
            threshold: minimum score of a box; by default all boxes of the model are returned.

        Raises:
            DataError: an unreadable image, no phrase, or a phrase the model cannot process (blank, too long).
            ConfigError: the threshold is not in 0..1.
            PredictionError: the model predicts NaN or Inf.
        """
        return self.predict_batch([image], [phrases], threshold)[0]

    def predict_batch(
        self, images: Sequence[ImageLike], phrases: Sequence[str | Sequence[str]], threshold: float | None = None
    ) -> list[Prediction]:
        """Predict for several images in one batch; every image has its own phrase or phrases.

        Raises:
            ValueError: the number of entries in phrases differs from the number of images.
            DataError, ConfigError, PredictionError: see `predict`.
        """
        if isinstance(phrases, str):
            raise ValueError("phrases needs one entry per image; use [phrases] * len(images) to repeat one")
        if not images:
            return []
        no_boxes = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        samples = [
            Sample(str(i), to_array(image), (entry,) if isinstance(entry, str) else tuple(entry), *no_boxes)
            for i, (image, entry) in enumerate(zip(images, phrases, strict=True))
        ]
        return self.predict_samples(samples, threshold)

    @torch.no_grad()
    def predict_samples(self, samples: Sequence[Sample], threshold: float | None = None) -> list[Prediction]:
        """Predict for samples of a dataset in one batch; the predictions are on the CPU; raises as `predict`."""
        if threshold is not None:
            check_threshold(threshold)
        for sample in samples:
            if not sample.phrases or not all(phrase.strip() for phrase in sample.phrases):
                raise DataError("no phrase or an empty phrase; give at least one with words")
        batch = self.collate(samples).to(self.model.device)
        predictions = [prediction.to("cpu") for prediction in self.model.predict(self.model(batch), batch)]
        check_finite(predictions, self.model)
        return predictions if threshold is None else [above(prediction, threshold) for prediction in predictions]


def check_threshold(threshold: float, name: str = "threshold") -> None:
    """Raise ConfigError unless the threshold is in 0..1, as scores are."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"{name} {threshold:g}: expected a score from 0 to 1, such as 0.3")


def above(prediction: Prediction, threshold: float) -> Prediction:
    """Return the prediction without boxes whose score is below the threshold."""
    kept = prediction.scores >= threshold  # [K]
    return prediction.map(lambda values: values[kept])


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def checked_device(device: str) -> str:
    """Return the device; raises ConfigError if this machine does not have it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend has its own
        reason = str(error).split("\n")[0].rstrip(".")
        raise ConfigError(f"device {device}: {reason}; use {best_device()}") from error
    return device


def load_model(path: str | Path, tokenizer: str | None = None, overrides: Sequence[str] = ()) -> GroundingModel:
    """Load a trained model in evaluation mode on the CPU.

    Args:
        path: folder of a run or checkpoint of vg, or a published Grounding DINO: an official or mmdetection .pth, a
            transformers folder or its Hub id.
        tokenizer: folder, vocab.txt, tokenizer.json or Hub id for a .pth, which contains no tokenizer; by default that
            of BERT.
        overrides: of the configuration of a checkpoint of vg, such as "model.vision.id=/new/folder".

    Raises:
        CheckpointError: not a checkpoint, damaged, or weights that do not fit the model.
        ConfigError: unknown overrides, or overrides of a checkpoint without a vg configuration.
    """
    if is_checkpoint(path):
        return read_model(path, overrides)[0]
    if overrides:
        raise ConfigError(f"{path} is not a checkpoint of vg, so {', '.join(overrides)} cannot be set")
    return open_model(path, tokenizer)


@overload
def predict_and_crop(
    image: ImageLike,
    prompt: str,
    model: Grounder | GroundingModel | str | Path,
    device: str | None = None,
    threshold: float | None = None,
) -> tuple[np.ndarray, Box, np.ndarray]: ...


@overload
def predict_and_crop(
    image: ImageLike,
    prompt: str,
    model: Grounder | GroundingModel | str | Path,
    tokenizer: Any,
    transforms: Any,
    device: str | torch.device | None = None,
    threshold: float | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Image.Image, Box, Image.Image]: ...


def predict_and_crop(
    image: ImageLike,
    prompt: str,
    model: Grounder | GroundingModel | str | Path,
    *published: Any,
    tokenizer: Any = None,
    transforms: Any = None,
    device: str | torch.device | None = None,
    threshold: float | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Any, Box, Any]:
    """Ground an expression in an image and crop the best box.

    The calling convention of the published code works too: `predict_and_crop(image, prompt, model, tokenizer,
    transforms, device)` returns PIL images. Its tokenizer and transforms are not used, because a model of vg contains
    its own; a tokenizer with another vocabulary causes a warning.

    Args:
        image: [H, W, 3] uint8 array, PIL image, path or http(s) URL.
        prompt: a referring expression, such as "the man in the red shirt".
        model: a Grounder, a model, or a path for `load_model`. For several images, create a Grounder once.
        device: device of a model that is not a Grounder; by default the fastest one available.
        threshold: minimum score of the box; by default any.
        overrides: see `load_model`.

    Returns:
        crop [h, w, 3] uint8; box (left, top, right, bottom) in pixels; image_with_box [H, W, 3] uint8. By the published
        calling convention, crop and image_with_box are PIL images.

    Raises:
        DataError: an unreadable image, an empty prompt, or no box with a sufficient score.
        ConfigError, PredictionError: see `Grounder.predict`.
        TypeError: positional arguments of neither calling convention.
    """
    ours = len(published) <= 2 and isinstance(published[0] if published else None, (str, torch.device, type(None)))
    as_published = not ours or tokenizer is not None or transforms is not None
    names = ("tokenizer", "transforms", "device", "threshold") if as_published else ("device", "threshold")
    keywords = {"tokenizer": tokenizer, "transforms": transforms, "device": device, "threshold": threshold}
    if len(published) > len(names) or any(keywords[name] is not None for name in names[: len(published)]):
        raise TypeError("predict_and_crop takes (image, prompt, model[, tokenizer, transforms][, device, threshold])")
    tokenizer, _, device, threshold = (keywords | dict(zip(names, published, strict=False))).values()
    if not isinstance(model, Grounder):
        model = Grounder(model, None if device is None else str(device), overrides=overrides)
    if tokenizer is not None and tokenizer.get_vocab() != model.model.text_spec.tokenizer.get_vocab():
        warnings.warn("the tokenizer is not that of the model, which is used instead", stacklevel=2)
    pixels = to_array(image)
    prediction = model.predict(pixels, prompt, threshold)
    if not len(prediction.boxes):
        limit = "the threshold of the model" if threshold is None else f"the threshold {threshold}"
        raise DataError(f"nothing found for {prompt!r}: no box reaches {limit}; lower it or rephrase the prompt")
    box = prediction.boxes[0].tolist()
    height, width = pixels.shape[:2]
    left, top = min(int(box[0]), width - 1), min(int(box[1]), height - 1)
    right, bottom = max(left + 1, round(box[2])), max(top + 1, round(box[3]))  # at least one pixel
    drawn = draw_boxes(pixels, [box], [f"{prompt} {prediction.scores[0]:.2f}"])
    result = pixels[top:bottom, left:right].copy(), (box[0], box[1], box[2], box[3]), drawn
    return (Image.fromarray(result[0]), result[1], Image.fromarray(drawn)) if as_published else result
