"""Measure an evaluation without a feature cache, in expressions per second: an image encoded once, and per expression.

    python scripts/benchmarks/rec_evaluation.py [--images 8] [--rounds 3] [--threads 1] [--device cuda]

DINOv3 ViT-B/16, BGE-small and the published head at full size with random weights, on random images with seven
expressions each, as many as RefCOCO has. Both variants evaluate all of them in turn. Prints medians of the rates.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModel

from scripts.benchmarks.machine import machine
from scripts.benchmarks.rec_cache import ENCODERS, EXPRESSIONS, configured, write_data
from vg.data.dataset import GroundingDataset
from vg.datasets import evaluation_dataset
from vg.evaluation.evaluator import DatasetEvaluator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="evaluations of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    options = parser.parse_args()
    options.head, options.batch_size, options.workers = "pooled", 32, 0
    torch.set_num_threads(options.threads)
    machine(options.device)
    accelerator = Accelerator(cpu=options.device == "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write_data(folder / "data", "val", options.images, len(EXPRESSIONS))
        for encoder, settings in ENCODERS.items():
            AutoModel.from_config(AutoConfig.for_model(**settings)).save_pretrained(folder / encoder)
        config = configured(folder, "val", None, options)
        model = config.model.build().to(accelerator.device).eval()
        shared = evaluation_dataset(config.data.train, config.data, model)
        datasets = {
            "an image once per batch": shared,
            "an image per expression": GroundingDataset(shared.source, collate=shared.collate),
        }
        rates: dict[str, list[float]] = {title: [] for title in datasets}
        for _ in range(options.rounds):
            for title, dataset in datasets.items():
                data = config.data
                evaluator = DatasetEvaluator("", dataset, data.eval_batch_size, data.workers, accelerator)
                start = time.perf_counter()
                with torch.no_grad():
                    evaluator.predict(model)
                    evaluator.result()
                rates[title].append(len(dataset) / (time.perf_counter() - start))
    for title, values in rates.items():
        print(f"{title}: {statistics.median(values):.1f} expressions/s ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
