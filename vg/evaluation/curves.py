"""Plot the curves of a training run: losses and evaluation metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from vg.files import write_bytes
from vg.inference.draw import FAINT_INK, INK
from vg.metrics.result import UNDEFINED, split_flat_key

# Distinguishable like draw.COLORS, but on a white background.
LINE_COLORS = (INK, "#e08a00", "#0f86c9", "#ff4466", "#663300", "#8800ff")
SECONDARY = ("recall@", "ar@", "ar_")  # metrics that are printed, but not plotted, like those with "@1000"

Line = list[tuple[float, float]]  # (step, value) of each row


def curves(history: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Plot the loss and its terms over the steps, and below them the metrics, into an image file.

    A term is plotted as the sum of its components: "class" is that of all layers, of the encoder and of denoising. Of
    the metrics, the first six are plotted.

    Args:
        history: rows of history.jsonl, in the order of their "step": of training ("loss" and its terms "loss/<term>")
            and of evaluation ("miou", "acc@0.5", ...; 0..1). Other values of a training row (learning rate), "epoch",
            "eval_loss", counts ("num_...") and metrics of groups and further datasets ("<prefix>/miou") are not
            plotted.
        path: of the file to write; its suffix selects the format (".png").

    Raises:
        ValueError: the history has neither losses nor metrics.
    """
    from matplotlib.figure import Figure  # slow to import; and not pyplot, which picks a backend for the whole program

    losses, metrics = losses_of(history), metrics_of(history)
    panels = [lines for lines in (losses, metrics) if lines]
    if not panels:
        raise ValueError('the history has neither losses nor metrics: its rows need a "step" and other values')

    figure = Figure(figsize=(9, 3.6 * len(panels)), dpi=150, layout="constrained")
    for axes, lines in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
        if lines is losses:
            _plot(axes, "Training loss", losses, smooth=True)
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        else:
            _plot(axes, "Evaluation", metrics, smooth=False)
            axes.set_ylim(0, 1.02)
    axes.set_xlabel("step", color=FAINT_INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    content = BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:])
    write_bytes(Path(path), content.getvalue())


def losses_of(history: Sequence[Mapping[str, float]]) -> dict[str, Line]:
    """Return the loss and the sum of each term: "class" sums "class", "class_layer0" and "class_encoder"."""
    lines: dict[str, Line] = {}
    for row in history:
        if "loss" not in row:
            continue
        sums = {"loss": row["loss"]}
        for name, value in row.items():
            if name.startswith("loss/"):
                term = name.removeprefix("loss/").partition("_")[0]
                sums[term] = sums.get(term, 0.0) + value
        for name, value in sums.items():
            lines.setdefault(name, []).append((row["step"], value))
    return lines


def metrics_of(history: Sequence[Mapping[str, float]]) -> dict[str, Line]:
    """Return the first metrics over all samples of the first dataset, one per color; undefined values are left out."""
    lines: dict[str, Line] = {}
    for row in history:
        if "loss" in row:
            continue
        for name, value in row.items():
            prefix, metric = split_flat_key(name)
            is_other = metric in ("step", "epoch", "eval_loss") or metric.startswith("num_")
            is_secondary = metric.startswith(SECONDARY) or metric.endswith("@1000")
            if not (prefix or is_other or is_secondary or value == UNDEFINED):
                lines.setdefault(name, []).append((row["step"], value))
    return dict(list(lines.items())[: len(LINE_COLORS)])


def _plot(axes: Any, title: str, lines: Mapping[str, Line], smooth: bool) -> None:
    """Plot one panel; its legend is on the right and has the last values."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    for (name, points), color in zip(lines.items(), cycle(LINE_COLORS), strict=False):
        steps, values = np.array(points, dtype=float).T  # [2, rows]
        label = f"{name}  {values[-1]:.3f}"
        if smooth:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
            axes.plot(steps, _smooth(values), color=color, linewidth=2.6 if name == "loss" else 1.6, label=label)
        else:
            axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=4, label=label)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b5bcc5")
    axes.tick_params(colors=FAINT_INK, labelsize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=10, labelcolor=INK)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over a fiftieth of all rows, [rows] -> [rows]; the window is shorter at both ends."""
    window = np.ones(2 * (len(values) // 100) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
