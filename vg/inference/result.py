"""What a model finds in an image: boxes with phrases and scores, which can be cropped, drawn and converted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np

from vg.inference.arguments import check_count, check_fraction
from vg.nms import nms

Box: TypeAlias = tuple[float, float, float, float]  # (left, top, right, bottom) in pixels
READABLE_SIDE = 640  # longer side of a drawing in pixels, from which on labels are readable
NO_BOXES = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)  # boxes and phrase_ids of a Sample without ground truth
_NUM_SHOWN = 20  # boxes in the text of a result


class Boxes(NamedTuple):
    """The boxes of one image, best first, as a backend predicts them."""

    boxes: np.ndarray  # [K, 4] float32, xyxy in pixels
    scores: np.ndarray  # [K] float32, 0..1
    phrase_ids: np.ndarray  # [K] int64

    def above(self, threshold: float) -> Boxes:
        kept = self.scores >= threshold
        return Boxes(self.boxes[kept], self.scores[kept], self.phrase_ids[kept])


class Found(NamedTuple):
    """One box."""

    phrase: str
    score: float  # 0..1
    box: Box


@dataclass(frozen=True, eq=False)
class Result:
    """The boxes of one image, best first; `result[k]` and a loop give `Found`, `len(result)` the number of boxes.

    `result[:3]` is a result with the first three, `result[result.scores > 0.5]` one with the boxes of a mask. Boxes are
    xyxy in pixels of `image`. Selections (`above`, `nms`, `best`) are new results; that of `best`, which a model of one
    expression gives by default, is in the order of the phrases.
    """

    name: str  # path or URL of the image, with the number of the frame for a video, or "image 0" for pixels
    image: np.ndarray  # [H, W, 3] uint8, RGB
    phrases: tuple[str, ...]  # as given
    boxes: np.ndarray  # [K, 4] float32, xyxy in pixels
    scores: np.ndarray  # [K] float32, 0..1
    phrase_ids: np.ndarray  # [K] int64: box k belongs to phrases[phrase_ids[k]]
    masks: np.ndarray | None = None  # [K, H, W] bool, with masks=

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def labels(self) -> list[str]:
        """The phrase of every box."""
        return [self.phrases[index] for index in self.phrase_ids.tolist()]

    def __len__(self) -> int:
        return len(self.boxes)

    @overload
    def __getitem__(self, index: int) -> Found: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> Result: ...
    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> Found | Result:
        if not isinstance(index, Integral):
            return self.select(np.arange(len(self))[index])
        left, top, right, bottom = self.boxes[index].tolist()
        return Found(self.labels[index], float(self.scores[index]), (left, top, right, bottom))

    def __iter__(self) -> Iterator[Found]:
        return (self[index] for index in range(len(self)))

    def __str__(self) -> str:
        height, width = self.size
        lines = [f"{self.name}, {width} x {height}: {len(self)} box{'es' * (len(self) != 1)}"]
        for phrase, score, box in list(self)[:_NUM_SHOWN]:
            left, top, right, bottom = (f"{side:.1f}" for side in box)
            lines.append(f"  {phrase}: left {left}, top {top}, right {right}, bottom {bottom}, score {score:.2f}")
        return "\n".join(lines + ["  ..."] * (len(self) > _NUM_SHOWN))

    __repr__ = __str__

    def select(self, kept: np.ndarray) -> Result:
        """Return the boxes at the given indices, or those that a [K] bool array marks."""
        masks = None if self.masks is None else self.masks[kept]
        return replace(
            self, boxes=self.boxes[kept], scores=self.scores[kept], phrase_ids=self.phrase_ids[kept], masks=masks
        )

    def above(self, threshold: float) -> Result:
        """Return the boxes that score at least `threshold`; raises ConfigError unless that is 0..1."""
        return self.select(self.scores >= check_fraction(threshold, "threshold"))

    def nms(self, iou: float, exclusive: bool = False) -> Result:
        """Return the boxes without those whose IoU with a better box of the same phrase is above `iou`.

        Args:
            iou: 0..1; another value raises ConfigError.
            exclusive: compare with the boxes of all phrases, because an object has only one.
        """
        groups = np.zeros_like(self.phrase_ids) if exclusive else self.phrase_ids
        return self.select(nms(self.boxes, self.scores, check_fraction(iou, "iou"), groups))

    def best(self) -> Result:
        """Return the best box of every phrase that has one, in the order of the phrases."""
        _, first = np.unique(self.phrase_ids, return_index=True)
        return self.select(first)

    def crop(self) -> list[np.ndarray]:
        """Cut out every box -> K times [h, w, 3] uint8, at least one pixel each."""
        height, width = self.size
        crops = []
        for left, top, right, bottom in self.boxes.tolist():
            x, y = min(max(int(left), 0), width - 1), min(max(int(top), 0), height - 1)
            crops.append(self.image[y : max(y + 1, round(bottom)), x : max(x + 1, round(right))].copy())
        return crops

    def draw(self, side: int | None = None, legend: bool | None = False) -> np.ndarray:
        """Draw boxes, masks, phrases and scores on a copy of the image; a phrase has one color.

        The best boxes are on top, and labels that have no room are left out.

        Args:
            side: longer side of the drawing in pixels: 640 makes the labels on a small image readable. None keeps the
                size of the image.
            legend: True writes the numbers of phrases at the boxes, and the phrases below the image; None does so if
                labels would be left out.

        Returns:
            [H, W, 3] uint8, RGB, in the size of the image without `side` and `legend`.

        Raises:
            ConfigError: `side` is less than 1.
        """
        from vg.inference.draw import draw_result

        if side is not None:
            check_count(side, "side")
        return draw_result(self, side, legend)

    def to_dict(self) -> dict[str, Any]:
        """Return a record of JSON values: image, height, width, phrases, boxes.

        A box has phrase, phrase_id, score and box (left, top, right, bottom in pixels), and with masks a mask, a
        run-length encoding of COCO.
        """
        height, width = self.size
        boxes = [
            {"phrase": phrase, "phrase_id": int(index), "score": round(score, 4), "box": [round(x, 2) for x in box]}
            for (phrase, score, box), index in zip(self, self.phrase_ids, strict=True)
        ]
        for entry, mask in zip(boxes, () if self.masks is None else self.masks, strict=False):
            entry["mask"] = encode_mask(mask)
        return {"image": self.name, "height": height, "width": width, "phrases": list(self.phrases), "boxes": boxes}

    def to_json(self) -> str:
        """Return `to_dict` as one line."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """Return COCO results: image_id, category_id (number of the phrase from 1 on), bbox (xywh in pixels), score."""
        from vg.inference.formats import coco_results

        return coco_results(self.to_dict(), image_id)

    def to_supervision(self) -> Any:
        """Return `Detections` of the package supervision, with the phrases in `data["class_name"]`.

        Raises:
            ImportError: supervision is not installed.
        """
        try:
            from supervision import Detections
        except ImportError as error:
            raise ImportError("to_supervision needs the package supervision: pip install supervision") from error
        return Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.phrase_ids,
            data={"class_name": np.array(self.labels, dtype=np.str_)},
        )


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return the run-length encoding of COCO of a mask [H, W] bool: size (height, width) and counts."""
    from pycocotools.mask import encode

    encoded = encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}
