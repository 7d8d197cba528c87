"""The table of a paper: finished benchmark results, seeds as mean and standard deviation, beside published results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from vg.config import RunConfig, SavedConfig, dump_config, parse_saved_config
from vg.errors import ConfigError
from vg.evaluation.benchmark.columns import described, may_have_seen
from vg.evaluation.benchmark.suite import DATASETS
from vg.evaluation.benchmark.table import NOT_COMPARABLE, published
from vg.files import read_json

RESULTS = "benchmark.json"
METRIC = "acc@0.5"
MILLION = 1_000_000
INCOMPLETE, SEEN = "*", "†"
MARKS = {
    INCOMPLETE: NOT_COMPARABLE,
    SEEN: "trained on another dataset or split of the same images, which may contain images of this split",
}
Column = tuple[str, str]  # key of DATASETS and split


@dataclass(frozen=True)
class Accuracy:
    """Acc@0.5 on one split, in percent."""

    mean: float
    deviation: float | None = None  # of the sample, if there are several runs
    marks: str = ""  # keys of MARKS
    digits: int = 2


@dataclass(frozen=True)
class Row:
    """A published method, or runs that differ by their seed only; "" and None are unknown."""

    method: str
    values: dict[Column, Accuracy]
    vision: str = ""
    text: str = ""
    resolution: str = ""  # pixels
    trained: float | None = None  # parameters
    total: float | None = None  # parameters
    training_data: str = ""
    extra_data: str = ""
    epochs: str = ""
    seeds: tuple[int, ...] = ()
    source: str = ""  # of a published method


@dataclass(frozen=True)
class PaperTable:
    """Rows and the columns that at least one of our runs has."""

    columns: list[Column]
    published: list[Row]
    ours: list[Row]

    @property
    def rows(self) -> list[Row]:
        return [*self.published, *self.ours]

    def notes(self) -> list[str]:
        """Explain the numbers and the marks."""
        marks = {mark for row in self.ours for value in row.values.values() for mark in value.marks}
        lines = ["Acc@0.5 in percent, every expression counts; a dash: not evaluated or not reported."]
        if any(len(row.seeds) > 1 for row in self.ours):
            lines.append("Several runs: mean ± standard deviation of the sample over the seeds.")
        return [*lines, *(f"{mark} {text}." for mark, text in MARKS.items() if mark in marks)]


@dataclass(frozen=True)
class Result:
    """One benchmark.json."""

    path: Path
    content: dict[str, Any]
    config: SavedConfig
    parts: dict[Column, dict[str, Any]]  # splits with the metric

    @property
    def name(self) -> str:
        folder = self.path.resolve().parent
        if folder.match("eval/suite=*"):  # a part of the suite, see `vg.cli.evaluate.run`
            folder = folder.parents[1]
        return folder.parent.name if folder.name == self.weights else folder.name  # RUN/interpolated is of RUN

    @property
    def seed(self) -> int | None:
        return self.config.train.seed if isinstance(self.config, RunConfig) else None

    @property
    def weights(self) -> str:
        """Return "interpolated" for weights of `vg interpolate` or train.interpolate, "" for others."""
        return "interpolated" if self.content.get("interpolation") is not None else ""

    def settings(self) -> str:
        """Return all that seeds of one experiment share; other checkpoints than those of vg are never grouped."""
        if not isinstance(self.config, RunConfig):
            return f"{self.content['checkpoint']} {self.content['overrides']}"
        config = replace(self.config, train=replace(self.config.train, seed=0, output=""))
        return f"{dump_config(config)} {self.weights}"


def paper_table(folders: Sequence[str | Path], with_published: bool = True) -> PaperTable:
    """Read finished results and make the table; runs whose settings are equal except seed and output share a row.

    Args:
        folders: outputs of `vg eval CHECKPOINT --suite refcoco`, or their benchmark.json.

    Raises:
        ConfigError: results are missing, or cannot be compared: another protocol or partition, a seed twice, or seeds
            of which one lacks a split.
    """
    results = [read_result(Path(folder)) for folder in folders]
    _check_protocols(results)
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.settings(), []).append(result)
    found = {column for result in results for column in result.parts}
    columns = [(key, split) for key, dataset in DATASETS.items() for split in dataset.splits]
    columns = [(key, split) for key, split in columns if any(key == other for other, _ in found)]
    rows = [_row_of_runs(sorted(group, key=lambda result: result.seed or 0)) for group in groups.values()]
    return PaperTable(columns, _published_rows(columns) if with_published else [], rows)


def read_result(folder: Path) -> Result:
    """Read one benchmark.json; raises ConfigError if it is missing or lacks what the table states."""
    path = folder if folder.is_file() else folder / RESULTS
    if not path.is_file() and (found := sorted(folder.glob(f"eval/suite=*/{RESULTS}"))):
        if len(found) > 1:
            listed = " or ".join(str(file.parent) for file in found)
            raise ConfigError(f"{folder} has results of several parts of the suite; give one: {listed}")
        path = found[0]
    if not path.is_file():
        raise ConfigError(f"{folder} has no {RESULTS}: run `vg eval {folder} --suite refcoco` first")
    content = read_json(path, dict)
    if lacking := {"checkpoint", "overrides", "config", "trained_parameters", "model", "parts"} - content.keys():
        raise ConfigError(
            f"{path} lacks {', '.join(sorted(lacking))}: it was not written by vg eval, or is damaged; evaluate "
            "again with `vg eval CHECKPOINT --suite refcoco`"
        )
    parts = {(part["key"], part["split"]): part for part in content["parts"] if METRIC in part}
    if not parts:
        raise ConfigError(f"{path} has no split with {METRIC}; evaluate RefCOCO, RefCOCO+ or RefCOCOg, too")
    return Result(path, content, parse_saved_config(content["config"], str(path)), parts)


def _check_protocols(results: Sequence[Result]) -> None:
    """Raise ConfigError for results of one split with different protocols, or of an unusual partition."""
    first: dict[Column, Result] = {}
    for result in results:
        for (key, split), part in result.parts.items():
            usual = DATASETS[key].partition
            if usual and part.get("partition", usual) != usual:
                raise ConfigError(
                    f"{result.path}: {key} {split} is the split of {part['partition']}, published results have that of "
                    f"{usual}; evaluate on that one"
                )
            other = first.setdefault((key, split), result)
            if part["protocol"] != (protocol := other.parts[key, split]["protocol"]):
                raise ConfigError(
                    f"{key} {split}: {result.path} has the protocol {part['protocol']!r}, {other.path} {protocol!r}; "
                    "evaluate both with one version of vg"
                )


def _row_of_runs(group: Sequence[Result]) -> Row:
    """Make the row of runs that differ by seed, in the order of their seeds."""
    first = group[0]
    for earlier, result in pairwise(group):
        if earlier.seed == result.seed:
            raise ConfigError(f"{earlier.path} and {result.path} are of the same run and seed; give one of them")
    for result in group[1:]:
        if different := [name for name, value in _comparable(result).items() if _comparable(first).get(name) != value]:
            raise ConfigError(
                f"{first.path} and {result.path} differ by seed, but also in {', '.join(different)}; evaluate both on "
                "the same splits in the same way"
            )
    values = {}
    for column, part in first.parts.items():
        scores = [100 * result.parts[column][METRIC] for result in group]
        marks = INCOMPLETE * (part.get("official") == "no") + SEEN * may_have_seen(first.config, *column)
        values[column] = Accuracy(statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else None, marks)
    seeds = tuple(result.seed for result in group if result.seed is not None)
    overrides = [item for item in first.content["overrides"] if item.startswith("model.")]
    return Row(
        method=", ".join(filter(None, [_common_name([result.name for result in group]), first.weights, *overrides])),
        values=values,
        trained=first.content["trained_parameters"],
        total=first.content["model"]["parameters"],
        seeds=seeds,
        **described(first.config),
    )


def _comparable(result: Result) -> dict[str, Any]:
    """Return what must be equal for a mean over seeds."""
    found = {"precision": result.content.get("precision"), "splits": sorted(result.parts)}
    for column, part in result.parts.items():
        found[" ".join(column)] = [part.get(name) for name in ("data", "num_expressions", "num_skipped", "official")]
    return found


def _common_name(names: Sequence[str]) -> str:
    """Return what the names of folders begin with: ["mine_10", "mine_11"] -> "mine", whole numbers only."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in same)
    if any(name[len(common) :][:1].isdigit() for name in names):
        common = common.rstrip("0123456789")
    return (common.rstrip("-_. ") if len(names) > 1 else "") or names[0]


def _published_rows(columns: Sequence[Column]) -> list[Row]:
    """Return the methods of published.yaml that have a result in any of the columns."""
    rows = []
    for method in published()["methods"]:
        scores = {(key, split): method[key][split] for key, split in columns if split in method.get(key, {})}
        if not scores:
            continue
        digits = max(len(str(score).partition(".")[2]) for score in scores.values())  # as published
        about = {name: str(value) for name, value in method.get("about", {}).items()}
        rows.append(
            Row(
                method=method["name"],
                values={column: Accuracy(score, digits=digits) for column, score in scores.items()},
                vision=about.get("vision", ""),
                text=about.get("text", ""),
                resolution=about.get("resolution", ""),
                trained=float(about["trained"]) * MILLION if "trained" in about else None,
                total=float(about["total"]) * MILLION if "total" in about else None,
                training_data=about.get("data", ""),
                extra_data=about.get("extra", ""),
                epochs=about.get("epochs", ""),
                source=f"{method['source']} ({method['note']})" if "note" in method else method["source"],
            )
        )
    return rows
