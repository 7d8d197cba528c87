"""The table of a paper as LaTeX, markdown or CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from vg.errors import ConfigError, printable
from vg.evaluation.benchmark.paper import MILLION, Accuracy, PaperTable, Row
from vg.evaluation.benchmark.suite import DATASETS

HEADINGS = (
    *("Method", "Vision encoder", "Text encoder", "Resolution (px)", "Trained (M)", "Total (M)", "Training data"),
    *("Extra data", "Epochs"),
)
_LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "{}$&#%_"},
    **{"^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}"},
    **{"|": r"\textbar{}", "±": r"$\pm$", "†": r"$\dagger$", "*": r"$*$"},
    **{"`": r"\textasciigrave{}", "[": "{[}", "]": "{]}"},  # after the end of a row, brackets would be an option of it
}


def latex(table: PaperTable) -> str:
    """Return a table environment over the whole text width; it needs the packages booktabs and graphicx."""
    start = len(HEADINGS) + 1
    titles, rules, splits = [], [], []
    for key, columns in groupby(table.columns, key=lambda column: column[0]):
        names = [split for _, split in columns]
        titles.append(rf"\multicolumn{{{len(names)}}}{{c}}{{{_escaped(DATASETS[key].title)}}}")
        rules.append(rf"\cmidrule(lr){{{start}-{start + len(names) - 1}}}")
        splits += names
        start += len(names)
    sources = _sources(table)
    blocks = [[_latex_row(row, table, sources) for row in rows] for rows in (table.published, table.ours) if rows]
    notes = [*table.notes(), *(f"[{number}] {source}." for source, number in sources.items())]
    return "\n".join(
        [
            r"% \usepackage{booktabs, graphicx}",
            r"\begin{table*}",
            r"\centering",
            r"\caption{Referring expression comprehension.}",
            r"\setlength{\tabcolsep}{3pt}",
            r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{ll{'l' * 2}rr{'l' * 2}r{'c' * len(table.columns)}}}",
            r"\toprule",
            " & ".join(["", *([""] * (len(HEADINGS) - 1)), *titles]).lstrip() + r" \\",
            " ".join(rules),
            " & ".join([*HEADINGS, *map(_escaped, splits)]) + r" \\",
            r"\midrule",
            "\n\\midrule\n".join("\n".join(block) for block in blocks),
            r"\bottomrule",
            r"\end{tabular}}",
            r"\par\smallskip\raggedright\scriptsize",
            "\n".join(map(_escaped, notes)),
            r"\end{table*}",
            "",
        ]
    )


def _latex_row(row: Row, table: PaperTable, sources: dict[str, int]) -> str:
    values = [row.values.get(column) for column in table.columns]
    scores = ["--" if value is None else _latex_value(value) for value in values]
    return " & ".join([*(_escaped(cell) if cell != "-" else "--" for cell in _about(row, sources)), *scores]) + r" \\"


def _latex_value(value: Accuracy) -> str:
    deviation = "" if value.deviation is None else rf" \pm {value.deviation:.{value.digits}f}"
    marks = "".join({"*": "*", "†": r"\dagger"}[mark] for mark in value.marks)
    return f"${value.mean:.{value.digits}f}{deviation}{f'^{{{marks}}}' if marks else ''}$"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in printable(text))


def markdown(table: PaperTable) -> str:
    """Return a table as GitHub renders it, and its notes as a list."""
    sources = _sources(table)
    titles = [f"{DATASETS[key].title} {split}" for key, split in table.columns]
    rows = [[*HEADINGS, *titles], ["---"] * len(HEADINGS) + ["---:"] * len(titles)]
    for row in table.rows:
        scores = [_markdown_value(row.values.get(column)) for column in table.columns]
        rows.append([*map(_escaped_markdown, _about(row, sources)), *scores])
    notes = [*table.notes(), *(f"[{number}] {source}" for source, number in sources.items())]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([*lines, "", *(f"- {_escaped_markdown(note)}" for note in notes), ""])


def _markdown_value(value: Accuracy | None) -> str:
    if value is None:
        return "-"
    deviation = "" if value.deviation is None else f" ± {value.deviation:.{value.digits}f}"
    return f"{value.mean:.{value.digits}f}{deviation}{_escaped_markdown(value.marks)}"


def _escaped_markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", printable(text))


def comma_separated(table: PaperTable) -> str:
    """Return a line per row, numbers as numbers: parameters, and mean, deviation and marks of every split."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [f"{DATASETS[key].title} {split}" for key, split in table.columns]
    about = ["method", "vision", "text", "resolution", "trained_parameters", "total_parameters", "training_data"]
    about += ["extra_data", "epochs", "seeds"]
    scores = [f"{name}{suffix}" for name in names for suffix in ("", " deviation", " marks")]
    writer.writerow([*about, *scores, "source"])
    for row in table.rows:
        cells: list[object] = [row.method, row.vision, row.text, row.resolution]
        cells += ["" if count is None else round(count) for count in (row.trained, row.total)]
        cells += [row.training_data, row.extra_data, row.epochs, " ".join(map(str, row.seeds))]
        for column in table.columns:
            value = row.values.get(column)
            deviation = "" if value is None or value.deviation is None else f"{value.deviation:.4f}"
            digits = value.digits if value and row.source else 4
            cells += ["", "", ""] if value is None else [f"{value.mean:.{digits}f}", deviation, value.marks]
        writer.writerow([*cells, row.source])
    return file.getvalue()


def _sources(table: PaperTable) -> dict[str, int]:
    """Return the number of each source, from 1."""
    return {source: number for number, source in enumerate(dict.fromkeys(row.source for row in table.published), 1)}


def _about(row: Row, sources: dict[str, int]) -> list[str]:
    """Return the cells before the scores."""
    number = f" [{sources[row.source]}]" if row.source else ""
    runs = f" ({len(row.seeds)} runs)" if len(row.seeds) > 1 else ""
    counts = ["-" if count is None else f"{round(count / MILLION, 2):g}" for count in (row.trained, row.total)]
    texts = [row.vision, row.text, row.resolution, *counts, row.training_data, row.extra_data, row.epochs]
    return [f"{row.method}{number}{runs}", *(text or "-" for text in texts)]


FORMATS: dict[str, Callable[[PaperTable], str]] = {".tex": latex, ".md": markdown, ".csv": comma_separated}


def format_of(path: Path) -> Callable[[PaperTable], str]:
    """Return the function that makes the content of a file; raises ConfigError for an unknown ending."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--output {path}: the ending selects the format, {', '.join(FORMATS)}; use one of them")
    return FORMATS[path.suffix]
