"""Benchmark results as text, next to published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vg.errors import printable
from vg.evaluation.table import aligned
from vg.metrics.result import UNDEFINED

COLUMNS = {  # metric -> its heading
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
MAIN = ("acc@0.5", "miou", "f1")
OURS = "this checkpoint"
NOT_COMPARABLE = "not the complete official split: not comparable with published results"

Rows = list[list[str]]  # of cells, the header first
Entry = Mapping[str, Any]  # of `parts` or `pooled` in benchmark.json


@cache
def published() -> Any:
    """Return the published results with their sources, see published.yaml."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def comparison(results: Mapping[str, Any]) -> Rows:
    """Return the accuracy in percent of published methods and of this checkpoint, on splits that they share."""
    splits = [entry for entry in results["parts"] if any(entry["key"] in method for method in published()["methods"])]
    rows = [["Acc@0.5 in %", *(_title(entry) for entry in splits)]]
    for method in published()["methods"]:
        cells = [method.get(entry["key"], {}).get(entry["split"]) for entry in splits]
        if any(cell is not None for cell in cells):
            rows.append([method["name"], *("-" if cell is None else f"{cell:.2f}" for cell in cells)])
    ours = [_with_interval(entry, "acc@0.5", 100, 2) + _star(entry) for entry in splits]
    return [*rows, [OURS, *ours]] if splits else []


def metrics(entries: Sequence[Entry]) -> Rows:
    """Return all metrics, a row per entry; the main ones have their intervals."""
    names = [name for name in COLUMNS if any(_known(entry, name) for entry in entries)]
    skipped = ["skipped"] * any("num_skipped" in entry for entry in entries)
    rows = [["", *(COLUMNS[name] for name in names), "expressions", *skipped, "images/s", "expr./s"]]
    for entry in entries:
        cells = [_with_interval(entry, name) if name in MAIN else _cell(entry, name) for name in names]
        rates = ("images_per_second", "expressions_per_second")
        speed = [f"{entry[name]:.1f}" if name in entry else "" for name in rates]
        counts = [f"{entry['num_expressions']:,}", *(f"{entry.get('num_skipped', 0):,}" for _ in skipped)]
        rows.append([f"{_title(entry)}{_star(entry)}", *cells, *counts, *speed])
    return rows


def pooled(results: Mapping[str, Any]) -> Rows:
    """Return the metrics of testA and testB together, and those of the reference on the same data."""
    if not results["pooled"]:
        return []
    rows = metrics(results["pooled"])
    reference = published()["pooled"]
    for entry in results["pooled"]:
        if entry["key"] in reference:
            known = {"title": reference["name"], "split": "", "official": "yes", "num_expressions": 0}
            row = metrics([*results["pooled"], known | reference[entry["key"]]])[-1]
            rows.append([cell if cell != "0" else "" for cell in row])
    return rows


def slices(entry: Entry) -> Rows:
    """Return the main metrics of the slices of one split."""
    names = [name for name in MAIN if _known(entry, name)]
    rows = [["", *(COLUMNS[name] for name in names), "expressions"]]
    for attribute, labels in entry["slices"].items():
        for label, values in labels.items():
            cells = [_with_interval(values, name) for name in names]
            rows.append([f"{attribute}: {label}", *cells, f"{values['num_expressions']:,}"])
    return rows


def remark(results: Mapping[str, Any]) -> str:
    """Explain the star if an entry has one."""
    starred = any(_star(entry) for entry in [*results["parts"], *results["pooled"]])
    return f"* {NOT_COMPARABLE}" if starred else ""


def text(results: Mapping[str, Any]) -> str:
    """Return all tables for a terminal."""
    model = results["model"]
    lines = [
        f"{results['checkpoint']}: {model['parameters']:,} parameters, {model['trainable_parameters']:,} of them "
        f"trainable ({model['answers']})",
        results["device"],
        *(f"{_title(entry)}: {entry['data']}, {entry['protocol']}" for entry in results["parts"]),
    ]
    tables = [comparison(results), metrics(results["parts"]), pooled(results)]
    return "\n\n".join(
        filter(None, ["\n".join(map(printable, lines)), *map(aligned, filter(None, tables)), remark(results)])
    )


def _title(entry: Entry) -> str:
    return f"{entry['title']} {entry['split']}"


def _star(entry: Entry) -> str:
    return "*" if entry.get("official") == "no" else ""  # absent: no size is published for this dataset


def _known(entry: Entry, name: str) -> bool:
    return entry.get(name, UNDEFINED) != UNDEFINED


def _cell(entry: Entry, name: str, factor: int = 1, digits: int = 4) -> str:
    return f"{factor * entry[name]:.{digits}f}" if _known(entry, name) else "-"


def _with_interval(entry: Entry, name: str, factor: int = 1, digits: int = 4) -> str:
    if name not in entry.get("intervals", {}):
        return _cell(entry, name, factor, digits)
    low, high = (f"{factor * bound:.{digits}f}" for bound in entry["intervals"][name])
    return f"{_cell(entry, name, factor, digits)} ({low} to {high})"
