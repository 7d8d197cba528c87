"""The numbers of an evaluation as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vg.metrics.average_precision import UNDEFINED


def table(results: Mapping[str, Any]) -> str:
    """All numbers of an evaluation: of several sets side by side, then of each set with its kinds or categories."""
    sets = by_set(results)
    tables = [_set_table(numbers) for numbers in sets]
    return "\n\n".join([_side_by_side(sets), *tables] if len(sets) > 1 else tables)


def by_set(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Flat results of `Evaluator.run` -> those of each set, without its name before the keys."""
    others = [key.removesuffix("/protocol") for key in results if key.endswith("/protocol")]
    sets: dict[str, dict[str, Any]] = {name: {} for name in ("", *others)}
    for key, value in results.items():
        name = next((name for name in others if key.startswith(f"{name}/")), "")
        sets[name][key.removeprefix(f"{name}/") if name else key] = value
    return list(sets.values())


def _side_by_side(sets: Sequence[Mapping[str, Any]]) -> str:
    """A row for each number, a column for each set."""
    names = list({key: None for numbers in sets for key in numbers if "/" not in key and _is_number(numbers[key])})
    titles = [str(numbers["set"]) for numbers in sets]
    widths = [max(9, len(title)) for title in titles]
    label = max(map(len, names))
    rows = [[f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)]]
    rows += [[f"{_cell(each.get(name)):>{width}}" for each, width in zip(sets, widths, strict=True)] for name in names]
    return "\n".join(" ".join((f"{name:<{label}}", *row)) for name, row in zip(("", *names), rows, strict=True))


def _set_table(results: Mapping[str, Any]) -> str:
    """What it is about, a row for all samples and one for each kind or category, and the numbers only all samples have.

    Categories come best first, kinds in the order of their names.
    """
    numbers = {key: value for key, value in results.items() if _is_number(value)}
    parts: dict[str, dict[str, Any]] = {"all": {key: value for key, value in numbers.items() if "/" not in key}}
    for key, value in numbers.items():
        kind, _, name = key.rpartition("/")
        if kind:
            parts.setdefault(kind, {})[name] = value
    everything = parts.pop("all")
    kinds = sorted(parts, key=lambda kind: (-parts[kind].get("ap", 0.0), kind))
    shared = [name for name in everything if not parts or any(name in part for part in parts.values())]
    width = max(map(len, ("all", *kinds)))
    lines = [" ".join((" " * width, *(f"{name.removeprefix('num_'):>11}" for name in shared)))]
    for kind in ("all", *kinds):
        part = everything if kind == "all" else parts[kind]
        lines.append(" ".join((f"{kind:<{width}}", *(f"{_cell(part.get(name)):>11}" for name in shared))))
    rest = [f"{name} {_cell(value)}" for name, value in everything.items() if name not in shared]
    lines += [", ".join(rest[start : start + 6]) for start in range(0, len(rest), 6)]
    split = " ".join([*([results["partition"]] if "partition" in results else []), results["split"]])
    remark = ", not the whole official split" if results.get("official") == "no" else ""
    title = f"{results['data']}, {split}{remark} ({results['protocol']})"
    return "\n".join([f"{results['set']}: {title}" if "set" in results else title, *lines])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _cell(value: float | None) -> str:
    """Counts as they are, shares with four decimals, and a dash where there is none."""
    if value is None or value == UNDEFINED:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
