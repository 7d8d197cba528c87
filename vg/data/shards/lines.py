"""The JSON line of a sample in a shard: an ODVG line with the fields of a Sample that ODVG does not have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vg.errors import BadSampleError
from vg.types import Sample


def line_of(sample: Sample, filename: str, classes: Sequence[str] | None = None) -> bytes:
    """Return the ODVG line of a sample, with a line feed.

    Beyond ODVG it has `id`, and where the sample has them `expression_type`, and `iscrowd` and `areas` of all boxes in
    the order of the boxes. A region without boxes is a phrase that names nothing in the image.

    Args:
        filename: name of the image.
        classes: names by label if `phrase_ids` are labels; None for a line of phrases or of a caption.

    Raises:
        BadSampleError: two phrases are equal, and there is no caption that distinguishes them.
    """
    height, width = sample.image.shape[:2]
    row: dict[str, Any] = {"id": sample.id, "filename": filename, "height": height, "width": width}
    if sample.expression_type:
        row["expression_type"] = sample.expression_type
    if sample.crowd is not None:
        row["iscrowd"] = sample.crowd.astype(int).tolist()
    if sample.areas is not None:
        row["areas"] = sample.areas.tolist()
    if classes is not None:
        pairs = zip(sample.phrase_ids.tolist(), sample.boxes.tolist(), strict=True)
        instances = [{"bbox": box, "label": label, "category": classes[label]} for label, box in pairs]
        row["detection"] = {"instances": instances}
    else:
        row["grounding"] = _grounding(sample)
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def _grounding(sample: Sample) -> dict[str, Any]:
    """Return caption and regions; the order of the regions is that of the boxes, and of the phrases' first regions."""
    if sample.caption is None and len(set(sample.phrases)) < len(sample.phrases):
        raise BadSampleError(f"sample {sample.id}: a phrase occurs twice in {sample.phrases}; make them one phrase")
    regions: list[dict[str, Any]] = []
    last = -1  # phrase of the last region
    introduced = 0  # phrases that have a region
    for phrase_id, box in zip(sample.phrase_ids.tolist(), sample.boxes.tolist(), strict=True):
        while introduced <= phrase_id:
            regions.append(_region(sample, introduced))
            last, introduced = introduced, introduced + 1
        if phrase_id != last:
            regions.append(_region(sample, phrase_id))
            last = phrase_id
        regions[-1]["bbox"].append(box)
    regions += [_region(sample, phrase_id) for phrase_id in range(introduced, len(sample.phrases))]
    return {"regions": regions} if sample.caption is None else {"caption": sample.caption.text, "regions": regions}


def _region(sample: Sample, phrase_id: int) -> dict[str, Any]:
    """Return a region without boxes; with a caption, its phrase is the words of its spans."""
    if sample.caption is None:
        return {"phrase": sample.phrases[phrase_id], "bbox": []}
    text, spans = sample.caption.text, sample.caption.spans[phrase_id]
    words = " ".join(text[begin:end].strip() for begin, end in spans)
    return {"phrase": " ".join(words.split()), "bbox": [], "tokens_positive": [list(span) for span in spans]}


def extras(row: Mapping[str, Any]) -> tuple[str, np.ndarray | None, np.ndarray | None]:
    """Return expression type, crowd [N] bool and areas [N] float32 of a decoded line; None where it has none."""
    crowd, areas = row.get("iscrowd"), row.get("areas")
    return (
        str(row.get("expression_type", "")),
        None if crowd is None else np.array(crowd, bool),
        None if areas is None else np.array(areas, np.float32),
    )
