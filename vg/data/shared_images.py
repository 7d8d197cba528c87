"""Expressions of one image as one sample, so that their image is augmented and encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vg.errors import DataError
from vg.types import Sample


def joined(samples: Sequence[Sample]) -> Sample:
    """Join samples of one image: the phrases of all, one after the other, with their boxes.

    Raises:
        DataError: their images differ in size, or a sample has crowd regions or a whole caption.
    """
    first = samples[0]
    for sample in samples:
        if sample.caption is not None or sample.crowd is not None:
            raise DataError(
                f"{sample.id} has {'crowd regions' if sample.caption is None else 'a whole caption'}, with which it "
                "cannot share its image; set data.expressions_per_image=1"
            )
    for other in samples:
        if other.image.shape != first.image.shape:
            raise DataError(
                f"{first.id} and {other.id} have the same image key but sizes {first.image.shape[:2]} and "
                f"{other.image.shape[:2]}; give their images different file names"
            )
    starts = np.cumsum([0, *(len(sample.phrases) for sample in samples)])
    return replace(
        first,
        phrases=tuple(phrase for sample in samples for phrase in sample.phrases),
        boxes=np.concatenate([sample.boxes for sample in samples]),  # [N, 4]
        areas=None,
        phrase_ids=np.concatenate([sample.phrase_ids + start for sample, start in zip(samples, starts, strict=False)]),
    )


def separated(whole: Sample, samples: Sequence[Sample]) -> list[Sample]:
    """Undo `joined(samples)` after augmentation; all share the image array of `whole`."""
    parts, start = [], 0
    for sample in samples:
        stop = start + len(sample.phrases)
        own = (whole.phrase_ids >= start) & (whole.phrase_ids < stop)  # [N]
        parts.append(
            replace(
                whole,
                id=sample.id,
                phrases=whole.phrases[start:stop],
                boxes=whole.boxes[own],
                phrase_ids=whole.phrase_ids[own] - start,
                expression_type=sample.expression_type,
                seed=sample.seed,
            )
        )
        start = stop
    return parts
