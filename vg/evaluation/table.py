"""The results of an evaluation as text."""

from __future__ import annotations

from collections.abc import Sequence

from vg.evaluation.results import DatasetResult, EvaluationResult
from vg.metrics.average_precision import UNDEFINED


def table(result: EvaluationResult) -> str:
    """Return the metrics of each dataset with its groups; several datasets are first shown side by side."""
    tables = [_dataset_table(dataset) for dataset in result.datasets]
    return "\n\n".join([_side_by_side(result.datasets), *tables] if len(tables) > 1 else tables)


def _side_by_side(datasets: Sequence[DatasetResult]) -> str:
    """A row per metric, a column per dataset."""
    names = list(dict.fromkeys(name for dataset in datasets for name in dataset.totals))
    widths = [max(9, len(dataset.name)) for dataset in datasets]
    label = max(map(len, names))
    rows = [[f"{dataset.name:>{width}}" for dataset, width in zip(datasets, widths, strict=True)]]
    for name in names:
        cells = zip(datasets, widths, strict=True)
        rows.append([f"{_cell(dataset.totals.get(name)):>{width}}" for dataset, width in cells])
    return "\n".join(" ".join((f"{name:<{label}}", *row)) for name, row in zip(("", *names), rows, strict=True))


def _dataset_table(result: DatasetResult) -> str:
    """A title, a row for all samples and one per group, and the metrics that only the row of all samples has.

    Classes are sorted by average precision, best first; expression types by name.
    """
    totals, groups = result.totals, result.groups
    names = sorted(groups, key=lambda name: (-groups[name].get("ap", 0.0), name))
    shared = [name for name in totals if not groups or any(name in metrics for metrics in groups.values())]
    width = max(map(len, ("all", *names)))
    lines = [" ".join((" " * width, *(f"{name.removeprefix('num_'):>11}" for name in shared)))]
    for group, metrics in (("all", totals), *((name, groups[name]) for name in names)):
        lines.append(" ".join((f"{group:<{width}}", *(f"{_cell(metrics.get(name)):>11}" for name in shared))))
    rest = [f"{name} {_cell(value)}" for name, value in totals.items() if name not in shared]
    lines += [", ".join(rest[start : start + 6]) for start in range(0, len(rest), 6)]
    return "\n".join([_title(result), *lines])


def _title(result: DatasetResult) -> str:
    provenance = result.provenance
    name = f"{result.name}: " if result.name else ""
    split = f"{provenance.partition or ''} {provenance.split} split".lstrip()
    remark = ", not the complete official one" if provenance.official is False else ""
    return f"{name}{provenance.data}, {split}{remark} ({result.protocol})"


def _cell(value: float | None) -> str:
    """Counts as integers, other values with four decimals, a dash for undefined or absent ones."""
    if value is None or value == UNDEFINED:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
