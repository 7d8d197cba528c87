"""Find up to how many tokens attention on a CPU of AMD is faster as two products of oneDNN (vg.machine.SHORT).

    python scripts/benchmarks/short_attention.py [--tokens 25 50 75 100 128 200] [--threads 2] [--rounds 40]

Attention with a mask of the keys, forward and backward, 4 heads of 32 channels, about 2,400 tokens in all as in a step
of the demo; medians of calls that alternate. Other CPUs use neither.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.benchmarks.machine import machine
from vg.machine import _short_attention, reuse_freed_memory, use_fast_products

HEADS, CHANNELS, TOKENS = 4, 32, 2400


def milliseconds(attention: Callable[..., Tensor], inputs: list[Tensor], mask: Tensor) -> float:
    """Time one forward and backward pass."""
    start = time.perf_counter()
    query, key, value = (x.transpose(1, 2) for x in inputs)
    attended = attention(query, key, value, mask)
    torch.autograd.grad(attended.sum(), inputs)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[25, 50, 75, 100, 128, 200])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    reuse_freed_memory()
    torch.set_num_threads(options.threads)
    if not use_fast_products():
        raise SystemExit("this CPU does not use oneDNN, see vg.machine.use_fast_products")
    # `scale` makes vg leave this to torch; it is the default.
    contenders = {
        "torch, blocks of MKL": lambda q, k, v, mask: F.scaled_dot_product_attention(
            q, k, v, mask, scale=CHANNELS**-0.5
        ),
        "products of oneDNN": _short_attention,
    }
    machine("cpu")
    print("| tokens | " + " | ".join(f"{name}, ms" for name in contenders) + " |\n|---|---|---|")
    for tokens in options.tokens:
        batch = TOKENS // tokens
        inputs = [torch.randn(batch, tokens, HEADS, CHANNELS, requires_grad=True) for _ in range(3)]
        mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, attention in contenders.items():
                times[name].append(milliseconds(attention, inputs, mask))
        medians = [statistics.median(values[2:]) for values in times.values()]
        print(f"| {batch} x {tokens} | " + " | ".join(f"{value:.2f}" for value in medians) + " |", flush=True)


if __name__ == "__main__":
    main()
