"""Measure exported models beside the model in PyTorch: milliseconds per batch of images.

    python scripts/benchmarks/onnx_export.py CHECKPOINT MODEL.onnx... [--rounds 7] [--threads 2] [--phrases 3]
        [--size 480 640] [--batch 1]

All contenders process the same images of noise in turn, in one process, with preparation of images and prompts. Prints
medians, and the speed relative to PyTorch. A prompt that repeats is encoded once by PyTorch and by split files.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.benchmarks.machine import machine
from vg.inference.load import load_model
from vg.inference.onnx_backend import OnnxBackend
from vg.inference.torch_backend import TorchBackend


def measure(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each contender; they alternate, after a round that is not measured."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def call(
    backend: TorchBackend | OnnxBackend, images: list[np.ndarray], phrases: tuple[str, ...]
) -> Callable[[], object]:
    def run() -> object:
        prepared: Any = backend.prepare(images, [phrases] * len(images))
        return backend.predict(prepared)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and of ONNX Runtime")
    parser.add_argument("--phrases", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine("cpu")
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*options.size, 3), dtype=np.uint8) for _ in range(options.batch)]
    words = [
        f"{color} {shape}" for color in ("red", "green", "blue", "small", "big") for shape in ("dog", "cat", "box")
    ]
    phrases = tuple(f"{word} {index // len(words)}" for index, word in enumerate(words * 10))[: options.phrases]
    torch_backend = TorchBackend(load_model(options.checkpoint), "cpu")
    backends: dict[str, TorchBackend | OnnxBackend] = {"torch": torch_backend}
    backends |= {path.name: OnnxBackend(path, threads=options.threads) for path in options.models}
    medians = measure({name: call(backend, images, phrases) for name, backend in backends.items()}, options.rounds)
    for name, seconds in medians.items():
        print(f"{name:24s} {1000 * seconds:9.1f} ms   {medians['torch'] / seconds:.2f}x")


if __name__ == "__main__":
    main()
