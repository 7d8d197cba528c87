"""A trained model, ready to be asked: a picture and an expression in, boxes out."""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from vg.checkpoint import read_model
from vg.data.collate import Collator
from vg.data.source import DataError
from vg.models.base import GroundingModel
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
        model: the folder of a run or a checkpoint, or a model.
        device: "cpu", "cuda", "mps"; by default the fastest there is.
    """

    def __init__(self, model: str | Path | GroundingModel, device: str | None = None):
        self.model = model if isinstance(model, GroundingModel) else read_model(model)[0]
        self.model.to(device or best_device()).eval()
        self.collate = Collator(self.model.image_spec, self.model.text_spec)

    def predict(self, image: ImageLike, expression: str) -> Prediction:
        """Boxes for one expression, xyxy in pixels of the image, best first."""
        return self.predict_batch([image], [expression])[0]

    def predict_batch(self, images: Sequence[ImageLike], expressions: Sequence[str]) -> list[Prediction]:
        """One prediction for each pair of image and expression."""
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        pairs = zip(images, expressions, strict=True)
        return self.predict_samples(
            [Sample(str(i), to_array(image), (expression,), *nothing) for i, (image, expression) in enumerate(pairs)]
        )

    @torch.inference_mode()
    def predict_samples(self, samples: Sequence[Sample]) -> list[Prediction]:
        """The same for samples of a data set; the results are on the CPU."""
        for sample in samples:
            if not all(phrase.strip() for phrase in sample.phrases):
                raise DataError("the expression is empty: say what to look for")
        batch = self.collate(samples).to(self.model.device)
        return [prediction.to("cpu") for prediction in self.model.predict(self.model(batch), batch)]


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_model(folder: str | Path) -> GroundingModel:
    """The model of a run or checkpoint folder, in evaluation mode on the CPU.

    Raises:
        vg.checkpoint.CheckpointError: not a checkpoint, damaged, or weights that do not fit.
    """
    return read_model(folder)[0]
