"""Measure the speedup of vg.ops.patch_transformers(): Grounding DINO of transformers with its operator and with ours.

    python scripts/benchmarks/patch_transformers.py [--threads 2] [--rounds 5] [--size 800 1066]

Full size (Swin-T, BERT) with random weights, batch 1, forward pass; nothing is downloaded. The outputs are compared
first. Both then run in turn in one process, and medians are reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

from scripts.benchmarks.machine import machine
from vg.ops import backend_info, patch_transformers

TOKENS = [101, 1037, 4937, 1012, 1037, 6556, 2491, 1012, 102]  # "a cat. a remote control."
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=5, help="measured calls of each (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    machine(options.device)

    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(GroundingDinoConfig()).eval().to(options.device)
    tokens = torch.tensor([TOKENS], device=options.device)
    images = torch.randn(1, 3, *options.size, device=options.device)

    def run(patched: bool) -> tuple[float, torch.Tensor]:
        with patch_transformers() if patched else nullcontext(), torch.no_grad():
            start = time.perf_counter()
            output = model(pixel_values=images, input_ids=tokens, attention_mask=torch.ones_like(tokens))
            if options.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start, output.encoder_last_hidden_state_vision

    print(f"operator: {backend_info()[options.device].name}, {torch.get_num_threads()} threads")
    # Of the encoder only: the decoder may start from other queries if two scores are almost equal.
    difference = float((run(True)[1] - run(False)[1]).abs().max())
    print(f"largest difference of the encoder's output: {difference:.1e}")
    if not difference < TOLERANCE:
        raise SystemExit(f"the outputs differ by more than {TOLERANCE}")
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.rounds):
        for patched in seconds:
            seconds[patched].append(run(patched)[0])
    theirs, ours = (statistics.median(values) for values in seconds.values())
    ratios = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
    print(f"transformers {theirs:.2f} s, patched {ours:.2f} s: {statistics.median(ratios):.2f} times as fast")


if __name__ == "__main__":
    main()
