"""predict_and_crop: ground an expression in an image and crop the image to the predicted box."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vg.errors import DataError
from vg.inference.draw import draw_boxes
from vg.inference.grounder import Grounder, ImageLike, to_array
from vg.models.base import GroundingModel


def predict_and_crop(
    image: ImageLike,
    prompt: str,
    model: Grounder | GroundingModel | str | Path,
    device: str | None = None,
    threshold: float | None = None,
) -> tuple[np.ndarray, tuple[float, float, float, float], np.ndarray]:
    """Ground an expression in an image and crop the best box.

    Args:
        image: [H, W, 3] uint8 array, PIL image, path or http(s) URL.
        prompt: a referring expression, such as "the man in the red shirt".
        model: a Grounder, a model, or a path for `load_model`. For several images, create a Grounder once.
        device: device of a model that is not a Grounder; by default the fastest one available.
        threshold: minimum score of the box; by default any.

    Returns:
        crop [h, w, 3] uint8; box (left, top, right, bottom) in pixels; image_with_box [H, W, 3] uint8.

    Raises:
        DataError: an unreadable image, an empty prompt, or no box with a sufficient score.
    """
    grounder = model if isinstance(model, Grounder) else Grounder(model, device)
    pixels = to_array(image)
    prediction = grounder.predict(pixels, prompt, threshold)
    if not len(prediction.boxes):
        limit = "the threshold of the model" if threshold is None else f"the threshold {threshold}"
        raise DataError(f"nothing found for {prompt!r}: no box reaches {limit}; lower it or rephrase the prompt")
    box = prediction.boxes[0].tolist()
    height, width = pixels.shape[:2]
    left, top = min(int(box[0]), width - 1), min(int(box[1]), height - 1)
    right, bottom = max(left + 1, round(box[2])), max(top + 1, round(box[3]))  # at least one pixel
    drawn = draw_boxes(pixels, [box], [f"{prompt} {prediction.scores[0]:.2f}"])
    return pixels[top:bottom, left:right].copy(), (box[0], box[1], box[2], box[3]), drawn
