"""Measure what the settings of `vg train` save on a CPU: seconds and page faults of a training step.

    python scripts/benchmarks/cpu_settings.py [--side 640] [--images 1] [--rounds 5] [--threads 2] [--only ROW ...]

A training step of Grounding DINO (Swin-T, BERT, random weights), in processes that take turns: of transformers and vg
with the settings of torch and the C library, of vg with freed memory kept for other tensors
(vg.machine.reuse_freed_memory), and of both also with matrix products of oneDNN (vg.machine.use_fast_products), which
changes something on CPUs of AMD only. Medians after one warm-up step. A process needs up to 5 GiB, or 9 at two images.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from typing import NamedTuple

from scripts.benchmarks.machine import machine

KEPT, ONEDNN = ", freed memory kept", ", freed memory kept, products of oneDNN"
ROWS = ("transformers", "transformers" + ONEDNN, "vg", "vg" + KEPT, "vg" + ONEDNN)


class Step(NamedTuple):
    seconds: float
    system_seconds: float  # of all threads, in the kernel of the system
    page_faults: int
    peak_gib: float  # resident, of the process so far


def serve(options: argparse.Namespace) -> None:
    """Run a step for every line of standard input, and print what it took."""
    from vg.machine import reuse_freed_memory, use_fast_products

    if options.serve.endswith((KEPT, ONEDNN)):
        reuse_freed_memory()
    if options.serve.endswith(ONEDNN):
        use_fast_products()
    import resource
    import time

    import torch
    from transformers import GroundingDinoConfig

    from scripts.benchmarks.grounding_dino import Case, model_of_transformers, model_of_vg
    from scripts.benchmarks.training_step import (
        SETTINGS,
        Contender,
        call,
        loss_of_transformers,
        loss_of_vg,
        optimizer_of,
    )

    torch.set_num_threads(options.threads)
    model = theirs = model_of_transformers(GroundingDinoConfig(auxiliary_loss=True))
    loss = loss_of_transformers
    if options.serve.startswith("vg"):
        model, loss = model_of_vg(theirs), loss_of_vg
        model.config.loss = SETTINGS
    del theirs
    step = call(Case(options.images, 3, size=(options.side,) * 2), Contender(model, loss, optimizer_of(model)))
    for _ in sys.stdin:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        step()
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        faults = after.ru_minflt - before.ru_minflt
        print(seconds, after.ru_stime - before.ru_stime, faults, after.ru_maxrss / 2**20, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=640, help="of the images, in pixels")
    parser.add_argument("--images", type=int, default=1, help="batch size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="(default: all)")
    parser.add_argument("--serve", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    machine("cpu")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = {
        row: subprocess.Popen([sys.executable, *sys.argv, "--serve", row], **pipes)  # type: ignore[call-overload]
        for row in options.only
    }
    steps: dict[str, list[Step]] = {row: [] for row in options.only}
    for _ in range(options.rounds + 1):
        for row, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            if not (line := process.stdout.readline()):
                sys.exit(f"the process of {row!r} has ended, probably for lack of memory: use --only for fewer rows")
            seconds, system, faults, peak = line.split()
            steps[row].append(Step(float(seconds), float(system), int(faults), float(peak)))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    print("| | s per step (range) | of this in the system | page faults | peak GiB |\n|---|---|---|---|---|")
    for row, measured in steps.items():
        timed = measured[1:]
        times = [step.seconds for step in timed]
        middle = Step(*(statistics.median(column) for column in zip(*timed, strict=True)))
        print(
            f"| {row} | {middle.seconds:.1f} ({min(times):.1f} to {max(times):.1f}) | {middle.system_seconds:.1f} "
            f"| {middle.page_faults:,.0f} | {middle.peak_gib:.1f} |"
        )


if __name__ == "__main__":
    main()
