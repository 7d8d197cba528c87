"""`predict_and_crop`: one expression, one image, one box, with the arguments of the published code."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from PIL import Image

from vg.errors import DataError
from vg.inference.arguments import checked_phrases
from vg.inference.grounder import Grounder
from vg.inference.images import ImageLike
from vg.inference.result import Box

if TYPE_CHECKING:
    import torch

    from vg.models.base import GroundingModel


@overload
def predict_and_crop(
    image: ImageLike,
    prompt: str,
    model: Grounder | GroundingModel | str | Path,
    tokenizer: None = None,
    transforms: None = None,
    device: str | torch.device | None = None,
    threshold: float | None = None,
    overrides: Sequence[str] = (),
) -> tuple[np.ndarray, Box, np.ndarray]: ...


@overload
def predict_and_crop(
    image: ImageLike,
    prompt: str,
    model: Grounder | GroundingModel | str | Path,
    tokenizer: Any,
    transforms: Any = None,
    device: str | torch.device | None = None,
    threshold: float | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Image.Image, Box, Image.Image]: ...


def predict_and_crop(
    image: ImageLike,
    prompt: str,
    model: Grounder | GroundingModel | str | Path,
    tokenizer: Any = None,
    transforms: Any = None,
    device: str | torch.device | None = None,
    threshold: float | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Any, Box, Any]:
    """Ground an expression in an image and crop the best box.

    The arguments are in the order of the published code, `predict_and_crop(image, prompt, model, tokenizer, transforms,
    device)`, but a model of vg contains its tokenizer and transforms, so these are not used.

    Args:
        image: [H, W, 3] uint8 array, PIL image, path or http(s) URL.
        prompt: a referring expression, such as "the man in the red shirt".
        model: a Grounder, a model, or a path for `load_model`. For several images, create a Grounder once.
        tokenizer, transforms: where they are given, images are returned as PIL images, as by the published code; a
            tokenizer with another vocabulary than that of the model causes a warning.
        device: device of a model that is not a Grounder; by default the fastest one available.
        threshold: minimum score of the box, 0..1; by default as in `Grounder`.
        overrides: see `load_model`.

    Returns:
        crop [h, w, 3] uint8; box (left, top, right, bottom) in pixels; image_with_box [H, W, 3] uint8.

    Raises:
        DataError: an unreadable image or several, an empty prompt, or no box with a sufficient score.
        ConfigError, PredictionError: see `Grounder.predict`.
        TypeError: another argument in the place of the tokenizer or the transforms.
    """
    if transforms is not None and not callable(transforms):
        raise TypeError(f"{transforms!r:.80} does not transform images; give device= and threshold= by name")
    if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"{tokenizer!r:.80} is not a tokenizer; give device= and threshold= by name")
    if not isinstance(model, Grounder):
        model = Grounder(model, None if device is None else str(device), overrides=overrides)
    if tokenizer is not None and tokenizer.get_vocab() != model.tokenizer.get_vocab():
        warnings.warn("the tokenizer is not that of the model, which is used instead", stacklevel=2)
    found = model.predict(image, checked_phrases(prompt), model.threshold(threshold))
    if not len(found):
        limit = "the threshold of the model" if threshold is None else f"the threshold {threshold}"
        raise DataError(f"nothing found for {prompt!r}: no box reaches {limit}; lower it or rephrase the prompt")
    found = found.select(np.array([0]))
    crop, box, drawn = found.crop()[0], found[0].box, found.draw()
    if tokenizer is None and transforms is None:
        return crop, box, drawn
    return Image.fromarray(crop), box, Image.fromarray(drawn)
