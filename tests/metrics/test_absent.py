"""How well scores tell phrases that name something from those that name nothing."""

from __future__ import annotations

import numpy as np
import pytest

from vg.metrics.absent import absent_numbers


def numbers(present: list[float], absent: list[float]) -> dict[str, float]:
    return absent_numbers(np.array([*present, *absent]), np.array([True] * len(present) + [False] * len(absent)))


def test_figures_worked_out_by_hand() -> None:
    results = numbers([0.9, 0.8, 0.6, 0.3], [0.7, 0.4, 0.2, 0.1, 0.0])
    assert results["n_acc"] == 4 / 5
    assert results["t_acc"] == 3 / 4
    assert results["auc"] == pytest.approx((5 + 5 + 4 + 3) / 20)
    assert results["roc@0.01"] == 2 / 4, "0.9 and 0.8 are above every absent phrase"
    assert results["roc@0.1"] == 2 / 4
    assert results["roc@0.2"] == 3 / 4, "one false alarm of five lets 0.6 through"
    assert results["roc@0.5"] == 1


def test_a_perfect_score_a_useless_one_and_a_reversed_one() -> None:
    perfect = numbers([0.9] * 3, [0.1] * 4)
    assert set(perfect.values()) == {1.0}
    assert numbers([0.5] * 3, [0.5] * 4)["auc"] == 0.5
    assert numbers([0.1] * 3, [0.9] * 4) == dict.fromkeys(perfect, 0)


def test_without_the_one_or_the_other_kind_there_is_less_to_say() -> None:
    assert numbers([0.3, 0.8], []) == {}
    assert numbers([], [0.3, 0.8]) == {"n_acc": 0.5}


def test_scores_close_together_are_told_apart() -> None:
    assert numbers([1e-9, 1e-9], [0.0, 0.0])["auc"] == 1
