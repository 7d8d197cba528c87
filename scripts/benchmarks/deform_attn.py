"""Measure deformable attention: our kernels, the reference and every other implementation that is installed.

    python scripts/benchmarks/deform_attn.py [--device cpu] [--threads 2] [--only encoder ...]

Every contender is first compared with the reference in double precision. The contenders then run in turn in one
process, so other load affects all of them, with a warm-up call before each measured call; medians are reported.
"core" starts from locations and weights, "module" from the outputs of the projections: offsets, logits and reference
points.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks.deform_attn_contenders import Case, Contender, contenders, ours
from scripts.benchmarks.machine import machine
from vg.ops import reference

HEADS, CHANNELS, POINTS, DECODER_QUERIES = 8, 32, 4, 900  # of Grounding DINO
LEVELS = {
    "800x1333": ((100, 167), (50, 84), (25, 42), (13, 21)),
    "640x640": ((80, 80), (40, 40), (20, 20), (10, 10)),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {
    torch.float32: 3e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 3e-2,
}  # of our kernels, relative to largest entry
MIN_ROUNDS = 3
SLEEP_CYCLES = 10_000_000  # 5 to 7 ms, more than Python needs to launch the kernels of a call


# ---- inputs -------------------------------------------------------------------------------------------------------


def cases(device: str, batch: int, dtypes: list[str]) -> Iterator[Case]:
    for size, shapes in LEVELS.items():
        for role in ("encoder", "decoder"):
            generator = torch.Generator().manual_seed(0)
            pixels = sum(height * width for height, width in shapes)
            queries = pixels if role == "encoder" else DECODER_QUERIES

            def normal(*sizes: int, generator: torch.Generator = generator) -> Tensor:
                return torch.randn(*sizes, generator=generator).to(device)

            # Encoder: normal offsets of 2 pixels around every pixel. Decoder: random boxes.
            points = grid(shapes).expand(batch, -1, -1)
            if role == "decoder":
                points = torch.rand(batch, queries, 4, generator=generator) * 0.5 + torch.tensor([0.25, 0.25, 0, 0])
            points = points[:, :, None].contiguous().to(device)  # [B, Q, 1, 2 | 4]
            value = normal(batch, pixels, HEADS, CHANNELS)
            offsets = normal(batch, queries, HEADS, len(shapes), POINTS, 2) * 2
            logits = normal(batch, queries, HEADS, len(shapes) * POINTS)
            grad = normal(batch, queries, HEADS * CHANNELS)
            for name in dtypes:
                dtype = DTYPES[name]
                inputs = (value.to(dtype), offsets, logits)
                module = Case(f"{size} {role} module {name}", shapes, points, inputs, grad.to(dtype), True)
                core = tuple(x.contiguous() for x in module.prepared(*inputs))
                yield replace(module, name=f"{size} {role} core {name}", inputs=core, module=False)
                yield module


def grid(shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """Return the centers (x, y) of all pixels of all levels, [1, S, 2]."""
    levels = [
        torch.cartesian_prod((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width).flip(-1)
        for height, width in shapes
    ]
    return torch.cat(levels)[None]


# ---- measuring ----------------------------------------------------------------------------------------------------


def error_of(case: Case, contender: Contender) -> float:
    """Return the largest difference from the reference in double precision, relative to its largest entry."""
    exact = replace(case, points=case.points.double())
    doubles = exact.prepared(*(x.double() for x in case.inputs))
    expected = reference.forward(doubles[0], case.shapes, *doubles[1:])
    with torch.no_grad():
        found = contender(case, *case.inputs)
    return float((found.double() - expected).abs().max() / expected.abs().max())


def call(case: Case, contender: Contender, backward: bool) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return contender(case, *case.inputs)

    def both() -> object:
        leaves = [x.detach().requires_grad_() for x in case.inputs]
        return torch.autograd.grad(contender(case, *leaves), leaves, case.grad)

    return both if backward else forward


class Clock:
    """Measures milliseconds and bytes of a call on a device."""

    def __init__(self, device: str, cpu_time: bool) -> None:
        self.cuda = device == "cuda"
        self.now = time.process_time if cpu_time else time.perf_counter
        self.l2 = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if self.cuda else None

    def milliseconds(self, run: Callable[[], object], cold: bool = False) -> float:
        """Measure a call after a warm-up call; `cold` (CUDA) clears the L2 cache first, as other layers would.

        The GPU waits until all kernels of the call are queued, because launching them takes longer than running them.
        """
        run()
        if self.l2 is None:
            start = self.now()
            run()
            return (self.now() - start) * 1e3
        if cold:
            self.l2.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Return the peak memory during the call above the memory before it."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return torch.cuda.max_memory_allocated() - before
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is kept would hide allocations
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = _status("VmRSS")
            run()
            return _status("VmHWM") - before
        except OSError:  # not Linux
            return None


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def measure(
    case: Case, backward: bool, all_contenders: dict[str, Contender], clock: Clock, budget: float
) -> list[dict]:
    runs, rows = {}, {}
    for name, contender in all_contenders.items():
        row: dict[str, Any] = {"case": case.name, "pass": "forward + backward" if backward else "forward"}
        try:
            row["error"] = error_of(case, contender)
            runs[name] = call(case, contender, backward)
            row["peak_bytes"] = clock.peak_bytes(runs[name])
        except Exception as error:  # other contenders may fail, ours may not
            if contender is ours:
                raise
            print(f"{case.name}: {name} fails: {str(error).splitlines()[0][:100]}")
            runs.pop(name, None)
            continue
        if contender is ours and not row["error"] <= (limit := TOLERANCE[case.inputs[0].dtype]):  # also for NaN
            row["fault"] = f"{case.name}: {name} is wrong: relative error {row['error']:.1e}, allowed {limit:.0e}"
        rows[name] = {**row, "contender": name}
    times: dict[tuple[str, bool], list[float]] = {(name, cold): [] for name in runs for cold in {False, clock.cuda}}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < MIN_ROUNDS or time.perf_counter() - start < budget:
        for name, cold in times:
            times[name, cold].append(clock.milliseconds(runs[name], cold))
    for name, row in rows.items():
        row["milliseconds"] = statistics.median(times[name, False])
        row["rounds"] = len(times[name, False])
        if clock.cuda:
            row["milliseconds_cold"] = statistics.median(times[name, True])
    return list(rows.values())


# ---- output -------------------------------------------------------------------------------------------------------


def print_table(rows: list[dict[str, Any]], baseline: str) -> None:
    base = next((row for row in rows if row["contender"] == baseline), rows[0])
    for row in rows:
        cold = f"{row['milliseconds_cold']:10.3f} cold" if "milliseconds_cold" in row else ""
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:8.0f} MiB"
        print(
            f"{row['case']:38} {row['pass']:19} {row['contender']:25} {row['milliseconds']:10.3f} ms{cold} "
            f"{base['milliseconds'] / row['milliseconds']:6.1f}x {peak}  error {row['error']:.0e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--batch", type=int, default=1, help="batch size (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose names contain all words")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="skip these contenders")
    parser.add_argument("--seconds", type=float, default=2.0, help="per case, after its first 3 rounds")
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time: for a busy machine and one thread")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    about = machine(options.device)
    everyone = {name: run for name, run in contenders(options.device).items() if name not in options.without}
    baseline = "official" if "official" in everyone else "transformers"
    print(f"ratios: speed relative to {baseline}; memory: peak during the call above the memory before it")
    clock, results = Clock(options.device, options.cpu_time), []
    for case in cases(options.device, options.batch, options.dtypes):
        if not all(word in case.name.split() for word in options.only):
            continue
        for backward in (False, True):
            rows = measure(case, backward, everyone, clock, options.seconds)
            print_table(rows, baseline)
            results += rows
            if options.json:  # after each case, so an interrupted run keeps its results
                options.json.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    if faults := [row["fault"] for row in results if "fault" in row]:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
