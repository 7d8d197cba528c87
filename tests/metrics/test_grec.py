"""Generalized REC: figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vg.boxes import from_pixels
from vg.metrics import GrecMetric, RecMetric
from vg.metrics.collected import hashed
from vg.types import Prediction, Target

SIZE = (480, 640)
ONE, TWO, FAR = [10.0, 10.0, 110.0, 110.0], [200.0, 10.0, 300.0, 110.0], [400.0, 300.0, 500.0, 400.0]
SHIFTED = [10.0, 10.0, 110.0, 70.0]  # IoU and GIoU with ONE: 0.6


def answer(
    name: str, true_boxes: list[list[float]], boxes: list[list[float]], scores: list[float]
) -> tuple[Prediction, Target]:
    truth = from_pixels(torch.tensor(true_boxes).reshape(-1, 4), SIZE)
    target = Target(name, SIZE, ("things",), truth, torch.zeros(len(true_boxes)).long())
    found = torch.tensor(boxes).reshape(-1, 4)
    return Prediction(name, found, torch.tensor(scores), torch.zeros(len(boxes)).long(), ("things",)), target


CASES = {  # name -> the answer, and whether it is without a fault
    "both found": (answer("a", [ONE, TWO], [TWO, SHIFTED, FAR], [0.9, 0.8, 0.6]), True),
    "one too many": (answer("b", [ONE], [ONE, FAR], [0.9, 0.8]), False),
    "a second box for one thing": (answer("c", [ONE, TWO], [ONE, SHIFTED], [0.9, 0.8]), False),
    "not certain enough": (answer("d", [ONE], [ONE], [0.6]), False),
    "elsewhere": (answer("e", [ONE], [FAR], [0.9]), False),
    "nothing there, nothing said": (answer("f", [], [FAR], [0.3]), True),
    "nothing there, not even a box": (answer("g", [], [], []), True),
    "nothing there, but something said": (answer("h", [], [FAR], [0.95]), False),
    "nothing found": (answer("i", [ONE], [], []), False),
}


def judged(*names: str, batch_size: int = 4) -> GrecMetric:
    metric = GrecMetric()
    pairs = [CASES[name][0] for name in names]
    for start in range(0, len(pairs), batch_size):
        predictions, targets = zip(*pairs[start : start + batch_size], strict=True)
        metric.update(predictions, targets)
    return metric


@pytest.mark.parametrize("name", CASES)
def test_faults(name: str) -> None:
    assert judged(name).compute()["f1"] == CASES[name][1]


def test_numbers() -> None:
    results = judged(*CASES).compute()
    assert results["f1"] == pytest.approx(3 / 9)
    assert results["n_acc"] == pytest.approx(2 / 3)
    assert results["t_acc"] == pytest.approx(4 / 6)
    assert (results["num_expressions"], results["num_absent"]) == (9, 3)
    assert 0 < results["auc"] < 1
    assert judged(*CASES, "both found", "elsewhere").compute() == results, "a repeated sample counts once"
    assert judged(*reversed(CASES), batch_size=1).compute() == results


def test_without_one_kind() -> None:
    assert "auc" not in judged("both found", "elsewhere").compute()
    assert "n_acc" not in judged("both found").compute()
    assert judged("nothing there, nothing said").compute().keys() == {"f1", "n_acc", "num_expressions", "num_absent"}
    with pytest.raises(ValueError, match="saw no expression"):
        GrecMetric().compute()


def test_what_single_samples_contribute() -> None:
    metric = judged(*CASES)
    ids, values = metric.per_sample()
    results = metric.compute()
    for name in ("f1", "n_acc", "t_acc"):
        assert np.nanmean(values[name]) == pytest.approx(results[name])
    place = int(np.flatnonzero(ids == hashed("h"))[0])
    assert values["score"][place] == pytest.approx(0.95)
    assert np.isnan(values["t_acc"][place])
    one, other = judged("both found", "elsewhere"), judged("one too many")
    one.absorb(other)
    assert one.compute() == judged("both found", "elsewhere", "one too many").compute()


def test_rec_metric_of_single_samples() -> None:
    metric = RecMetric()
    pairs = [
        answer("a", [ONE], [FAR, SHIFTED], [0.9, 0.8]),
        answer("b", [ONE], [], []),
        answer("c", [TWO], [TWO], [0.7]),
        answer("d", [], [ONE], [0.4]),
    ]
    predictions, targets = zip(*pairs, strict=True)
    metric.update(predictions, targets)
    ids, values = metric.per_sample()
    order = [int(np.flatnonzero(ids == hashed(name))[0]) for name in "abcd"]
    assert values["miou"][order].tolist() == pytest.approx([0, 0, 1, np.nan], nan_ok=True)
    assert values["recall@5"][order].tolist() == pytest.approx([1, 0, 1, np.nan], nan_ok=True)
    assert values["recall@1"][order].tolist() == pytest.approx([0, 0, 1, np.nan], nan_ok=True)
    assert values["score"][order].tolist() == pytest.approx([0.9, 0, 0.7, 0.4])
    results = metric.compute()
    for name in values.keys() - {"score"}:
        assert np.nanmean(values[name]) == pytest.approx(results[name])
