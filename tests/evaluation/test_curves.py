"""Plots of training curves."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vg.evaluation.curves import LINE_COLORS, curves, losses_of, metrics_of
from vg.metrics.coco import CocoMetric
from vg.metrics.rec import RecMetric


def test_plot_has_a_panel_for_losses_and_one_for_metrics(tmp_path: Path) -> None:
    training = [{"step": step, "loss": 3 / (step + 1), "loss/giou": 1.0, "learning_rate": 1e-4} for step in range(200)]
    evaluation = [{"step": step, "miou": step / 300, "num_expressions": 50, "easy/miou": 1.0} for step in (99, 199)]
    curves([*training, *evaluation], tmp_path / "both.png")
    curves(training[:1], tmp_path / "loss.png")
    curves(evaluation, tmp_path / "metrics.png")
    both, loss, metrics = (Image.open(tmp_path / f"{name}.png").size for name in ("both", "loss", "metrics"))
    assert both[1] == 2 * loss[1] == 2 * metrics[1]
    for empty in ([], [{"step": 1, "epoch": 1}]):
        with pytest.raises(ValueError, match="neither losses nor metrics"):
            curves(empty, tmp_path / "empty.png")


def test_components_of_a_loss_term_are_summed() -> None:
    rows = [
        {"step": step, "loss": 10.0 - step, "loss/class": 1.0, "loss/class_layer0": 2.0, "loss/l1_denoising": 0.5}
        for step in (1, 2)
    ]
    assert losses_of([*rows, {"step": 2, "ap": 0.5}]) == {
        "loss": [(1, 9.0), (2, 8.0)],
        "class": [(1, 3.0), (2, 3.0)],
        "l1": [(1, 0.5), (2, 0.5)],
    }


@pytest.mark.parametrize(
    ("metric", "plotted"),
    [
        (CocoMetric, ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]),
        (RecMetric, ["miou", "acc@0.5", "acc@0.75", "acc@0.9", "map@50", "map@75"]),
    ],
)
def test_every_plotted_metric_has_its_own_color(metric: type, plotted: list[str]) -> None:
    row = {"step": 5, "num_images": 3} | dict.fromkeys(metric.metric_names, 0.5)
    assert list(metrics_of([row])) == plotted
    assert len(plotted) == len(LINE_COLORS)


def test_undefined_metrics_are_not_plotted() -> None:
    rows = [{"step": step, "ap": 0.5, "ap_small": -1.0, "ap_large": large} for step, large in ((1, -1.0), (2, 0.25))]
    assert metrics_of(rows) == {"ap": [(1, 0.5), (2, 0.5)], "ap_large": [(2, 0.25)]}
