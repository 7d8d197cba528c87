"""Benchmark results as one self-contained HTML file: tables, slices, and images of the worst and best predictions."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from vg.evaluation.benchmark import table
from vg.evaluation.benchmark.run import EvaluatedSplit
from vg.evaluation.results import DatasetResult
from vg.inference.draw import PREDICTED, TRUE
from vg.inference.grids import draw_comparison
from vg.inference.torch_backend import TorchBackend
from vg.models.base import GroundingModel

NUM_EXAMPLES = 6  # worst and best ones of each split
MAX_SIDE = 420  # pixels
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 1280px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #dde1e6 }
th:first-child, td:first-child { text-align: left }
tr.ours td { font-weight: 600; background: #fff4d6 }
.scroll { overflow-x: auto }
.examples { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 300px } figure img { width: 100% } figcaption { font-size: 13px; color: #66707c }
.swatch { display: inline-block; width: 1em; height: .7em; border: 3px solid }
"""


def report(results: Mapping[str, Any], evaluated: Sequence[EvaluatedSplit], model: GroundingModel) -> str:
    """Return the HTML page; predicts the example images again to draw them."""
    about = results["model"]
    backend = TorchBackend(model, str(model.device))
    lines = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f"<title>RefCOCO benchmark</title><style>{_STYLE}</style></head><body>",
        f"<h1>RefCOCO benchmark: {escape(str(results['checkpoint']))}</h1>",
        f"<p>{about['parameters']:,} parameters, {about['trainable_parameters']:,} of them trainable. "
        f"{escape(about['answers'])}. {escape(results['device'])}.</p>",
        *_section("Comparison with published results", table.comparison(results)),
        *_section("All metrics", table.metrics(results["parts"])),
        *_section("testA and testB pooled", table.pooled(results)),
        f"<p>{table.remark(results)}</p>",
        "<p>In parentheses: 95 % bootstrap intervals over images. Images and expressions per second include data "
        "loading.</p>",
        *_sources(),
    ]
    for split, row in zip(evaluated, results["parts"], strict=True):
        lines += [*_section(split.split.title, table.slices(row)), *_provenance(split.result)]
        for title, indices in _examples(split):
            figures = [_figure(split, index, backend) for index in indices]
            lines += [f"<h3>{title}</h3>", '<div class="examples">', *figures, "</div>"] if figures else []
    return "\n".join([*lines, "</body></html>\n"])


def _section(title: str, rows: table.Rows) -> list[str]:
    if not rows:
        return []
    lines = [f"<h2>{escape(title)}</h2>", '<div class="scroll"><table>']
    for index, row in enumerate(rows):
        tag = "td" if index else "th"
        ours = ' class="ours"' if row[0] == table.OURS else ""
        lines.append(f"<tr{ours}>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>")
    return [*lines, "</table></div>"]


def _provenance(result: DatasetResult) -> list[str]:
    flat = result.flat()
    known = [f"{name}: {flat[name]}" for name in ("data", "partition", "split", "official", "protocol") if name in flat]
    return [
        f"<p>{escape('; '.join(known))}</p>",
        f'<p><span class="swatch" style="border-color:{PREDICTED}"></span> predicted, '
        f'<span class="swatch" style="border: 3px dashed {TRUE}"></span> ground truth</p>',
    ]


def _sources() -> list[str]:
    items = []
    for method in [*table.published()["methods"], table.published()["pooled"]]:
        note = f" ({method['note']})" if "note" in method else ""
        items.append(f"<li>{escape(method['name'] + ': ' + method['source'] + note)}</li>")
    return ["<details><summary>Sources of the published results</summary><ul>", *items, "</ul></details>"]


def _examples(evaluated: EvaluatedSplit) -> list[tuple[str, list[int]]]:
    """Return title -> sample indices, each image once: misses with the highest scores, and the best hits."""
    score = evaluated.values["score"]
    if "miou" in evaluated.values:
        overlap = evaluated.values["miou"]  # [samples]
        wrong, right, order = evaluated.values["acc@0.5"] == 0, evaluated.values["acc@0.5"] == 1, -overlap
        titles = "Worst: misses with the highest scores", "Best: boxes with the highest IoU"
    else:
        right = evaluated.values["f1"] == 1
        wrong, order = evaluated.values["f1"] == 0, -score
        titles = "Worst: F1 < 1 with the highest scores", "Best: F1 = 1 with the highest scores"
    return [
        (titles[0], _one_per_image(evaluated, np.flatnonzero(wrong)[np.argsort(-score[wrong], kind="stable")])),
        (titles[1], _one_per_image(evaluated, np.flatnonzero(right)[np.argsort(order[right], kind="stable")])),
    ]


def _one_per_image(evaluated: EvaluatedSplit, indices: Iterable[Any]) -> list[int]:
    chosen: dict[str, int] = {}
    for index in indices:
        chosen.setdefault(evaluated.split.annotations[index].image_key, int(index))
    return list(chosen.values())[:NUM_EXAMPLES]


def _figure(evaluated: EvaluatedSplit, index: int, backend: TorchBackend) -> str:
    """Draw the ground-truth boxes and the same number of predicted boxes, at least one."""
    sample = evaluated.split.source.load(index, epoch=0)
    (prediction,) = backend.predict_samples([sample])
    overlap = evaluated.values.get("miou")
    caption = f"score {evaluated.values['score'][index]:.2f}"
    if overlap is not None and not np.isnan(overlap[index]):
        caption = f"IoU {overlap[index]:.2f}, {caption}"
    boxes = prediction.boxes[: max(1, len(sample.boxes))].numpy()
    image = draw_comparison(sample.image, sample.boxes, boxes, (MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    code = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img alt="" src="data:image/jpeg;base64,{code}">'
        f"<figcaption><b>{escape(sample.phrases[0])}</b><br>{caption}<br>{escape(sample.id)}</figcaption></figure>"
    )
