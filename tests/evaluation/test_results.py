"""Flat results, as metrics.json, validation.json, history.jsonl and trackers store them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from vg.boxes import from_pixels
from vg.data.source import Provenance
from vg.errors import ConfigError
from vg.evaluation.results import DatasetResult, EvaluationResult
from vg.metrics import CocoMetric, RecMetric
from vg.metrics.result import MetricResult, flat_key, split_flat_key
from vg.types import Prediction, Target

SIZE = (100, 100)
BOX = [10.0, 10.0, 60.0, 60.0]
HALF = [10.0, 10.0, 60.0, 35.0]  # IoU 0.5 with BOX
REC_METRICS = ("miou", "acc@0.5", "acc@0.75", "acc@0.9", "recall@1", "recall@5", "recall@10", "map@50", "map@75")
ABSENCE_METRICS = ("n_acc", "t_acc", "auc", "roc@0.01", "roc@0.05", "roc@0.1", "roc@0.2", "roc@0.5")
COCO_METRICS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar@1", "ar@10", "ar@100", "ar_small", "ar_medium", "ar_large"),
    *("ap50@1000", "ap75@1000", "ap_small@1000", "ap_medium@1000", "ap_large@1000"),
    *("ar@300", "ar@1000", "ar_small@1000", "ar_medium@1000", "ar_large@1000"),
)


def pair(
    name: str, phrases: tuple[str, ...], true: list[list[float]], predicted: list[list[float]], type: str = ""
) -> tuple[Prediction, Target]:
    """A sample with one box per phrase; predicted scores are 0.8."""
    boxes = from_pixels(torch.tensor(true).reshape(-1, 4), SIZE)
    scores, ids = torch.full((len(predicted),), 0.8), torch.arange(len(predicted))
    prediction = Prediction(name, torch.tensor(predicted).reshape(-1, 4), scores, ids, phrases)
    return prediction, Target(name, SIZE, phrases, boxes, torch.arange(len(true)), type)


def rec_result() -> MetricResult:
    metric = RecMetric()
    samples = [
        pair("a", ("cup",), [BOX], [BOX], "relation"),
        pair("b", ("cup",), [BOX], [HALF], "attribute"),
        pair("c", ("cup",), [], [], "absent"),
        pair("d", ("cup",), [BOX], [BOX]),
    ]
    predictions, targets = zip(*samples, strict=True)
    metric.update(predictions, targets)
    return metric.compute()


def coco_result() -> MetricResult:
    metric = CocoMetric()
    prediction, target = pair("a", ("cup", "and/or", "plate"), [BOX, BOX], [BOX, HALF])
    metric.update([prediction], [target])
    return metric.compute()


def test_flat_result_of_the_rec_metric() -> None:
    result = rec_result()
    assert isinstance(result, MetricResult), "torchmetrics keeps the type"
    assert list(result.groups) == ["absent", "attribute", "relation"]
    everything = [*REC_METRICS, "num_expressions", *ABSENCE_METRICS, "num_absent"]
    of_present = [*REC_METRICS, "num_expressions"]
    assert list(result.flat()) == [
        *everything,
        *("absent/n_acc", "absent/num_absent"),
        *(f"attribute/{name}" for name in of_present),
        *(f"relation/{name}" for name in of_present),
    ]
    flat = result.flat()
    assert (flat["miou"], flat["attribute/miou"]) == (pytest.approx(2.5 / 3), pytest.approx(0.5))
    assert (flat["num_expressions"], flat["num_absent"], flat["absent/num_absent"]) == (3, 1, 1)
    assert {type(flat[name]) for name in ("num_expressions", "num_absent")} == {int}


def test_flat_result_of_the_coco_metric() -> None:
    result = coco_result()
    assert isinstance(result, MetricResult)
    assert set(result.groups) == {"cup", "and/or"}, "plate has no box"
    per_class = [f"{name}/{key}" for name in result.groups for key in ("ap", "ap50", "ap75", "num_boxes")]
    assert list(result.flat()) == [*COCO_METRICS, "num_images", "num_boxes", "num_categories", *per_class]
    flat = result.flat()
    assert (flat["ap"], flat["cup/ap"], flat["and/or/ap"]) == (
        pytest.approx(0.55),
        pytest.approx(1),
        pytest.approx(0.1),
    )
    assert (flat["ap_small"], flat["num_categories"], flat["cup/num_boxes"]) == (-1, 2, 1)


def two_datasets() -> EvaluationResult:
    provenance = Provenance("refcoco", "val", partition="unc", official=True)
    words = DatasetResult("words", provenance, "best box", {"miou": 0.5, "num": 4}, {"relation": {"miou": 0.25}}, 2)
    objects = DatasetResult(
        "objects", Provenance("coco", "test", "detection"), "AP", {"ap": 0.75}, {"a/b": {"ap": 1.0}}, prefix="objects"
    )
    return EvaluationResult((words, objects), "objects/ap")


def test_flat_result_of_two_datasets() -> None:
    assert json.dumps(two_datasets().flat()) == json.dumps(
        {
            "miou": 0.5,
            "num": 4,
            "relation/miou": 0.25,
            "data": "refcoco",
            "split": "val",
            "protocol": "best box",
            "partition": "unc",
            "official": "yes",
            "set": "words",
            "num_skipped": 2,
            "objects/ap": 0.75,
            "objects/a/b/ap": 1.0,
            "objects/data": "coco",
            "objects/split": "test",
            "objects/protocol": "AP",
            "objects/set": "objects",
        }
    )
    assert list(two_datasets().flat_metrics().items()) == [
        ("miou", 0.5),
        ("num", 4),
        ("relation/miou", 0.25),
        ("num_skipped", 2),
        ("objects/ap", 0.75),
        ("objects/a/b/ap", 1.0),
    ]


def test_flat_result_of_one_dataset_without_a_name() -> None:
    dataset = DatasetResult("", Provenance("coco", "val", official=False), "AP", {"ap": 0.75}, {})
    flat = EvaluationResult((dataset,), "ap").flat()
    assert flat == {"ap": 0.75, "data": "coco", "split": "val", "protocol": "AP", "official": "no"}


def test_best_metric_selects_the_score() -> None:
    result = two_datasets()
    assert result.score == 0.75
    assert replace(result, best_metric="relation/miou").score == 0.25
    with pytest.raises(ConfigError, match=r"train\.best_metric: 'words/miou' is not one of miou, .*objects/ap"):
        _ = replace(result, best_metric="words/miou").score


def test_an_undefined_metric_is_not_a_score() -> None:
    """-1 would beat no score once, and nothing would ever be better."""
    dataset = DatasetResult("", Provenance("coco", "val"), "AP", {"ap": 0.75, "ap_large": -1.0}, {})
    assert EvaluationResult((dataset,), "ap").score == 0.75
    with pytest.raises(ConfigError, match=r"train\.best_metric: 'ap_large' is undefined.*no ground-truth box"):
        _ = EvaluationResult((dataset,), "ap_large").score


def test_a_dataset_with_the_name_of_a_group_is_an_error_if_keys_collide() -> None:
    words, objects = two_datasets().datasets
    relation = replace(objects, name="relation", prefix="relation")
    EvaluationResult((words, relation), "miou")  # no common key
    with pytest.raises(ConfigError, match=r"data\.eval\.relation: words has a group of that name"):
        EvaluationResult((words, replace(relation, metrics={"miou": 0.1})), "miou")


def test_flat_keys() -> None:
    assert flat_key("", "miou") == "miou"
    assert flat_key("words", "relation", "miou") == "words/relation/miou"
    assert split_flat_key("miou") == ("", "miou")
    assert split_flat_key("words/a/b/miou") == ("words/a/b", "miou")
