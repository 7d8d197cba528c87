"""Metric of generalized REC: values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vg.boxes import from_pixels
from vg.metrics import GrecMetric, RecMetric
from vg.metrics.collected import stable_hash
from vg.types import Prediction, Target

SIZE = (480, 640)
ONE, TWO, FAR = [10.0, 10.0, 110.0, 110.0], [200.0, 10.0, 300.0, 110.0], [400.0, 300.0, 500.0, 400.0]
EDGE = [7.37, 3.25, 21.37, 34.25]
SHIFTED = [10.0, 10.0, 110.0, 70.0]  # IoU and GIoU with ONE: 0.6


def sample(
    name: str, true_boxes: list[list[float]], boxes: list[list[float]], scores: list[float]
) -> tuple[Prediction, Target]:
    truth = from_pixels(torch.tensor(true_boxes).reshape(-1, 4), SIZE)
    target = Target(name, SIZE, ("things",), truth, torch.zeros(len(true_boxes)).long())
    found = torch.tensor(boxes).reshape(-1, 4)
    return Prediction(name, found, torch.tensor(scores), torch.zeros(len(boxes)).long(), ("things",)), target


CASES = {  # name -> the sample, and whether F1 = 1
    "both matched": (sample("a", [ONE, TWO], [TWO, SHIFTED, FAR], [0.9, 0.8, 0.6]), True),
    "one box too many": (sample("b", [ONE], [ONE, FAR], [0.9, 0.8]), False),
    "two boxes on one object": (sample("c", [ONE, TWO], [ONE, SHIFTED], [0.9, 0.8]), False),
    "score below the threshold": (sample("d", [ONE], [ONE], [0.6]), False),
    "wrong box": (sample("e", [ONE], [FAR], [0.9]), False),
    "GIoU of exactly 0.5": (sample("j", [EDGE], [[7.37, 3.25, 14.37, 34.25]], [0.9]), True),
    "inverted box": (sample("k", [ONE], [ONE[2:] + ONE[:2]], [0.9]), False),
    "absent, low score": (sample("f", [], [FAR], [0.3]), True),
    "absent, no box": (sample("g", [], [], []), True),
    "absent, high score": (sample("h", [], [FAR], [0.95]), False),
    "no box": (sample("i", [ONE], [], []), False),
}


def metric_of(*names: str, batch_size: int = 4) -> GrecMetric:
    metric = GrecMetric()
    pairs = [CASES[name][0] for name in names]
    for start in range(0, len(pairs), batch_size):
        predictions, targets = zip(*pairs[start : start + batch_size], strict=True)
        metric.update(predictions, targets)
    return metric


@pytest.mark.parametrize("name", CASES)
def test_f1_of_single_samples(name: str) -> None:
    assert metric_of(name).compute().metrics["f1"] == CASES[name][1]


def test_metrics_of_all_samples() -> None:
    results = metric_of(*CASES).compute().metrics
    assert results["f1"] == pytest.approx(4 / 11)
    assert results["n_acc"] == pytest.approx(2 / 3)
    assert results["t_acc"] == pytest.approx(6 / 8)
    assert (results["num_expressions"], results["num_absent"]) == (11, 3)
    assert 0 < results["auc"] < 1
    assert metric_of(*CASES, "both matched", "wrong box").compute().metrics == results, "a repeated sample counts once"
    assert metric_of(*reversed(CASES), batch_size=1).compute().metrics == results


def test_only_present_or_only_absent_expressions() -> None:
    assert "auc" not in metric_of("both matched", "wrong box").compute().metrics
    assert "n_acc" not in metric_of("both matched").compute().metrics
    assert metric_of("absent, low score").compute().metrics.keys() == {"f1", "n_acc", "num_expressions", "num_absent"}
    with pytest.raises(ValueError, match="got no sample"):
        GrecMetric().compute()


def test_contributions_of_single_samples() -> None:
    metric = metric_of(*CASES)
    ids, values = metric.per_sample()
    results = metric.compute().metrics
    for name in ("f1", "n_acc", "t_acc"):
        assert np.nanmean(values[name]) == pytest.approx(results[name])
    index = int(np.flatnonzero(ids == stable_hash("h"))[0])
    assert values["score"][index] == pytest.approx(0.95)
    assert np.isnan(values["t_acc"][index])
    one, other = metric_of("both matched", "wrong box"), metric_of("one box too many")
    one.absorb(other)
    assert one.compute() == metric_of("both matched", "wrong box", "one box too many").compute()


def test_contributions_of_single_samples_to_the_rec_metric() -> None:
    metric = RecMetric()
    pairs = [
        sample("a", [ONE], [FAR, SHIFTED], [0.9, 0.8]),
        sample("b", [ONE], [], []),
        sample("c", [TWO], [TWO], [0.7]),
        sample("d", [], [ONE], [0.4]),
    ]
    predictions, targets = zip(*pairs, strict=True)
    metric.update(predictions, targets)
    ids, values = metric.per_sample()
    order = [int(np.flatnonzero(ids == stable_hash(name))[0]) for name in "abcd"]
    assert values["miou"][order].tolist() == pytest.approx([0, 0, 1, np.nan], nan_ok=True)
    assert values["recall@5"][order].tolist() == pytest.approx([1, 0, 1, np.nan], nan_ok=True)
    assert values["recall@1"][order].tolist() == pytest.approx([0, 0, 1, np.nan], nan_ok=True)
    assert values["score"][order].tolist() == pytest.approx([0.9, 0, 0.7, 0.4])
    results = metric.compute().metrics
    for name in values.keys() - {"score"}:
        assert np.nanmean(values[name]) == pytest.approx(results[name])
