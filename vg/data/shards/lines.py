"""The JSON line of a sample in a shard: an ODVG line with the fields of a Sample that ODVG does not have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vg.data.detection.issues import RaiseFirstError
from vg.data.detection.odvg import line_prompt
from vg.data.detection.odvg_lines import LabelMap, LineParser
from vg.data.detection.source import clip_boxes
from vg.data.detection.vocabulary import Vocabulary
from vg.data.images import read_image
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


class LineReader:
    """Makes samples of lines and their images.

    Args:
        origin: of the lines, for messages.
        label_map: the classes, if lines have labels.
        vocabulary: of these classes.
        whole: captions are prompts, see `captions` of vg.data.detection.odvg.
        clip: clip boxes to the image, and leave out those without area in it; otherwise they are in the image.
    """

    def __init__(
        self,
        origin: str,
        label_map: LabelMap | None,
        vocabulary: Vocabulary | None,
        whole: bool = False,
        clip: bool = False,
    ) -> None:
        self._strict = RaiseFirstError(origin, BadSampleError)
        self._label_map = label_map
        self._vocabulary = vocabulary
        self._whole = whole
        self._clip = clip

    def row(self, text: bytes, location: str) -> dict[str, Any]:
        """Decode a line; raises BadSampleError, which names its location."""
        row = LineParser(None, self._strict).row(text, location)
        assert row is not None, "an invalid line has raised"
        return row

    def sample(self, row: Mapping[str, Any], image_file: bytes, location: str, epoch: int, index: int) -> Sample:
        """Return the sample of a decoded line and the content of its image file.

        Args:
            epoch, index: what the phrases depend on where the vocabulary samples them.

        Raises:
            BadSampleError: the message names the location.
        """
        parser = LineParser(self._label_map, self._strict, self._whole, exact=True)
        line = parser.parse_row(row, location)
        assert line is not None, "an invalid line has raised"
        image = read_image(image_file, f"{line.file} ({location})")
        if all(line.size) and image.shape[:2] != tuple(line.size):
            raise BadSampleError(
                f"{location}: the image is {image.shape[:2]}, its line has (height, width) {line.size}"
            )
        boxes = np.array([box.values for box in line.boxes], np.float32).reshape(-1, 4)
        labels = np.array([box.label for box in line.boxes], np.int64)
        kept = np.ones(len(boxes), bool)
        try:
            expression_type, crowd, areas = _extras(row, len(boxes))
            if self._clip:
                boxes, kept = clip_boxes(boxes, image, min_side=0.0)
        except BadSampleError as error:
            raise BadSampleError(f"{location}: {error}") from error
        if crowd is not None and self._vocabulary and self._vocabulary.config.negatives is not None:
            kept &= ~crowd  # as in vg.data.detection.source
        phrases, phrase_ids, kept = line_prompt(parser, self._vocabulary, labels, kept, epoch, index)
        return Sample(
            id=str(row.get("id", line.file)),
            image=image,
            phrases=phrases,
            boxes=boxes[kept],
            phrase_ids=phrase_ids,
            expression_type=expression_type,
            crowd=None if crowd is None or not crowd[kept].any() else crowd[kept],
            areas=None if areas is None else areas[kept],
            caption=line.caption and line.caption._replace(location=location),
        )


def _extras(row: Mapping[str, Any], count: int) -> tuple[str, np.ndarray | None, np.ndarray | None]:
    """Return expression type, crowd [N] bool and areas [N] float32 of a decoded line; None where it has none.

    Args:
        count: N, the boxes of the line.

    Raises:
        BadSampleError: there is not a number for each box.
    """
    found: dict[str, np.ndarray | None] = {}
    for name, dtype in (("iscrowd", np.bool_), ("areas", np.float32)):
        values = row.get(name)
        try:
            found[name] = None if values is None else np.array(values, np.float32).reshape(count).astype(dtype)
        except (ValueError, TypeError) as error:
            raise BadSampleError(
                f"{name} is {str(values)[:80]}, expected a number for each of {count} boxes"
            ) from error
    return str(row.get("expression_type", "")), found["iscrowd"], found["areas"]
