"""Tables of the results of gpu_check.py for scripts/benchmarks/README.md: estimates beside measured values."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

Found = dict[str, dict[str, Any]]  # results by section
SIZE = "800x1333"
PEERS = ("transformers", "official", "msda-triton")

# Microseconds of a layer, H100 or H200, by counts and not measured: if L1 hits are as simulated, and if they are not.
OP_ESTIMATES = {
    ("encoder", "bfloat16", "forward"): "45-60",
    ("encoder", "float32", "forward"): "65-110 (official: 350-450)",
    ("encoder", "bfloat16", "forward + backward"): "395-660",
    ("encoder", "float32", "forward + backward"): "445-660 (official: 2350-3950)",
}
STEP_ESTIMATES = {"transformers": "230-300", "vg": "105-125"}  # milliseconds


def summary(found: Found) -> str:
    """Return one row per section: whether it passed, and what it found besides measurements."""
    rows = []
    for name, result in found.items():
        shown = {k: v for k, v in result.items() if k not in ("passed", "section_seconds", "measured")}
        words = re.sub(r"\s+", " ", ", ".join(f"{k} {v}" for k, v in shown.items())).replace("|", "/")
        passed = {True: "yes", False: "NO", None: "skipped"}[result["passed"]]
        rows.append([name, passed, result["section_seconds"], words[:600]])
    return _table(["section", "passed", "seconds", "found"], rows)


def measurements(found: Found) -> str:
    """Return the tables of operator, forward pass, CUDA graph and training step; what was not measured is empty."""
    return "\n\n".join((_operator(found), _forward(found), _graphs(found), _training(found)))


def _operator(found: Found) -> str:
    times = {(row["case"], row["pass"], row["contender"]): row for row in _results(found, "op_benchmark")}
    rows = []
    passes = ("forward", "forward + backward")
    for role, dtype, step in product(("encoder", "decoder"), ("bfloat16", "float32"), passes):
        case = f"{SIZE} {role} core {dtype}"
        ours = times.get((case, step, "vg cuda"), {})
        rows.append(
            [
                f"{role}, {dtype}, {step}",
                OP_ESTIMATES.get((role, dtype, step), ""),
                _number(ours, "milliseconds", 1e3),
                _number(ours, "milliseconds_cold", 1e3),
                *(_number(times.get((case, step, peer), {}), "milliseconds", 1e3) for peer in PEERS),
            ]
        )
    columns = ["layer, microseconds", "vg, estimated", "vg, measured", "vg, cold L2 cache", *PEERS]
    return _table(columns, rows)


def _forward(found: Found) -> str:
    measured = {
        (row["images"], row["phrases"], row["dtype"], row["contender"]): row
        for row in _results(found, "grounding_dino")
        if not row["compiled"]
    }
    rows = []
    for images, phrases, dtype in product((1, 8), (1, 80), ("float32", "bfloat16")):
        theirs, ours, same = (
            measured.get((images, phrases, dtype, name), {})
            for name in ("transformers", "vg, new prompt", "vg, same prompt")
        )
        ratio = f"{theirs['seconds'] / ours['seconds']:.1f}x" if theirs and ours else ""
        memory = (_number(theirs, "peak_bytes", 2**-20), _number(ours, "peak_bytes", 2**-20))
        times = (_number(row, "seconds", 1e3) for row in (theirs, ours, same))
        words = f"{images} images, {phrases} phrases, {dtype}"
        rows.append([words, *times, ratio, " / ".join(memory) if any(memory) else ""])
    columns = ["forward, 800x1066, ms", "transformers", "vg, new prompt", "vg, same prompt", "", "MiB"]
    return _table(columns, rows)


def _graphs(found: Found) -> str:
    measured = {row["contender"]: row for row in _results(found, "cuda_graphs")}
    rows = [[name, _number(measured.get(name, {}), "seconds", 1e3)] for name in ("eager", "CUDA graph")]
    return _table(["network alone, 1 x 800x1066, same prompt, bfloat16", "measured, ms"], rows)


def _training(found: Found) -> str:
    measured = {row["contender"]: row for row in _results(found, "grounding_dino_training")}
    rows = []
    for name in ("transformers", "vg", "vg, checkpointing"):
        row = measured.get(name, {})
        ratio = f"{row['times_as_fast']:.1f}x" if row.get("times_as_fast") else ""
        speed, memory = _number(row, "samples_per_second"), _number(row, "peak_bytes", 2**-20)
        rows.append([name, STEP_ESTIMATES.get(name, ""), _number(row, "seconds", 1e3), speed, ratio, memory])
    columns = [f"training step, 4 x {SIZE}, bfloat16", "estimated, ms", "measured, ms", "samples/s", "", "MiB"]
    return _table(columns, rows)


def _results(found: Found, section: str) -> list[dict[str, Any]]:
    return found.get(section, {}).get("measured", {}).get("results", [])


def _number(row: dict[str, Any], key: str, factor: float = 1) -> str:
    """Return a value with three digits, or more if it is an integer; nothing if it is missing."""
    if row.get(key) is None:
        return ""
    value = row[key] * factor
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell != "---" else cell for cell in line) + "|" for line in lines)
