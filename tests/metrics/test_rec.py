"""Metric of REC: values computed by hand, pycocotools as reference, and several processes."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vg.boxes import from_pixels, iou, to_pixels
from vg.metrics import RecMetric
from vg.metrics.result import MetricResult
from vg.types import Prediction, Target

SIZE = (480, 640)


def expression(
    name: str, true_box: list[float], boxes: list[list[float]], scores: list[float], type: str = ""
) -> tuple[Prediction, Target]:
    """A sample; all boxes are xyxy pixels of an image of SIZE."""
    target = Target(name, SIZE, ("thing",), from_pixels(torch.tensor([true_box]), SIZE), torch.zeros(1).long(), type)
    predicted = torch.tensor(boxes).reshape(-1, 4)
    prediction = Prediction(name, predicted, torch.tensor(scores), torch.zeros(len(boxes)).long(), ("thing",))
    return prediction, target


def random_expressions(count: int, most_boxes: int = 10) -> list[tuple[Prediction, Target]]:
    generator = torch.Generator().manual_seed(count)
    samples = []
    for row in range(count):
        corner = torch.rand(2, generator=generator) * 200
        true_box = torch.cat((corner, corner + 50 + torch.rand(2, generator=generator) * 150))  # [4]
        num_boxes = int(torch.randint(0, most_boxes + 1, (), generator=generator))
        boxes = true_box + torch.randn(num_boxes, 4, generator=generator) * 6  # [K, 4]
        scores = torch.rand(num_boxes, generator=generator).sort(descending=True).values  # [K]
        type = ("", "color", "relation")[row % 3]
        samples.append(expression(f"image/{row}", true_box.tolist(), boxes.tolist(), scores.tolist(), type))
    return samples


def evaluate(samples: list[tuple[Prediction, Target]], batch_size: int = 7) -> dict[str, float]:
    metric = RecMetric()
    for start in range(0, len(samples), batch_size):
        predictions, targets = zip(*samples[start : start + batch_size], strict=True)
        metric.update(predictions, targets)
    return metric.compute().flat()


def test_values_computed_by_hand() -> None:
    results = evaluate(
        [
            expression("exact", [10, 10, 110, 110], [[10, 10, 110, 110]], [0.9], "easy"),
            expression("half", [0, 0, 100, 100], [[0, 0, 100, 50], [0, 0, 100, 100]], [0.8, 0.7], "hard"),
            expression("none", [0, 0, 100, 100], [], [], "hard"),
            expression("elsewhere", [0, 0, 100, 100], [[200, 200, 300, 300]], [0.6]),
        ]
    )
    assert results["miou"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert results["acc@0.5"] == 0.5, "an IoU of exactly 0.5 counts"
    assert results["acc@0.75"] == results["acc@0.9"] == 0.25
    assert results["recall@1"] == results["recall@5"] == results["recall@10"] == 0.5
    assert results["num_expressions"] == 4
    assert results["easy/acc@0.9"] == 1
    assert results["easy/map@75"] == pytest.approx(1)
    assert (results["hard/miou"], results["hard/acc@0.5"], results["hard/num_expressions"]) == (0.25, 0.5, 2)
    # At IoU 0.5 the boxes are, best score first: hit, hit, miss, miss. Two of four objects are matched,
    # so the precision is 1 at the 51 of 101 recall levels up to 0.5 and 0 above.
    assert results["map@50"] == pytest.approx(51 / 101)
    # At IoU 0.75: hit, miss, hit, miss. Precision 1 up to recall 0.25 (26 of 101), then 2/3 up to 0.5 (25 of 101).
    assert results["map@75"] == pytest.approx((26 + 25 * 2 / 3) / 101)
    assert set(results) == {
        f"{prefix}{name}"
        for prefix in ("", "easy/", "hard/")
        for name in (*RecMetric.metric_names[:9], "num_expressions")
    }


def test_recall_counts_the_given_number_of_best_boxes() -> None:
    box, wrong = [0, 0, 100, 100], [200, 200, 300, 300]
    scores = [1 - rank / 20 for rank in range(11)]
    samples = [
        expression(f"{rank}", box, [*[wrong] * rank, box, *[wrong] * (10 - rank)], scores) for rank in (0, 1, 4, 5, 10)
    ]
    results = evaluate([*samples, expression("none", box, [], [])])
    assert results["recall@1"] == results["acc@0.5"] == pytest.approx(1 / 6)
    assert (results["recall@5"], results["recall@10"]) == (pytest.approx(3 / 6), pytest.approx(4 / 6))
    half = expression("half", box, [wrong, [0, 0, 100, 50]], [0.9, 0.8])
    assert evaluate([half])["recall@5"] == 1, "an IoU of exactly 0.5 counts"


@pytest.mark.parametrize(("threshold", "sides"), [(0.5, (1, 2)), (0.75, (3, 4)), (0.9, (9, 10))])
def test_an_iou_equal_to_the_threshold_counts_at_any_position(threshold: float, sides: tuple[int, int]) -> None:
    """Boxes become 0..1 in float32 and pixels again, which alone would turn a third of these into misses."""
    samples = []
    for offset in range(7, 207):
        for unit in (7, 10.25):  # annotations have up to two decimals
            left, top = offset + 0.37, offset / 4
            true_box = [left, top, left + unit * sides[1], top + 31]
            box = torch.tensor([[left, top, left + unit * sides[0], top + 31]])
            predicted = to_pixels(from_pixels(box, SIZE), SIZE)
            samples.append(expression(f"{offset} {unit}", true_box, predicted.tolist(), [0.9]))
    results = evaluate(samples)
    assert results[f"acc@{threshold}"] == 1
    assert results["miou"] == pytest.approx(threshold)
    if threshold == 0.5:
        assert results["recall@1"] == results["recall@10"] == 1


@pytest.mark.parametrize("inverted", [[110, 10, 10, 110], [10, 110, 110, 10], [110, 110, 10, 10]])
def test_an_inverted_box_is_a_false_one_and_not_an_absent_one(inverted: list[float]) -> None:
    box = [10, 10, 110, 110]
    results = evaluate(
        [expression("inverted", box, [inverted, box], [0.9, 0.5]), expression("right", box, [box], [0.8])]
    )
    assert results["acc@0.5"] == 0.5
    # Best score first: miss, hit, hit. The highest precision at any recall is 2 / 3.
    assert results["map@50"] == pytest.approx(2 / 3)


def test_average_precision_equals_pycocotools_on_json_files(tmp_path: Path) -> None:
    samples = random_expressions(100)
    annotations, found = [], []
    for id, (prediction, target) in enumerate(samples, start=1):
        left, top, right, bottom = to_pixels(target.boxes, target.size)[0].tolist()
        box = [left, top, right - left, bottom - top]
        annotations.append(
            {"id": id, "image_id": id, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        )
        for (left, top, right, bottom), score in zip(
            prediction.boxes.tolist(), prediction.scores.tolist(), strict=True
        ):
            box = [left, top, right - left, bottom - top]
            found.append({"image_id": id, "category_id": 1, "bbox": box, "score": score})
    images = [{"id": annotation["id"]} for annotation in annotations]
    truth = {"images": images, "categories": [{"id": 1, "name": "thing"}], "annotations": annotations}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "truth.json")
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    results = evaluate(samples)
    assert 0.3 < results["map@75"] < results["map@50"] < 1
    assert results["map@50"] == pytest.approx(evaluation.stats[1], abs=1e-9)
    assert results["map@75"] == pytest.approx(evaluation.stats[2], abs=1e-9)


def test_mean_iou_and_accuracy_equal_a_plain_loop() -> None:
    samples = random_expressions(60)
    top = [
        float(iou(prediction.boxes[0], to_pixels(target.boxes, SIZE)[0])) if len(prediction.boxes) else 0.0
        for prediction, target in samples
    ]
    results = evaluate(samples)
    assert results["miou"] == pytest.approx(sum(top) / 60)
    assert results["acc@0.75"] == pytest.approx(sum(value >= 0.75 for value in top) / 60)
    assert results["relation/acc@0.75"] == pytest.approx(sum(value >= 0.75 for value in top[2::3]) / 20)


def test_order_batches_and_repeats_do_not_change_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    samples = random_expressions(50)
    results = evaluate(samples)
    assert evaluate([*samples[::-1], *samples[:9]], batch_size=3) == results
    assert capsys.readouterr().out == ""


def test_order_does_not_matter_with_equal_scores() -> None:
    samples = [
        expression(f"{row}", [0, 0, 100, 100], [[0, 0, 100, 100 if row % 3 else 40]], [1.0]) for row in range(40)
    ]
    assert evaluate(samples) == evaluate(samples[::-1])


def test_no_predicted_boxes() -> None:
    results = evaluate([expression("a", [0, 0, 9, 9], [], []), expression("b", [0, 0, 9, 9], [], [])])
    assert results.pop("num_expressions") == 2
    assert set(results.values()) == {0.0}


def test_reset_removes_all_samples() -> None:
    metric = RecMetric()
    first, second = random_expressions(2)
    metric.update([first[0]], [first[1]])
    metric.compute()
    metric.reset()
    metric.update([second[0]], [second[1]])
    assert metric.compute().metrics["num_expressions"] == 1
    assert metric(*zip(first, strict=True)).metrics["num_expressions"] == 1, (
        "forward of torchmetrics returns the result of this batch"
    )
    assert metric.compute().metrics["num_expressions"] == 2


def test_errors_name_the_bad_input() -> None:
    metric = RecMetric()
    (prediction, target), (_, other) = random_expressions(2)
    with pytest.raises(ValueError, match="same samples"):
        metric.update([prediction], [other])
    with pytest.raises(ValueError, match="same samples"):
        metric.update([prediction], [])
    boxes = target.boxes.repeat(2, 1)
    with pytest.raises(ValueError, match=r"'image/0' has 2 ground-truth boxes"):
        metric.update([prediction], [Target(target.id, SIZE, target.phrases, boxes, torch.zeros(2).long())])
    with pytest.raises(ValueError, match="at most 64"):
        metric.update(
            [prediction], [Target(target.id, SIZE, target.phrases, target.boxes, target.phrase_ids, "é" * 33)]
        )
    metric.update([], [])
    with pytest.raises(ValueError, match="got no sample"):
        metric.compute()


def test_different_samples_with_one_id_are_an_error() -> None:
    with pytest.raises(ValueError, match="make the ids unique"):
        evaluate([expression("same", [0, 0, 50, 50], [], []), expression("same", [90, 90, 99, 99], [], [])])


def test_expression_types_in_any_script() -> None:
    results = evaluate([expression("a", [0, 0, 9, 9], [[0, 0, 9, 9]], [1.0], "左 / größe")])
    assert results["左 / größe/acc@0.9"] == 1


def test_speed_on_a_whole_benchmark() -> None:
    boxes = torch.rand(11_000, 10, 4) * 100 + torch.tensor([0, 0, 100, 100])
    true_boxes, scores, ids = from_pixels(boxes[:, :1], SIZE), torch.linspace(1, 0, 10), torch.zeros(10).long()
    metric = RecMetric()
    start = time.monotonic()
    for first in range(0, 11_000, 50):
        rows = range(first, first + 50)
        metric.update(
            [Prediction(f"{row}", boxes[row], scores, ids, ("thing",)) for row in rows],
            [Target(f"{row}", SIZE, ("thing",), true_boxes[row], ids[:1], f"{row % 3}") for row in rows],
        )
    assert metric.compute().metrics["num_expressions"] == 11_000
    assert time.monotonic() - start < 60


def absent_expression(name: str, scores: list[float], type: str = "") -> tuple[Prediction, Target]:
    """An expression without an object in its image."""
    prediction, target = expression(name, [0, 0, 9, 9], [[0, 0, 9, 9]] * len(scores), scores, type)
    return prediction, Target(name, SIZE, target.phrases, torch.zeros(0, 4), torch.zeros(0).long(), type)


def test_absent_expressions() -> None:
    samples = random_expressions(20)
    absent = [absent_expression(f"absent/{row}", [], "absent") for row in range(3)]
    results = evaluate([*samples, *absent, absent_expression("absent/3", [0.8, 0.1])])
    without = evaluate(samples)
    assert {name: results[name] for name in without} == without, "these metrics ignore absent expressions"
    assert (results["num_expressions"], results["num_absent"]) == (20, 4)
    assert (results["n_acc"], results["absent/n_acc"], results["absent/num_absent"]) == (0.75, 1, 3)
    assert not {"absent/miou", "absent/auc", "color/auc"} & results.keys()
    top = [float(prediction.scores[0]) if len(prediction.boxes) else 0.0 for prediction, _ in samples]
    assert results["t_acc"] == sum(score >= 0.5 for score in top) / 20
    wins = [(score > other) + (score == other) / 2 for score in top for other in (0, 0, 0, 0.8)]
    assert results["auc"] == pytest.approx(sum(wins) / 80)
    assert (
        evaluate([*absent, *samples[::-1], *absent, absent_expression("absent/3", [0.8, 0.1])], batch_size=2) == results
    )
    assert evaluate(absent).keys() == {"n_acc", "num_absent", "absent/n_acc", "absent/num_absent"}


class MeanOfSamples(RecMetric):
    """Calls `per_sample` in `compute`, where the rows of all processes are collected already."""

    def compute(self) -> MetricResult:
        result = super().compute()
        _, values = self.per_sample()
        assert float(torch.tensor(values["miou"]).nanmean()) == pytest.approx(result.metrics["miou"])
        return result


def evaluate_in_process(rank: int, shares: list[list[list[tuple[Prediction, Target]]]], folder: str) -> None:
    """Rank `rank` of two: evaluates its share of each division, one expression per update."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results = []
    for division in shares:
        metric = MeanOfSamples()
        for prediction, target in division[rank]:
            metric.update([prediction], [target])
        results.append(metric.compute().flat())
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    samples = random_expressions(11)
    absent = [absent_expression(f"{row}", [row / 4]) for row in range(4)]
    without_boxes = [expression("a", [0, 0, 9, 9], [], []), expression("b", [0, 0, 9, 9], [], [])]
    shares = [
        [samples[0::2], samples[1::2] + samples[:1]],  # like a distributed sampler, with a padded last batch
        [samples[:9], samples[9:]],
        [samples, []],
        [[], samples],
        [[], without_boxes],
        [absent, samples],
    ]
    torch.multiprocessing.spawn(evaluate_in_process, args=(shares, str(tmp_path)), nprocs=2)
    expected = [evaluate(samples)] * 4 + [evaluate(without_boxes), evaluate(absent + samples)]
    assert json.loads((tmp_path / "0.json").read_text()) == expected
    assert json.loads((tmp_path / "1.json").read_text()) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_state_is_on_the_device_of_the_metric() -> None:
    samples = random_expressions(5)
    metric = RecMetric().to("cuda")
    metric.reset()
    metric.update([prediction.to("cuda") for prediction, _ in samples], [target.to("cuda") for _, target in samples])
    assert {tensor.device.type for tensor in metric.boxes + metric.ids} == {"cuda"}
    assert metric.compute().flat() == pytest.approx(evaluate(samples))
