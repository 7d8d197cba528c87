"""Judges detection, many boxes of many categories per image, with the numbers of COCO (through pycocotools)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vg.boxes import area, to_pixels
from vg.metrics.average_precision import (
    ANY_SIZE,
    Boxes,
    Curves,
    mean_defined,
    precision_and_recall,
    to_xywh,
)
from vg.metrics.collected import CollectingMetric, check_pairs, hashed
from vg.types import Prediction, Target

SIZES = {"": ANY_SIZE, "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, ANY_SIZE[1])}
LIMITS = (1, 10, 100, 300, 1000)  # boxes per image and category
STANDARD, MOST = 100, 1000
AP_AT = {"50": 0, "75": 5}  # places in vg.metrics.average_precision.IOU_THRESHOLDS


class CocoMetric(CollectingMetric):
    """Collects predictions and targets over all batches and processes and computes the 12 numbers of COCO, and more.

    A category is a phrase: where all images share one list of phrases these are the usual numbers; a phrase that is not
    asked of an image costs nothing there. Predicted boxes count as they are, without clipping to the image. Sizes are
    those of `Target.areas`, and where that is None those of the boxes.

    `compute` returns a flat dict, 0..1, or -1 where there is no box to find:
        ap, ap50, ap75: mean over categories of the average precision, over the IoU thresholds 0.5, 0.55, ..., 0.95 or
            at one of them; ap_small, ap_medium, ap_large: of objects below 32 x 32, below 96 x 96 and above.
        ar@1, ar@10, ar@100: mean recall with so many boxes per image and category; ar_small, ... with 100.
        ap50@1000, ..., ar@300, ar@1000, ...: with so many boxes instead of 100, as mmdetection prints them.
        num_images, num_boxes, num_categories: how many these are about, without crowd regions.
    Every category that has a box to find is also reported as "<phrase>/ap", "<phrase>/ap50", "<phrase>/ap75" and
    "<phrase>/num_boxes".
    """

    title = "AP"
    protocol = "COCO average precision, 100 boxes per image and category, IoU in pixels of the original image"
    numbers = (
        *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
        *("ar@1", "ar@10", "ar@100", "ar_small", "ar_medium", "ar_large"),
        *("ap50@1000", "ap75@1000", "ap_small@1000", "ap_medium@1000", "ap_large@1000"),
        *("ar@300", "ar@1000", "ar_small@1000", "ar_medium@1000", "ar_large@1000"),
    )
    columns: ClassVar[dict[str, Tensor]] = {  # of I images with N true and K predicted boxes altogether
        "ids": torch.empty(0, dtype=torch.int64),  # [I] hash of the sample id
        "true_counts": torch.empty(0, dtype=torch.int64),  # [I] boxes of each image
        "true_boxes": torch.empty(0, 4),  # [N, 4] xyxy pixels, image after image
        "true_phrases": torch.empty(0, dtype=torch.int64),  # [N] hash of the phrase
        "areas": torch.empty(0),  # [N] square pixels
        "crowd": torch.empty(0, dtype=torch.uint8),  # [N] 0 or 1
        "counts": torch.empty(0, dtype=torch.int64),  # [I] predicted boxes of each image
        "boxes": torch.empty(0, 4),  # [K, 4] xyxy pixels, image after image
        "phrases": torch.empty(0, dtype=torch.int64),  # [K] hash of the phrase
        "scores": torch.empty(0),  # [K]
        "strings": torch.empty(0, dtype=torch.uint8),  # UTF-8 of ids and phrases, each closed by a zero byte
    }

    ids: list[Tensor]
    true_counts: list[Tensor]
    true_boxes: list[Tensor]
    true_phrases: list[Tensor]
    areas: list[Tensor]
    crowd: list[Tensor]
    counts: list[Tensor]
    boxes: list[Tensor]
    phrases: list[Tensor]
    scores: list[Tensor]
    strings: list[Tensor]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._known: set[str] = set()  # strings collected already

    def update(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        """Add a batch.

        Args:
            predictions: boxes xyxy in pixels of the original image, on any device.
            targets: the same samples in the same order, boxes cxcywh in 0..1.

        Raises:
            ValueError: predictions and targets are not of the same samples, or an image is asked for the same phrase
                twice. Nothing of the batch is added then.
        """
        check_pairs(predictions, targets)
        for target in targets:
            if len(set(target.phrases)) < len(target.phrases):
                twice = sorted({phrase for phrase in target.phrases if target.phrases.count(phrase) > 1})
                raise ValueError(
                    f"sample {target.id!r} has phrases more than once ({', '.join(twice)}): categories need names of "
                    "their own"
                )
        if not targets:
            return
        true_boxes = [to_pixels(target.boxes, target.size) for target in targets]
        areas = [area(b) if t.areas is None else t.areas for b, t in zip(true_boxes, targets, strict=True)]
        crowd = [t.boxes.new_zeros(len(t.boxes)) if t.crowd is None else t.crowd for t in targets]
        self._append(
            {
                "ids": torch.tensor([hashed(target.id) for target in targets]),
                "true_counts": torch.tensor([len(target.boxes) for target in targets]),
                "true_boxes": torch.cat(true_boxes),
                "true_phrases": torch.cat([_hashes(target) for target in targets]),
                "areas": torch.cat(areas),
                "crowd": torch.cat(crowd),
                "counts": torch.tensor([len(prediction.boxes) for prediction in predictions]),
                "boxes": torch.cat([prediction.boxes.reshape(-1, 4) for prediction in predictions]),
                "phrases": torch.cat([_hashes(prediction) for prediction in predictions]),
                "scores": torch.cat([prediction.scores for prediction in predictions]),
                "strings": self._new_strings(predictions, targets),
            }
        )

    def compute(self) -> dict[str, float]:
        """The numbers described above, over what all processes have seen.

        Raises:
            ValueError: there is nothing to judge, or different samples share an id.
        """
        images = self._images()
        categories, truth, found = images.categories, images.truth, images.found
        curves = precision_and_recall(
            len(images.ids),
            len(categories),
            truth,
            found,
            images.scores,
            sizes=list(SIZES.values()),
            max_boxes=LIMITS,
            areas=images.areas,
            crowd=images.crowd,
        )
        results: dict[str, float] = _numbers(curves)
        to_find = np.bincount(truth.categories[~images.crowd], minlength=len(categories))  # [C]
        results |= {
            "num_images": len(images.ids),
            "num_boxes": int(to_find.sum()),
            "num_categories": int(np.count_nonzero(to_find)),
        }
        for category in np.flatnonzero(to_find):
            precision = curves.precision[:, :, category, 0, LIMITS.index(STANDARD)]  # [T, 101]
            phrase = categories[category]
            results[f"{phrase}/ap"] = mean_defined(precision)
            results |= {f"{phrase}/ap{name}": mean_defined(precision[place]) for name, place in AP_AT.items()}
            results[f"{phrase}/num_boxes"] = int(to_find[category])
        return results

    def detections(self, category_ids: Mapping[str, int]) -> list[dict[str, Any]]:
        """What all processes have predicted, as a COCO results file holds it; every process must ask.

        Args:
            category_ids: phrase -> `category_id`.

        Returns:
            Rows with `image_id` (a number where the id of the sample is one), `category_id`, `bbox` (left, top, width,
            height in pixels) and `score`, image after image in the order of their ids.

        Raises:
            ValueError: a phrase has no category id.
        """
        with self.sync_context():
            images = self._images(all_phrases=True)
        missing = [phrase for phrase in images.categories if phrase not in category_ids]
        if missing:
            raise ValueError(f"no category id for {', '.join(missing)}; there are ids for {', '.join(category_ids)}")
        image_ids = [int(id) if id.isdecimal() else id for id in images.ids]
        order = np.argsort(images.found.images, kind="stable")
        columns = (images.found.images, images.found.categories, to_xywh(images.found.boxes), images.scores)
        return [
            {
                "image_id": image_ids[image],
                "category_id": category_ids[images.categories[category]],
                "bbox": box,
                "score": round(score, 6),
            }
            for image, category, box, score in zip(*(column[order].tolist() for column in columns), strict=True)
        ]

    def _images(self, all_phrases: bool = False) -> _Images:
        """Every image once. Predictions of phrases that no true box has are left out but for `all_phrases`."""
        state = self._collected()
        if not len(state["ids"]):
            raise ValueError("CocoMetric saw no image: the evaluated data is empty or all of it was skipped")
        names = {hashed(text): text for text in state["strings"].tobytes().decode().split("\0")}

        _, first, sample = np.unique(state["ids"], return_index=True, return_inverse=True)  # [U], [I] -> 0..U-1
        self._check_repeats(state, first, sample)
        is_first = np.zeros(len(sample), dtype=bool)  # [I]
        is_first[first] = True
        ids = [names[id] for id in state["ids"][first].tolist()]
        order = sorted(range(len(ids)), key=lambda image: _natural(ids[image]))  # as pycocotools orders equal scores
        number = np.argsort(order)[sample]  # [I] 0..U-1

        in_truth, in_found = np.repeat(is_first, state["true_counts"]), np.repeat(is_first, state["counts"])  # [N], [K]
        asked = [state["true_phrases"][in_truth]] + [state["phrases"][in_found]] * all_phrases
        categories = np.unique(np.concatenate(asked))  # [C] hashes
        in_found &= np.isin(state["phrases"], categories)

        def table(counts: str, phrases: str, boxes: str, kept: np.ndarray) -> Boxes:
            category = np.searchsorted(categories, state[phrases][kept])
            return Boxes(np.repeat(number, state[counts])[kept], category, state[boxes][kept].astype(np.float64))

        return _Images(
            ids=[ids[image] for image in order],
            categories=[names[phrase] for phrase in categories.tolist()],
            truth=table("true_counts", "true_phrases", "true_boxes", in_truth),
            areas=state["areas"][in_truth].astype(np.float64),
            crowd=state["crowd"][in_truth].astype(bool),
            found=table("counts", "phrases", "boxes", in_found),
            scores=state["scores"][in_found].astype(np.float64),
        )

    @staticmethod
    def _check_repeats(state: dict[str, np.ndarray], first: np.ndarray, sample: np.ndarray) -> None:
        """Raises ValueError where samples of one id differ, by the number of their boxes or the sum of their sides."""
        owner = np.repeat(np.arange(len(sample)), state["true_counts"])  # [N]
        sums = np.bincount(owner, state["true_boxes"].sum(axis=1), minlength=len(sample))  # [I]
        same = state["true_counts"] == state["true_counts"][first][sample]
        if not (same & np.isclose(sums, sums[first][sample], rtol=1e-4, atol=0.5)).all():
            raise ValueError("samples with the same id have different true boxes: make the ids of the data unique")

    def _new_strings(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> Tensor:
        """[bytes] uint8, ids and phrases that were not collected before."""
        ids = {target.id for target in targets}
        new = ids.union(*(p.phrases for p in predictions), *(t.phrases for t in targets)) - self._known
        self._known |= new
        return torch.tensor(list("".join(f"{text}\0" for text in sorted(new)).encode()))


class _Images(NamedTuple):
    """U images, N true and K predicted boxes of C categories; numbers of images and categories start at 0."""

    ids: list[str]  # U
    categories: list[str]  # C phrases
    truth: Boxes  # N
    areas: np.ndarray  # [N] square pixels
    crowd: np.ndarray  # [N] bool
    found: Boxes  # K
    scores: np.ndarray  # [K]


def _numbers(curves: Curves) -> dict[str, float]:
    """The numbers over all categories, in the order of `CocoMetric.numbers`."""
    values: dict[str, float] = {}
    for limit, suffix in ((STANDARD, ""), (MOST, f"@{MOST}")):
        m = LIMITS.index(limit)
        for a, size in enumerate(SIZES):
            values[f"ap{size}{suffix}"] = mean_defined(curves.precision[:, :, :, a, m])
            values[f"ar{size}{suffix}"] = mean_defined(curves.recall[:, :, a, m])
        for name, place in AP_AT.items():
            values[f"ap{name}{suffix}"] = mean_defined(curves.precision[place, :, :, 0, m])
    for m, limit in enumerate(LIMITS):
        values[f"ar@{limit}"] = mean_defined(curves.recall[:, :, 0, m])
    return {name: values[name] for name in CocoMetric.numbers}


def _hashes(asked: Prediction | Target) -> Tensor:
    """[boxes] int64, of the phrase of each box."""
    phrase_ids = asked.phrase_ids
    hashes = torch.tensor([hashed(phrase) for phrase in asked.phrases], dtype=torch.int64, device=phrase_ids.device)
    return hashes[phrase_ids]


def _natural(id: str) -> tuple[bool, int, str]:
    """Sorts numbers as numbers, before everything else."""
    return (False, int(id), "") if id.isdecimal() else (True, 0, id)
