"""Metrics of phrases without an object in the image."""

from __future__ import annotations

import numpy as np
import pytest

from vg.metrics.absent import absence_metrics


def metrics(present: list[float], absent: list[float]) -> dict[str, float]:
    return absence_metrics(np.array([*present, *absent]), np.array([True] * len(present) + [False] * len(absent)))


def test_values_computed_by_hand() -> None:
    results = metrics([0.9, 0.8, 0.6, 0.3], [0.7, 0.4, 0.2, 0.1, 0.0])
    assert results["n_acc"] == 4 / 5
    assert results["t_acc"] == 3 / 4
    assert results["auc"] == pytest.approx((5 + 5 + 4 + 3) / 20)
    assert results["roc@0.01"] == 2 / 4, "0.9 and 0.8 are above every absent phrase"
    assert results["roc@0.1"] == 2 / 4
    assert results["roc@0.2"] == 3 / 4, "one false alarm of five lets 0.6 through"
    assert results["roc@0.5"] == 1


def test_perfect_constant_and_reversed_scores() -> None:
    perfect = metrics([0.9] * 3, [0.1] * 4)
    assert set(perfect.values()) == {1.0}
    assert metrics([0.5] * 3, [0.5] * 4)["auc"] == 0.5
    assert metrics([0.1] * 3, [0.9] * 4) == dict.fromkeys(perfect, 0)


def test_only_present_or_only_absent_phrases() -> None:
    assert metrics([0.3, 0.8], []) == {}
    assert metrics([], [0.3, 0.8]) == {"n_acc": 0.5}


def test_scores_that_are_nearly_equal_are_separated() -> None:
    assert metrics([1e-9, 1e-9], [0.0, 0.0])["auc"] == 1
