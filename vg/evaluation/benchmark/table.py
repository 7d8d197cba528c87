"""The results as text, beside what others published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vg.metrics.average_precision import UNDEFINED

COLUMNS = {  # number -> its heading
    "acc@0.5": "Acc@0.5",
    "acc@0.75": "Acc@0.75",
    "acc@0.9": "Acc@0.9",
    "miou": "mIoU",
    "map@50": "mAP@50",
    "map@75": "mAP@75",
    "recall@5": "R@5",
    "recall@10": "R@10",
    "f1": "F1=1",
    "n_acc": "N-acc",
    "t_acc": "T-acc",
    "auc": "AUC",
}
OURS = "this checkpoint"


@cache
def published() -> Any:
    """The numbers of others with their sources, see published.yaml."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


Rows = list[list[str]]


def comparison(results: Mapping[str, Any]) -> Rows:
    """Accuracy in percent of published methods and of ours, where they share a split; the heading comes first."""
    parts = [part for part in results["parts"] if any(part["key"] in method for method in published()["methods"])]
    rows = [["Acc@0.5 in %", *(f"{part['title']} {part['split']}" for part in parts)]]
    for method in published()["methods"]:
        cells = [method.get(part["key"], {}).get(part["split"]) for part in parts]
        if any(cell is not None for cell in cells):
            rows.append([method["name"], *("-" if cell is None else f"{cell:.2f}" for cell in cells)])
    ours = [_with_interval(part, "acc@0.5", 100, 2) + (_star(part)) for part in parts]
    return [*rows, [OURS, *ours]] if parts else []


def numbers(parts: Sequence[Mapping[str, Any]]) -> Rows:
    """All numbers, a row for each part of the results, the heading first; the leading ones with their intervals."""
    names = [name for name in COLUMNS if any(_known(part, name) for part in parts)]
    rows = [["", *(COLUMNS[name] for name in names), "expressions", "images/s", "expr./s"]]
    for part in parts:
        official = _star(part)
        cells = [
            _with_interval(part, name) if name in ("acc@0.5", "miou", "f1") else _cell(part, name) for name in names
        ]
        speed = [
            f"{part[name]:.1f}" if name in part else "" for name in ("images_per_second", "expressions_per_second")
        ]
        rows.append([f"{part['title']} {part['split']}{official}", *cells, f"{part['num_expressions']:,}", *speed])
    return rows


def pooled(results: Mapping[str, Any]) -> Rows:
    """testA and testB together, and the reference where it is about the same data."""
    if not results["pooled"]:
        return []
    rows = numbers(results["pooled"])
    reference = published()["pooled"]
    for part in results["pooled"]:
        if part["key"] in reference:
            known = {"title": reference["name"], "split": "", "official": "yes", "num_expressions": 0}
            row = numbers([*results["pooled"], known | reference[part["key"]]])[-1]
            rows.append([cell if cell != "0" else "" for cell in row])
    return rows


def slices(part: Mapping[str, Any]) -> Rows:
    """The slices of one part."""
    names = [name for name in ("acc@0.5", "miou", "f1") if _known(part, name)]
    rows = [["", *(COLUMNS[name] for name in names), "expressions"]]
    for about, labels in part["slices"].items():
        for label, values in labels.items():
            cells = [_with_interval(values, name) for name in names]
            rows.append([f"{about}: {label}", *cells, f"{values['num_expressions']:,}"])
    return rows


def remark(results: Mapping[str, Any]) -> str:
    """What the star means, where there is one."""
    starred = any(_star(part) for part in [*results["parts"], *results["pooled"]])
    return "* not the whole official split: do not compare it with published numbers" if starred else ""


def text(results: Mapping[str, Any]) -> str:
    """All tables for a terminal."""
    model = results["model"]
    lines = [
        f"{results['checkpoint']}: {model['parameters']:,} parameters, {model['trainable_parameters']:,} of them "
        f"trained ({model['answers']})",
        results["device"],
        *(f"{part['title']} {part['split']}: {part['data']}, {part['protocol']}" for part in results["parts"]),
    ]
    tables = [comparison(results), numbers(results["parts"]), pooled(results)]
    return "\n\n".join(filter(None, ["\n".join(lines), *map(_aligned, tables), remark(results)]))


def _aligned(rows: Rows) -> str:
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _star(part: Mapping[str, Any]) -> str:
    return "" if part.get("official") == "yes" else "*"


def _known(part: Mapping[str, Any], name: str) -> bool:
    return part.get(name, UNDEFINED) != UNDEFINED


def _cell(part: Mapping[str, Any], name: str, factor: int = 1, digits: int = 4) -> str:
    return f"{factor * part[name]:.{digits}f}" if _known(part, name) else "-"


def _with_interval(part: Mapping[str, Any], name: str, factor: int = 1, digits: int = 4) -> str:
    if name not in part.get("intervals", {}):
        return _cell(part, name, factor, digits)
    low, high = (f"{factor * bound:.{digits}f}" for bound in part["intervals"][name])
    return f"{_cell(part, name, factor, digits)} ({low} to {high})"
