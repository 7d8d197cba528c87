"""The results as one HTML file that needs no other file: tables, slices, and pictures of the worst and best answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from vg.evaluation.benchmark import table
from vg.evaluation.benchmark.run import Judged
from vg.inference.draw import PREDICTED, TRUE, draw_boxes
from vg.inference.grounder import Grounder
from vg.models.base import GroundingModel
from vg.types import Prediction, Sample

EXAMPLES = 6  # of each sort, for each split
PICTURE_SIDE = 420  # pixels of the longer side
HIT_IOU = 0.5
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


def report(results: Mapping[str, Any], judged: Sequence[Judged], model: GroundingModel) -> str:
    """The page; answers the examples once more to draw them."""
    about = results["model"]
    grounder = Grounder(model, str(model.device))
    head = [
        f"<h1>RefCOCO benchmark: {escape(str(results['checkpoint']))}</h1>",
        f"<p>{about['parameters']:,} parameters, {about['trainable_parameters']:,} of them trained. "
        f"{escape(about['answers'])}. {escape(results['device'])}.</p>",
    ]
    body = [
        *_section("Beside published numbers", table.comparison(results)),
        *_section("All numbers", table.numbers(results["parts"])),
        *_section("testA and testB together", table.pooled(results)),
        f"<p>{table.remark(results)}</p>",
        "<p>In brackets: 95 % bootstrap intervals, whole pictures drawn. Images and expressions per second: reading "
        "included.</p>",
        *_sources(),
    ]
    for each in judged:
        body += [*_section(each.part.title, table.slices(each.results)), *_provenance(each.results)]
        for title, places in _choose(each):
            figures = [_figure(each, place, grounder) for place in places]
            body += [f"<h3>{title}</h3>", '<div class="examples">', *figures, "</div>"] if figures else []
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f"<title>RefCOCO benchmark</title><style>{_STYLE}</style></head><body>",
            *head,
            *body,
            "</body></html>\n",
        ]
    )


def _section(title: str, rows: table.Rows) -> list[str]:
    if not rows:
        return []
    lines = [f"<h2>{escape(title)}</h2>", '<div class="scroll"><table>']
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        ours = ' class="ours"' if row[0] == table.OURS else ""
        lines.append(f"<tr{ours}>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>")
    return [*lines, "</table></div>"]


def _provenance(part: Mapping[str, Any]) -> list[str]:
    known = {name: part.get(name) for name in ("data", "partition", "split", "official", "protocol")}
    told = "; ".join(f"{name}: {value}" for name, value in known.items() if value is not None)
    return [
        f"<p>{escape(told)}</p>",
        f'<p>Drawn: <span class="swatch" style="border-color:{PREDICTED}"></span> predicted, '
        f'<span class="swatch" style="border-color:{TRUE}"></span> true.</p>',
    ]


def _sources() -> list[str]:
    methods = [*table.published()["methods"], table.published()["pooled"]]
    items = [
        f"<li>{escape(method['name'])}: {escape(method['source'])}"
        + (f" ({escape(method['note'])})" if "note" in method else "")
        + "</li>"
        for method in methods
    ]
    return ["<details><summary>Sources of the published numbers</summary><ul>", *items, "</ul></details>"]


def _choose(judged: Judged) -> list[tuple[str, list[int]]]:
    """Title -> places of samples, no picture twice: the most certain wrong answers, and the best right ones."""
    score = judged.values["score"]
    if "miou" in judged.values:
        overlap = judged.values["miou"]  # [samples]
        wrong, right, order = overlap < HIT_IOU, overlap >= HIT_IOU, -overlap
        titles = "Worst: the most certain misses", "Best: the closest boxes"
    else:
        right = judged.values["f1"] == 1
        wrong, order = ~right, -score
        titles = "Worst: faults with the highest scores", "Best: without a fault, with the highest scores"
    return [
        (titles[0], _different(judged, np.flatnonzero(wrong)[np.argsort(-score[wrong], kind="stable")])),
        (titles[1], _different(judged, np.flatnonzero(right)[np.argsort(order[right], kind="stable")])),
    ]


def _different(judged: Judged, places: Iterable[Any]) -> list[int]:
    chosen: dict[str, int] = {}
    for place in places:
        chosen.setdefault(judged.part.annotations[place].image_key, int(place))
        if len(chosen) == EXAMPLES:
            break
    return list(chosen.values())


def _figure(judged: Judged, place: int, grounder: Grounder) -> str:
    sample = judged.part.source.load(place, epoch=0)
    (prediction,) = grounder.predict_samples([sample])
    overlap = judged.values.get("miou")
    told = f"score {judged.values['score'][place]:.2f}"
    if overlap is not None and not np.isnan(overlap[place]):
        told = f"IoU {overlap[place]:.2f}, {told}"
    file = io.BytesIO()
    _drawn(sample, prediction).save(file, "JPEG", quality=80)
    code = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img alt="" src="data:image/jpeg;base64,{code}">'
        f"<figcaption><b>{escape(sample.phrases[0])}</b><br>{told}<br>{escape(sample.id)}</figcaption></figure>"
    )


def _drawn(sample: Sample, prediction: Prediction) -> Image.Image:
    """The picture with the true boxes and as many predicted ones, at least one."""
    boxes = prediction.boxes[: max(1, len(sample.boxes))].numpy()
    colors = [*[TRUE] * len(sample.boxes), *[PREDICTED] * len(boxes)]
    drawn = draw_boxes(sample.image, np.concatenate((sample.boxes, boxes)), colors=colors)
    picture = Image.fromarray(drawn)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return picture
