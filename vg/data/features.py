"""Samples whose image and expression are already encoded, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vg import boxes as box_ops
from vg.types import Batch, Features, PromptTargets, Target, Text


@dataclass(frozen=True)
class FeatureSample:
    """One expression and its picture as encoders see them; the arrays lie on disk until they are read."""

    id: str
    picture: tuple[str, int]  # which cache, and which picture and view in it
    image: np.ndarray  # [S, D] float16
    grid: tuple[int, int]  # rows, columns of the last tokens
    words: np.ndarray  # [T, D] float16
    size: tuple[int, int]  # (height, width) of the view in pixels
    expression: str
    box: np.ndarray  # [4] float32, xyxy in pixels of the view
    expression_type: str


def collate_features(samples: Sequence[FeatureSample]) -> Batch:
    """A batch where samples of one picture share it; `images`, `sizes` and `token_ids` hold nothing."""
    pictures = {sample.picture: sample.image for sample in samples}
    places = {picture: place for place, picture in enumerate(pictures)}
    lengths = [len(sample.words) for sample in samples]
    words = np.zeros((len(samples), max(lengths), samples[0].words.shape[1]), np.float16)  # [R, T, D]
    for row, sample in zip(words, samples, strict=True):
        row[: len(sample.words)] = sample.words
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)  # [R, T]
    image_ids = torch.tensor([places[sample.picture] for sample in samples])
    text = Text(torch.zeros_like(mask, dtype=torch.long), mask, mask.unsqueeze(1), image_ids)
    return Batch(
        images=torch.empty(0, 3, 0, 0),
        sizes=(),
        text=text,
        targets=[_target(sample) for sample in samples],
        prompt_targets=PromptTargets.without_boxes(text),
        features=Features(
            torch.from_numpy(np.stack(list(pictures.values()))), samples[0].grid, torch.from_numpy(words)
        ),
    )


def _target(sample: FeatureSample) -> Target:
    boxes: Tensor = box_ops.from_pixels(torch.from_numpy(sample.box).unsqueeze(0), sample.size)
    return Target(
        sample.id, sample.size, (sample.expression,), boxes, torch.zeros(1, dtype=torch.long), sample.expression_type
    )
