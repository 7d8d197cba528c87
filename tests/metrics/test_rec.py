"""The numbers of REC: against figures worked out by hand, against pycocotools, and across processes."""

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
from vg.types import Prediction, Target

SIZE = (480, 640)


def expression(
    name: str, true_box: list[float], boxes: list[list[float]], scores: list[float], kind: str = ""
) -> tuple[Prediction, Target]:
    """All boxes are xyxy pixels of a picture of SIZE."""
    target = Target(name, SIZE, ("thing",), from_pixels(torch.tensor([true_box]), SIZE), torch.zeros(1).long(), kind)
    predicted = torch.tensor(boxes).reshape(-1, 4)
    prediction = Prediction(name, predicted, torch.tensor(scores), torch.zeros(len(boxes)).long(), ("thing",))
    return prediction, target


def random_expressions(count: int, most_boxes: int = 10) -> list[tuple[Prediction, Target]]:
    generator = torch.Generator().manual_seed(count)
    answers = []
    for row in range(count):
        corner = torch.rand(2, generator=generator) * 200
        true_box = torch.cat((corner, corner + 50 + torch.rand(2, generator=generator) * 150))  # [4]
        boxes_in_all = int(torch.randint(0, most_boxes + 1, (), generator=generator))
        boxes = true_box + torch.randn(boxes_in_all, 4, generator=generator) * 6  # [K, 4]
        scores = torch.rand(boxes_in_all, generator=generator).sort(descending=True).values  # [K]
        kind = ("", "color", "relation")[row % 3]
        answers.append(expression(f"picture/{row}", true_box.tolist(), boxes.tolist(), scores.tolist(), kind))
    return answers


def judge(answers: list[tuple[Prediction, Target]], batch_size: int = 7) -> dict[str, float]:
    metric = RecMetric()
    for start in range(0, len(answers), batch_size):
        predictions, targets = zip(*answers[start : start + batch_size], strict=True)
        metric.update(predictions, targets)
    return metric.compute()


def test_figures_worked_out_by_hand() -> None:
    results = judge(
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
    # at IoU 0.5 the boxes are, best score first: hit, hit, wrong, wrong; two of four objects are found,
    # so the precision is 1 at the 51 of 101 recalls up to 0.5 and 0 above
    assert results["map@50"] == pytest.approx(51 / 101)
    # at IoU 0.75: hit, wrong, hit, wrong; precision 1 up to recall 0.25 (26 of 101), then 2/3 up to 0.5 (25 of 101)
    assert results["map@75"] == pytest.approx((26 + 25 * 2 / 3) / 101)
    assert set(results) == {
        f"{prefix}{name}" for prefix in ("", "easy/", "hard/") for name in (*RecMetric.numbers[:9], "num_expressions")
    }


def test_recall_looks_at_so_many_best_boxes() -> None:
    box, wrong = [0, 0, 100, 100], [200, 200, 300, 300]
    scores = [1 - place / 20 for place in range(11)]
    answers = [
        expression(f"{place}", box, [*[wrong] * place, box, *[wrong] * (10 - place)], scores)
        for place in (0, 1, 4, 5, 10)
    ]
    results = judge([*answers, expression("none", box, [], [])])
    assert results["recall@1"] == results["acc@0.5"] == pytest.approx(1 / 6)
    assert (results["recall@5"], results["recall@10"]) == (pytest.approx(3 / 6), pytest.approx(4 / 6))
    half = expression("half", box, [wrong, [0, 0, 100, 50]], [0.9, 0.8])
    assert judge([half])["recall@5"] == 1, "an IoU of exactly 0.5 counts"


def test_average_precision_is_that_of_pycocotools_on_json_files(tmp_path: Path) -> None:
    answers = random_expressions(100)
    annotations, found = [], []
    for number, (prediction, target) in enumerate(answers, start=1):
        left, top, right, bottom = to_pixels(target.boxes, target.size)[0].tolist()
        box = [left, top, right - left, bottom - top]
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        )
        for (left, top, right, bottom), score in zip(
            prediction.boxes.tolist(), prediction.scores.tolist(), strict=True
        ):
            box = [left, top, right - left, bottom - top]
            found.append({"image_id": number, "category_id": 1, "bbox": box, "score": score})
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

    results = judge(answers)
    assert 0.3 < results["map@75"] < results["map@50"] < 1
    assert results["map@50"] == pytest.approx(evaluation.stats[1], abs=1e-9)
    assert results["map@75"] == pytest.approx(evaluation.stats[2], abs=1e-9)


def test_mean_iou_and_accuracy_are_those_of_a_plain_loop() -> None:
    answers = random_expressions(60)
    top = [
        float(iou(prediction.boxes[0], to_pixels(target.boxes, SIZE)[0])) if len(prediction.boxes) else 0.0
        for prediction, target in answers
    ]
    results = judge(answers)
    assert results["miou"] == pytest.approx(sum(top) / 60)
    assert results["acc@0.75"] == pytest.approx(sum(value >= 0.75 for value in top) / 60)
    assert results["relation/acc@0.75"] == pytest.approx(sum(value >= 0.75 for value in top[2::3]) / 20)


def test_order_batches_and_repeats_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    answers = random_expressions(50)
    results = judge(answers)
    assert judge([*answers[::-1], *answers[:9]], batch_size=3) == results
    assert capsys.readouterr().out == ""


def test_equal_scores_do_not_make_the_result_depend_on_the_order() -> None:
    answers = [
        expression(f"{row}", [0, 0, 100, 100], [[0, 0, 100, 100 if row % 3 else 40]], [1.0]) for row in range(40)
    ]
    assert judge(answers) == judge(answers[::-1])


def test_nothing_predicted_at_all_is_a_result() -> None:
    results = judge([expression("a", [0, 0, 9, 9], [], []), expression("b", [0, 0, 9, 9], [], [])])
    assert results.pop("num_expressions") == 2
    assert set(results.values()) == {0.0}


def test_reset_forgets() -> None:
    metric = RecMetric()
    first, second = random_expressions(2)
    metric.update([first[0]], [first[1]])
    metric.compute()
    metric.reset()
    metric.update([second[0]], [second[1]])
    assert metric.compute()["num_expressions"] == 1
    assert len(metric(*zip(first, strict=True))) > 0, "forward, as torchmetrics has it: this batch only"
    assert metric.compute()["num_expressions"] == 2


def test_bad_input_is_named() -> None:
    metric = RecMetric()
    (prediction, target), (_, other) = random_expressions(2)
    with pytest.raises(ValueError, match="same samples"):
        metric.update([prediction], [other])
    with pytest.raises(ValueError, match="same samples"):
        metric.update([prediction], [])
    boxes = target.boxes.repeat(2, 1)
    with pytest.raises(ValueError, match=r"'picture/0' has 2 true boxes"):
        metric.update([prediction], [Target(target.id, SIZE, target.phrases, boxes, torch.zeros(2).long())])
    with pytest.raises(ValueError, match="at most 64"):
        metric.update(
            [prediction], [Target(target.id, SIZE, target.phrases, target.boxes, target.phrase_ids, "é" * 33)]
        )
    metric.update([], [])
    with pytest.raises(ValueError, match="saw no expression"):
        metric.compute()


def test_different_samples_with_one_id_are_named() -> None:
    with pytest.raises(ValueError, match="ids of the data unique"):
        judge([expression("same", [0, 0, 50, 50], [], []), expression("same", [90, 90, 99, 99], [], [])])


def test_kinds_of_any_script_survive() -> None:
    results = judge([expression("a", [0, 0, 9, 9], [[0, 0, 9, 9]], [1.0], "左 / größe")])
    assert results["左 / größe/acc@0.9"] == 1


def test_a_whole_benchmark_takes_seconds() -> None:
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
    assert metric.compute()["num_expressions"] == 11_000
    assert time.monotonic() - start < 60


def nothing_named(name: str, scores: list[float], kind: str = "") -> tuple[Prediction, Target]:
    """An expression that names nothing in its picture."""
    prediction, target = expression(name, [0, 0, 9, 9], [[0, 0, 9, 9]] * len(scores), scores, kind)
    return prediction, Target(name, SIZE, target.phrases, torch.zeros(0, 4), torch.zeros(0).long(), kind)


def test_expressions_that_name_nothing_are_told_by_their_score() -> None:
    answers = random_expressions(20)
    absent = [nothing_named(f"absent/{row}", [], "absent") for row in range(3)]
    results = judge([*answers, *absent, nothing_named("absent/3", [0.8, 0.1])])
    without = judge(answers)
    assert {name: results[name] for name in without} == without, "these are about expressions that name something"
    assert (results["num_expressions"], results["num_absent"]) == (20, 4)
    assert (results["n_acc"], results["absent/n_acc"], results["absent/num_absent"]) == (0.75, 1, 3)
    assert not {"absent/miou", "absent/auc", "color/auc"} & results.keys()
    top = [float(prediction.scores[0]) if len(prediction.boxes) else 0.0 for prediction, _ in answers]
    assert results["t_acc"] == sum(score >= 0.5 for score in top) / 20
    wins = [(score > other) + (score == other) / 2 for score in top for other in (0, 0, 0, 0.8)]
    assert results["auc"] == pytest.approx(sum(wins) / 80)
    assert judge([*absent, *answers[::-1], *absent, nothing_named("absent/3", [0.8, 0.1])], batch_size=2) == results
    assert judge(absent).keys() == {"n_acc", "num_absent", "absent/n_acc", "absent/num_absent"}


def judge_in_process(rank: int, shares: list[list[list[tuple[Prediction, Target]]]], folder: str) -> None:
    """Rank `rank` of two: judges its share of each division, one expression per update."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results = []
    for division in shares:
        metric = RecMetric()
        for prediction, target in division[rank]:
            metric.update([prediction], [target])
        results.append(metric.compute())
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    answers = random_expressions(11)
    absent = [nothing_named(f"{row}", [row / 4]) for row in range(4)]
    unanswered = [expression("a", [0, 0, 9, 9], [], []), expression("b", [0, 0, 9, 9], [], [])]
    shares = [
        [answers[0::2], answers[1::2] + answers[:1]],  # as a distributed sampler deals, the last batch padded
        [answers[:9], answers[9:]],
        [answers, []],
        [[], answers],
        [[], unanswered],
        [absent, answers],
    ]
    torch.multiprocessing.spawn(judge_in_process, args=(shares, str(tmp_path)), nprocs=2)
    expected = [judge(answers)] * 4 + [judge(unanswered), judge(absent + answers)]
    assert json.loads((tmp_path / "0.json").read_text()) == expected
    assert json.loads((tmp_path / "1.json").read_text()) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_state_lives_on_the_device_of_the_metric() -> None:
    answers = random_expressions(5)
    metric = RecMetric().to("cuda")
    metric.reset()
    metric.update([prediction.to("cuda") for prediction, _ in answers], [target.to("cuda") for _, target in answers])
    assert {tensor.device.type for tensor in metric.boxes + metric.ids} == {"cuda"}
    assert metric.compute() == pytest.approx(judge(answers))
