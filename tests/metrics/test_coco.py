"""Metric of detection: pycocotools on files as reference, real detections, and several processes."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file

from vg.boxes import from_pixels
from vg.metrics import CocoMetric
from vg.types import Prediction, Target

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # in the order of pycocotools
STANDARD = (*NAMES, "ar@1", "ar@10", "ar@100", "ar_small", "ar_medium", "ar_large")
MMDETECTION = (
    *("ap", *(f"{name}@1000" for name in NAMES[1:])),
    *("ar@100", "ar@300", "ar@1000", "ar_small@1000", "ar_medium@1000", "ar_large@1000"),
)

Samples = list[tuple[Prediction, Target]]


def pairs(truth: dict[str, Any], found: list[dict[str, Any]]) -> Samples:
    """Convert COCO annotations and results to predictions and targets."""
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    index_of = {category["id"]: index for index, category in enumerate(categories)}
    phrases = tuple(category["name"] for category in categories)
    samples = []
    for image in truth["images"]:
        size = (image["height"], image["width"])
        rows = [row for row in truth["annotations"] if row["image_id"] == image["id"]]
        boxes = [row for row in found if row["image_id"] == image["id"]]
        boxes.sort(key=lambda row: -row["score"])
        target = Target(
            str(image["id"]),
            size,
            phrases,
            from_pixels(xyxy(rows), size),
            torch.tensor([index_of[row["category_id"]] for row in rows], dtype=torch.long),
            crowd=torch.tensor([bool(row["iscrowd"]) for row in rows], dtype=torch.bool),
            areas=torch.tensor([row["area"] for row in rows], dtype=torch.float32),
        )
        scores = torch.tensor([row["score"] for row in boxes], dtype=torch.float32)
        phrase_ids = torch.tensor([index_of[row["category_id"]] for row in boxes], dtype=torch.long)
        samples.append((Prediction(str(image["id"]), xyxy(boxes), scores, phrase_ids, phrases), target))
    return samples


def xyxy(rows: list[dict[str, Any]]) -> torch.Tensor:
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).reshape(-1, 4)
    return torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1).float()


def metric_of(samples: Samples, batch_size: int = 7) -> CocoMetric:
    metric = CocoMetric()
    for start in range(0, len(samples), batch_size):
        metric.update(*zip(*samples[start : start + batch_size], strict=True))
    return metric


def official(truth: dict[str, Any], found: list[dict[str, Any]], limits: list[int], folder: Path) -> dict[str, Any]:
    """The 12 metrics of pycocotools on files with these box limits, and "per class" the AP of categories with boxes."""
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(folder / "truth.json")
        evaluation = COCOeval(coco, coco.loadRes(str(folder / "found.json")), "bbox")
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, limits.index(100)]  # [T, 101, C]
    names = [coco.cats[id]["name"] for id in evaluation.params.catIds]
    per_class = {name: precision[:, :, index].mean() for index, name in enumerate(names)}
    return {"stats": evaluation.stats, "per class": {name: ap for name, ap in per_class.items() if ap > -1}}


def scenes(count: int, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random annotations with crowd regions and a category without boxes, and results, many with equal scores."""
    rng = np.random.default_rng(seed)
    annotations, found = [], []
    for image in range(1, count + 1):
        for _ in range(int(rng.integers(0, 6))):
            left, top = rng.uniform(0, 300, 2).round(1).tolist()
            width, height = rng.uniform(8, 200, 2).round(1).tolist()
            row = {"image_id": 7 * image, "category_id": int(rng.integers(1, 4)), "bbox": [left, top, width, height]}
            crowd, share = int(rng.random() < 0.1), float(rng.uniform(0.5, 1))
            area = round(width * height * share, 1)
            annotations.append(row | {"id": len(annotations) + 1, "iscrowd": crowd, "area": area})
            for _ in range(int(rng.integers(0, 4))):
                box = (np.array(row["bbox"]) + rng.normal(0, 6, 4)).round(1)
                score = float(rng.uniform(0, 1).__round__(1))
                found.append(row | {"bbox": [*box[:2], *np.abs(box[2:])], "score": score})
    categories = [{"id": id, "name": name} for id, name in enumerate(("cat", "dog", "hot dog", "kite"), 1)]
    images = [{"id": 7 * image, "width": 640, "height": 512} for image in range(1, count + 1)]
    return {"images": images, "categories": categories, "annotations": annotations}, found


def real(truth: str, found: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not (DATA / truth).exists():
        pytest.skip("no shared/data beside the repository")
    return json.loads((DATA / truth).read_text()), json.loads((DATA / found).read_text())


REAL = {
    "val2014": (
        ("cocoapi_results/instances_val2014_100.json", "cocoapi_results/instances_val2014_fakebbox100_results.json"),
        # val2014_fake_eval_res.txt
        [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564],
    ),
    "detector": (
        ("coco_permissive/instances_permissive.json", "coco_permissive/detections_FastestDet_permissive.json"),
        [0.1748, 0.3063, 0.1726, 0.0300, 0.1624, 0.3530, 0.1953, 0.2479, 0.2508, 0.0386, 0.2191, 0.4515],
    ),
}


@pytest.mark.parametrize("name", [*REAL, "random"])
def test_metrics_equal_pycocotools_on_json_files(name: str, tmp_path: Path) -> None:
    files, published = REAL.get(name, (None, None))
    truth, found = real(*files) if files else scenes(40)
    results, groups = metric_of(pairs(truth, found)).compute()
    expected = official(truth, found, [1, 10, 100], tmp_path)
    assert [results[name] for name in STANDARD] == pytest.approx(expected["stats"].tolist(), abs=1e-6)
    more = official(truth, found, [100, 300, 1000], tmp_path)
    assert [results[name] for name in MMDETECTION] == pytest.approx(more["stats"].tolist(), abs=1e-6)
    per_class = {name: metrics["ap"] for name, metrics in groups.items()}
    assert per_class == pytest.approx(expected["per class"], abs=1e-6)
    assert results["num_categories"] == len(per_class)
    assert results["num_boxes"] == sum(not row["iscrowd"] for row in truth["annotations"])
    assert set(results) >= set(CocoMetric.metric_names)
    if published:
        assert [results[name] for name in STANDARD] == pytest.approx(published, abs=6e-4)


def test_boxes_of_the_official_postprocessing(tmp_path: Path) -> None:
    """300 boxes per image, not clipped, category ids with gaps; a third of them, shifted, are the annotations."""
    truth, _ = real(*REAL["val2014"][0])
    golden = load_file(DATA / "golden_official" / "postprocess_coco80.safetensors")
    truth |= {"images": [], "annotations": []}
    found = []
    for image, (height, width) in enumerate(golden["orig_sizes_hw"].tolist()):
        truth["images"].append({"id": image, "height": height, "width": width})
        boxes, ids = golden["boxes_xyxy_abs"][image], golden["labels"][image].tolist()
        assert boxes.min() < 0, "some extend beyond the image"
        rows = [[left, top, right - left, bottom - top] for left, top, right, bottom in boxes.double().tolist()]
        for index, (row, id, score) in enumerate(zip(rows, ids, golden["scores"][image].tolist(), strict=True)):
            found.append({"image_id": image, "category_id": id, "bbox": [round(x, 3) for x in row], "score": score})
            corners = (boxes[index] + index % 9).minimum(torch.tensor([width, height] * 2)).clamp(min=0).tolist()
            left, top, right, bottom = corners
            if index % 3 == 0 and left < right and top < bottom:
                box = [round(x, 3) for x in (left, top, right - left, bottom - top)]
                row = {"id": len(truth["annotations"]) + 1, "image_id": image, "category_id": id, "iscrowd": 0}
                truth["annotations"].append(row | {"bbox": box, "area": box[2] * box[3]})
    metric = metric_of(pairs(truth, found))
    expected = official(truth, found, [1, 10, 100], tmp_path)["stats"].tolist()
    results = metric.compute().metrics
    assert 0.1 < results["ap"] < 0.9
    assert [results[name] for name in STANDARD] == pytest.approx(expected, abs=1e-6)
    rows = metric.detections({category["name"]: category["id"] for category in truth["categories"]})
    assert [row["category_id"] for row in rows] == golden["labels"].flatten().tolist(), "best first, image by image"
    assert [row["bbox"] for row in rows] == [pytest.approx(row["bbox"], abs=2e-3) for row in found]


def test_pycocotools_gets_the_same_metrics_from_our_results_file(tmp_path: Path) -> None:
    truth, found = scenes(30)
    metric = metric_of(pairs(truth, found))
    rows = metric.detections({"cat": 1, "dog": 2, "hot dog": 3, "kite": 4})
    assert len(rows) == len(found)
    assert rows[0].keys() == {"image_id", "category_id", "bbox", "score"}
    stats = official(truth, rows, [1, 10, 100], tmp_path)["stats"].tolist()
    results = metric.compute().metrics
    assert [results[name] for name in STANDARD] == pytest.approx(stats, abs=1e-6)
    with pytest.raises(ValueError, match="no category id for dog, hot dog; there are ids for cat"):
        metric.detections({"cat": 1})


def simple(name: str, true: list[list[float]], found: list[list[float]], **more: Any) -> tuple[Prediction, Target]:
    """A sample with boxes xyxy in pixels of an image of 100 x 100, all of one phrase, scores 0.9, 0.8, ..."""
    ids = torch.zeros(len(true)).long()
    boxes = torch.tensor(found).reshape(-1, 4)
    target = Target(name, (100, 100), ("cup",), from_pixels(torch.tensor(true).reshape(-1, 4), (100, 100)), ids, **more)
    scores = torch.linspace(0.9, 0.1, 9)[: len(found)]
    return Prediction(name, boxes, scores, torch.zeros(len(found)).long(), ("cup",)), target


def test_values_computed_by_hand() -> None:
    box, half = [10.0, 10.0, 60.0, 60.0], [10.0, 10.0, 60.0, 40.0]
    results = metric_of([simple("a", [box], [box]), simple("b", [box], [half]), simple("c", [], [])]).compute().flat()
    # IoU 1 and 0.6: both match at thresholds up to 0.6 (3 of 10); above, only the one with the higher score matches.
    assert results["ap50"] == pytest.approx(1)
    assert results["ap75"] == pytest.approx(51 / 101)
    assert results["ap"] == pytest.approx((3 + 7 * 51 / 101) / 10)
    assert results["ar@1"] == pytest.approx((3 + 7 / 2) / 10)
    assert results["cup/ap50"] == pytest.approx(1)
    assert (results["num_images"], results["num_boxes"], results["cup/num_boxes"]) == (3, 2, 2)
    assert results["ap_small"] == -1, "there is no small object"


def test_pycocotools_gets_one_category_and_its_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has Python objects for every box and every pair of image and category, which LVIS has six million of."""
    calls = []

    class Recorded(COCOeval):
        def __init__(self, truth: COCO, predicted: COCO, kind: str):
            super().__init__(truth, predicted, kind)
            calls.append(len({*truth.getImgIds(), *predicted.getImgIds()}))

        def evaluate(self) -> None:
            assert len(self.params.catIds) == 1
            super().evaluate()
            assert len(self.params.imgIds) == calls[-1]
            most = max(len(found) for found in self._dts.values()) if self._dts else 0
            assert [limit for limit in self.params.maxDets if limit >= most] == self.params.maxDets[-1:]

    monkeypatch.setattr("vg.metrics.average_precision.COCOeval", Recorded)
    truth, found = scenes(40)
    metric_of(pairs(truth, found)).compute()
    images = {
        id: {row["image_id"] for row in truth["annotations"] + found if row["category_id"] == id} for id in (1, 2, 3)
    }
    assert sorted(calls) == sorted(map(len, images.values()))


def test_predictions_in_a_crowd_region_are_ignored() -> None:
    box, crowd, wrong = [0.0, 0.0, 20.0, 20.0], [30.0, 30.0, 100.0, 100.0], [40.0, 40.0, 60.0, 60.0]
    flags = {"crowd": torch.tensor([False, True])}
    found = [wrong, wrong, box]
    assert metric_of([simple("a", [box, crowd], found, **flags)]).compute().metrics["ap"] == pytest.approx(1)
    assert metric_of([simple("a", [box], found)]).compute().metrics["ap"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("corner", [(10, 20), (101, 57), (7, 133), (223, 91)])
@pytest.mark.parametrize(("side", "ranges"), [(32, ("small", "medium")), (96, ("medium", "large"))])
def test_areas_of_boxes_are_exact(corner: tuple[int, int], side: int, ranges: tuple[str, str]) -> None:
    """As in pycocotools a box at the limit of two ranges is in both; float32 in 0..1 moves it to either side."""
    box, size = [float(x) for x in (*corner, corner[0] + side, corner[1] + side)], (375, 500)
    prediction, target = simple("a", [], [box])
    target = replace(target, size=size, boxes=from_pixels(torch.tensor([box]), size), phrase_ids=torch.zeros(1).long())
    results = metric_of([(prediction, target)]).compute().metrics
    assert [results[f"ap_{name}"] for name in ranges] == [pytest.approx(1)] * 2


def test_annotated_areas_are_preferred_to_box_areas() -> None:
    box = [0.0, 0.0, 40.0, 40.0]
    assert metric_of([simple("a", [box], [box])]).compute().metrics["ap_medium"] == pytest.approx(1)
    results = metric_of([simple("a", [box], [box], areas=torch.tensor([900.0]))]).compute().metrics
    assert (results["ap_small"], results["ap_medium"]) == (pytest.approx(1), -1)


def test_predicted_boxes_are_not_clipped() -> None:
    box = [0.0, 0.0, 40.0, 40.0]
    assert metric_of([simple("a", [box], [[-8.0, 0.0, 40.0, 40.0]])]).compute().metrics["ap"] == pytest.approx(
        7 / 10
    ), "40 / 48"


def test_order_batches_and_repeats_do_not_change_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    samples = pairs(*scenes(25))
    results = metric_of(samples).compute()
    assert metric_of([*samples[::-1], *samples[:9]], batch_size=3).compute() == results
    assert capsys.readouterr().out == ""


def test_images_can_have_different_phrases() -> None:
    samples = pairs(*scenes(25))
    own = []
    for prediction, target in samples:
        named = sorted(set(target.phrase_ids.tolist()))
        phrases, new_id = tuple(target.phrases[id] for id in named), {id: index for index, id in enumerate(named)}
        kept = [row for row, id in enumerate(prediction.phrase_ids.tolist()) if id in new_id]
        ids = torch.tensor([new_id[id] for id in prediction.phrase_ids[kept].tolist()]).long()
        true_ids = torch.tensor([new_id[id] for id in target.phrase_ids.tolist()]).long()
        own.append(
            (
                Prediction(prediction.id, prediction.boxes[kept], prediction.scores[kept], ids, phrases),
                Target(target.id, target.size, phrases, target.boxes, true_ids, "", target.crowd, target.areas),
            )
        )
    assert metric_of(own).compute() == metric_of(samples).compute(), "every box is of a phrase of its image"


def test_no_predictions_and_no_ground_truth() -> None:
    box = [0.0, 0.0, 40.0, 40.0]
    assert metric_of([simple("a", [box], [])]).compute().metrics["ap"] == 0
    results = metric_of([simple("a", [], [box])]).compute().metrics
    assert (results["ap"], results["ar@100"], results["num_boxes"], results["num_categories"]) == (-1, -1, 0, 0)


def test_reset_removes_all_samples() -> None:
    metric = metric_of(pairs(*scenes(5)))
    metric.reset()
    samples = pairs(*scenes(6, seed=3))
    metric.update(*zip(*samples, strict=True))
    assert metric.compute() == metric_of(samples).compute()


def test_errors_name_the_bad_input() -> None:
    metric, (prediction, target) = CocoMetric(), simple("a", [], [])
    with pytest.raises(ValueError, match="same samples"):
        metric.update([prediction], [])
    with pytest.raises(ValueError, match=r"'a' has phrases more than once \(cup\)"):
        metric.update([prediction], [Target("a", (9, 9), ("cup", "cup"), target.boxes, target.phrase_ids)])
    metric.update([], [])
    with pytest.raises(ValueError, match="got no sample"):
        metric.compute()
    with pytest.raises(ValueError, match="make the ids unique"):
        metric_of([simple("a", [[0.0, 0.0, 40.0, 40.0]], []), simple("a", [[50.0, 50.0, 80.0, 80.0]], [])]).compute()


def evaluate_in_process(rank: int, shares: list[list[Samples]], folder: str) -> None:
    """Rank `rank` of two: evaluates its share of each division, one image per update."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results = []
    for division in shares:
        metric = metric_of(division[rank], batch_size=1)
        rows = metric.detections({"cat": 1, "dog": 2, "hot dog": 3, "kite": 4})
        results.append([metric.compute().flat(), rows])
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    samples = pairs(*scenes(11))
    shares = [[samples[0::2], samples[1::2] + samples[:1]], [samples, []], [[], samples]]
    torch.multiprocessing.spawn(evaluate_in_process, args=(shares, str(tmp_path)), nprocs=2)
    alone = metric_of(samples)
    expected = [alone.compute().flat(), alone.detections({"cat": 1, "dog": 2, "hot dog": 3, "kite": 4})]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [expected] * 3
