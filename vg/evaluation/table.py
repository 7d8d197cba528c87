"""The results of an evaluation as text."""

from __future__ import annotations

from collections.abc import Sequence

from vg.errors import printable
from vg.evaluation.results import DatasetResult, EvaluationResult
from vg.metrics.result import UNDEFINED


def table(result: EvaluationResult) -> str:
    """Return the metrics of each dataset with its groups; several datasets are first shown side by side."""
    tables = [_dataset_table(dataset) for dataset in result.datasets]
    return "\n\n".join([_side_by_side(result.datasets), *tables] if len(tables) > 1 else tables)


def _side_by_side(datasets: Sequence[DatasetResult]) -> str:
    """A row per metric, a column per dataset."""
    names = dict.fromkeys(name for dataset in datasets for name in dataset.totals)
    rows = [[name, *(cell(dataset.totals.get(name)) for dataset in datasets)] for name in names]
    return aligned([["", *(dataset.name for dataset in datasets)], *rows])


def _dataset_table(result: DatasetResult) -> str:
    """A title, a row for all samples and one per group, and the metrics that only the row of all samples has.

    Classes are sorted by average precision, best first; expression types by name.
    """
    totals, groups = result.totals, result.groups
    names = sorted(groups, key=lambda name: (-groups[name].get("ap", 0.0), name))
    shared = [name for name in totals if not groups or any(name in metrics for metrics in groups.values())]
    rows = [["", *(name.removeprefix("num_") for name in shared)]]
    for group, metrics in (("all", totals), *((name, groups[name]) for name in names)):
        rows.append([group, *(cell(metrics.get(name)) for name in shared)])
    rest = [f"{name} {cell(value)}" for name, value in totals.items() if name not in shared]
    lines = [", ".join(rest[start : start + 6]) for start in range(0, len(rest), 6)]
    return "\n".join([_title(result), aligned(rows), *lines])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return cells as lines of text: the first column is left-aligned, the columns of numbers are right-aligned."""
    rows = [[printable(cell) for cell in row] for row in rows]  # names from data
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[f"{label:<{first}}", *map(str.rjust, cells, widths)] for label, *cells in rows]
    return "\n".join("  ".join(line) for line in lines)


def _title(result: DatasetResult) -> str:
    provenance = result.provenance
    name = f"{result.name}: " if result.name else ""
    split = f"{provenance.partition or ''} {provenance.split} split".lstrip()
    remark = ", not the complete official one" if provenance.official is False else ""
    return printable(f"{name}{provenance.data}, {split}{remark} ({result.protocol})")


def cell(value: float | None) -> str:
    """Counts as integers, other values with four decimals, a dash for undefined or absent ones."""
    if value is None or value == UNDEFINED:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
