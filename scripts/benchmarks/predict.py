"""Measure what `vg.Grounder` costs beyond the network: one image, many phrases, and a folder of images.

    python scripts/benchmarks/predict.py [--side 800] [--rounds 5] [--threads 2]

A full-size Grounding DINO (Swin-T, BERT) with random weights on images of noise; nothing is downloaded. The contenders
of a row run in turn in one process after one warm-up call each, and the median of the ratios is reported.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import GroundingDinoConfig

import vg
from scripts.benchmarks.grounding_dino import model_of_transformers, model_of_vg
from scripts.benchmarks.machine import machine

WORDS = [f"word{number}" for number in range(3000, 3080)]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(rounds: int, first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float, float]:
    """Return the median seconds of both and the median of first / second."""
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=800, help="shorter side of the resized image in pixels")
    parser.add_argument("--images", type=int, default=32, help="images in the folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine("cpu")

    model = model_of_vg(model_of_transformers(GroundingDinoConfig()))
    model.config.image.shortest, model.config.image.longest = options.side, round(options.side * 1333 / 800)
    grounder = vg.Grounder(model, "cpu")
    backend = grounder.backend
    random = np.random.default_rng(0)
    image = random.integers(0, 255, (480, 640, 3), np.uint8)

    @torch.no_grad()
    def network(phrases: list[str]) -> None:
        """Preprocessing and network only."""
        batch = backend.prepare([image], [tuple(phrases)]).batch
        model(batch)

    rows = {}
    rows["one image, one phrase: Grounder / preprocessing and network"] = ratios(
        options.rounds, lambda: grounder(image, WORDS[:1]), lambda: network(WORDS[:1])
    )
    rows["one image, 80 phrases: Grounder / preprocessing and network"] = ratios(
        options.rounds, lambda: grounder(image, WORDS), lambda: network(WORDS)
    )
    rows["80 phrases / 1 phrase"] = ratios(
        options.rounds, lambda: grounder(image, WORDS), lambda: grounder(image, WORDS[:1])
    )
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.images):
            Image.fromarray(random.integers(0, 255, (480, 640, 3), np.uint8)).save(Path(folder, f"{number:03d}.jpg"))
        pixels = [np.asarray(Image.open(file)) for file in sorted(Path(folder).iterdir())]
        batches = [backend.prepare(pixels[i : i + 8], [("word3000",)] * 8) for i in range(0, options.images, 8)]
        rows[f"{options.images} images: a folder / prepared batches"] = ratios(
            max(1, options.rounds // 2),
            lambda: list(grounder(folder, WORDS[:1])),
            lambda: [backend.predict(batch) for batch in batches],
        )
    print("| row | s | s | ratio |\n|---|---:|---:|---:|")
    for name, (first, second, ratio) in rows.items():
        print(f"| {name} | {first:.2f} | {second:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
