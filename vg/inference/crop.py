"""predict_and_crop: from a picture and an expression to the piece of the picture that shows it."""

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
    """Find what the prompt names, and cut it out.

    Args:
        image: [H, W, 3] uint8 array, PIL image, path or http(s) URL.
        prompt: a referring expression, such as "the man in the red shirt".
        model: a Grounder, a model, or the folder of a run or checkpoint. For many pictures make a Grounder once.
        device: where a model that is not yet in a Grounder shall run; by default the fastest there is.
        threshold: the lowest score that a box may have; by default any.

    Returns:
        crop [h, w, 3] uint8; box (left, top, right, bottom) in pixels; image_with_box [H, W, 3] uint8.

    Raises:
        DataError: no picture, no prompt, or no box that scores high enough.
    """
    grounder = model if isinstance(model, Grounder) else Grounder(model, device)
    pixels = to_array(image)
    prediction = grounder.predict(pixels, prompt, threshold)
    if not len(prediction.boxes):
        limit = "the threshold of the model" if threshold is None else f"the threshold {threshold}"
        raise DataError(f"nothing found for {prompt!r}: no box reaches {limit}; lower it or ask otherwise")
    box = prediction.boxes[0].tolist()
    height, width = pixels.shape[:2]
    left, top = min(int(box[0]), width - 1), min(int(box[1]), height - 1)
    right, bottom = max(left + 1, round(box[2])), max(top + 1, round(box[3]))  # at least one pixel
    drawn = draw_boxes(pixels, [box], [f"{prompt} {prediction.scores[0]:.2f}"])
    return pixels[top:bottom, left:right].copy(), (box[0], box[1], box[2], box[3]), drawn
