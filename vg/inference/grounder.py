"""A trained model, ready to be asked: a picture and phrases in, boxes out."""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from vg.checkpoint import is_checkpoint, read_model
from vg.data.collate import Collator
from vg.errors import DataError
from vg.models.base import GroundingModel
from vg.models.grounding_dino.checkpoints import open_model
from vg.types import Prediction, Sample

ImageLike = np.ndarray | Image.Image | str | Path  # an array, a PIL image, a path or an http(s) URL
DOWNLOAD_SECONDS = 30


def to_array(image: ImageLike) -> np.ndarray:
    """Any picture, upright as a viewer shows it -> [H, W, 3] uint8, RGB.

    Raises:
        DataError: an array of another shape or type, an address that cannot be read, or a damaged file.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"an image array is [H, W, 3] uint8; got {list(image.shape)} {image.dtype}")
        return image
    if isinstance(image, Image.Image):
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    try:
        source = io.BytesIO(_download(str(image))) if str(image).startswith(("http://", "https://")) else image
        with Image.open(source) as opened:
            return np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except OSError as error:  # no such file, no network, no picture, or a damaged one
        raise DataError(f"cannot read the image {image}: {error}") from error


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as response:
        return response.read()


class Grounder:
    """Wraps a model for use.

    Args:
        model: a model, or what load_model takes: the folder of a run or checkpoint, or a published Grounding DINO.
        device: "cpu", "cuda", "mps", to which the model is moved; by default the fastest there is.
        tokenizer: see load_model.
    """

    def __init__(self, model: str | Path | GroundingModel, device: str | None = None, tokenizer: str | None = None):
        self.model = model if isinstance(model, GroundingModel) else load_model(model, tokenizer)
        self.model.to(device or best_device()).eval()
        self.collate = Collator(self.model.image_spec, self.model.text_spec)

    @property
    def takes_many(self) -> bool:
        """Whether the model takes any number of phrases, each for any number of boxes; else one expression, for one."""
        return bool(self.model.text_spec.delimiters)

    def predict(self, image: ImageLike, phrases: str | Sequence[str], threshold: float | None = None) -> Prediction:
        """Boxes for one phrase or many, xyxy in pixels of the image, best first.

        Args:
            image: [H, W, 3] uint8 array, PIL image, path or http(s) URL.
            phrases: what to look for; box k of the answer shows ``phrases[phrase_ids[k]]``, spelled as it is here.
            threshold: boxes that score lower are left out; by default the answer is as long as the model makes it.

        Raises:
            DataError: no picture, no phrase, or one that the model cannot be asked (blank, too long).
        """
        return self.predict_batch([image], [phrases], threshold)[0]

    def predict_batch(
        self, images: Sequence[ImageLike], phrases: Sequence[str | Sequence[str]], threshold: float | None = None
    ) -> list[Prediction]:
        """One prediction for each image, which has a phrase or phrases of its own; all go through the model at once.

        Raises:
            ValueError: there are not as many entries of phrases as images.
            DataError: see predict.
        """
        if isinstance(phrases, str):
            raise ValueError("phrases has an entry for each image: [phrases] * len(images) asks all for the same")
        if not images:
            return []
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        samples = [
            Sample(str(i), to_array(image), (asked,) if isinstance(asked, str) else tuple(asked), *nothing)
            for i, (image, asked) in enumerate(zip(images, phrases, strict=True))
        ]
        return self.predict_samples(samples, threshold)

    @torch.no_grad()
    def predict_samples(self, samples: Sequence[Sample], threshold: float | None = None) -> list[Prediction]:
        """The same for samples of a data set; the results are on the CPU."""
        for sample in samples:
            if not sample.phrases or not all(phrase.strip() for phrase in sample.phrases):
                raise DataError("there is no phrase, or an empty one: say what to look for")
        batch = self.collate(samples).to(self.model.device)
        predictions = [prediction.to("cpu") for prediction in self.model.predict(self.model(batch), batch)]
        return predictions if threshold is None else [above(prediction, threshold) for prediction in predictions]


def above(prediction: Prediction, threshold: float) -> Prediction:
    """The prediction without boxes that score lower than the threshold."""
    kept = prediction.scores >= threshold  # [K]
    return replace(
        prediction,
        boxes=prediction.boxes[kept],
        scores=prediction.scores[kept],
        phrase_ids=prediction.phrase_ids[kept],
    )


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_model(place: str | Path, tokenizer: str | None = None) -> GroundingModel:
    """A trained model, in evaluation mode on the CPU.

    Args:
        place: the folder of a run or checkpoint of vg; or a published Grounding DINO: an official or mmdetection
            .pth, a folder of transformers, or its Hub id.
        tokenizer: folder, vocab.txt, tokenizer.json or Hub id, for a .pth, which holds none; by default BERT's.

    Raises:
        vg.checkpoint.CheckpointError: not a checkpoint, damaged, or weights that do not fit.
    """
    return read_model(place)[0] if is_checkpoint(place) else open_model(place, tokenizer)
