"""Measure what the settings of `vg train` save on a CPU: seconds and page faults of a training step.

    python scripts/benchmarks/cpu_settings.py [--side 640] [--images 1] [--rounds 5] [--threads 2]

A training step of Grounding DINO (Swin-T, BERT, random weights) in three processes that take turns: with the settings
of torch and the C library, with freed memory kept for other tensors (vg.machine.reuse_freed_memory), and also with
matrix products of oneDNN (vg.machine.use_fast_products), which changes something on CPUs of AMD only. Medians after one
warm-up step.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from typing import NamedTuple

MODES = ("torch and C library", "freed memory kept", "and products of oneDNN")


class Step(NamedTuple):
    seconds: float
    system_seconds: float  # of all threads, in the kernel of the system
    page_faults: int
    peak_gib: float  # resident, of the process so far


def serve(options: argparse.Namespace) -> None:
    """Run a step for every line of standard input, and print what it took."""
    from vg.machine import reuse_freed_memory, use_fast_products

    if options.mode != MODES[0]:
        reuse_freed_memory()
    if options.mode == MODES[2]:
        use_fast_products()
    import resource
    import time

    import torch
    from transformers import GroundingDinoConfig

    from scripts.benchmarks.grounding_dino import Case, model_of_transformers, model_of_vg
    from scripts.benchmarks.training_step import SETTINGS, Contender, call, loss_of_vg, optimizer_of

    torch.set_num_threads(options.threads)
    model = model_of_vg(model_of_transformers(GroundingDinoConfig()))
    model.config.loss = SETTINGS
    step = call(
        Case(options.images, 3, size=(options.side, options.side)), Contender(model, loss_of_vg, optimizer_of(model))
    )
    for _ in sys.stdin:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        step()
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        faults = after.ru_minflt - before.ru_minflt
        print(seconds, after.ru_stime - before.ru_stime, faults, after.ru_maxrss / 2**20, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=640, help="of the images, in pixels")
    parser.add_argument("--images", type=int, default=1, help="batch size; a process needs 8 GiB at 2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        return serve(options)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = {
        mode: subprocess.Popen([sys.executable, *sys.argv, "--mode", mode], **pipes)  # type: ignore[call-overload]
        for mode in MODES
    }
    steps: dict[str, list[Step]] = {mode: [] for mode in MODES}
    for _ in range(options.rounds + 1):
        for mode, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            seconds, system, faults, peak = process.stdout.readline().split()
            steps[mode].append(Step(float(seconds), float(system), int(faults), float(peak)))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    print("| settings | s per step (range) | of this in the system | page faults | peak GiB |\n|---|---|---|---|---|")
    for mode, measured in steps.items():
        timed = measured[1:]
        times = [step.seconds for step in timed]
        middle = Step(*(statistics.median(column) for column in zip(*timed, strict=True)))
        print(
            f"| {mode} | {middle.seconds:.1f} ({min(times):.1f} to {max(times):.1f}) | {middle.system_seconds:.1f} "
            f"| {middle.page_faults:,.0f} | {middle.peak_gib:.1f} |"
        )


if __name__ == "__main__":
    main()
