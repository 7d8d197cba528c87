"""Measure training with the feature cache and with encoders in every step, in expressions per second.

    python scripts/benchmarks/rec_cache.py [--rounds 5] [--threads 1] [--device cuda --precision bf16]
    python scripts/benchmarks/rec_cache.py --data-only [--images 1024] [--batch-size 512] [--threads 1]

DINOv3 ViT-B/16, BGE-small and the published head at full size with random weights, on random images with seven
expressions each. All variants run in turn in one process, one step per round. Prints medians of the rates and ratios.

With --data-only, no network runs: the rates are those at which batches are made on the device, from files and from
features in its memory, over whole epochs in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel

from scripts.benchmarks.machine import machine
from vg.cache.build import build_cache
from vg.config import RunConfig, parse_config
from vg.datasets import training_dataset
from vg.models.encoders import SMALL_VOCABULARY
from vg.training.data import TrainingData, training_sampler
from vg.training.optim import build_optimizer
from vg.types import Batch, EncodedBatch

ENCODERS = {
    "vision": {
        "model_type": "dinov3_vit",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "num_register_tokens": 4,
    },
    "text": {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
}
EXPRESSIONS = ("left circle", "the red star", "big square", "ring near the star", "small blue one", "top", "blue thing")


def write_data(folder: Path, split: str, num_images: int, num_expressions: int) -> None:
    """Write images of COCO's size and an annotation file (JSON lines) with `num_expressions` per image."""
    random = np.random.default_rng(0)
    rows = []
    for image in range(num_images):
        pixels = random.integers(0, 255, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480)).save(folder / f"{split}{image}.jpg")
        for index in range(num_expressions):
            box = [40 * index, 100, 200, 150]
            key = image * num_expressions + index
            row = {"sent": EXPRESSIONS[(image + index) % len(EXPRESSIONS)], "ann_id": key, "bbox": box}
            rows.append(row | {"image_path": f"{split}{image}.jpg"})
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def configured(
    folder: Path, split: str, cache: dict[str, object] | None, options: argparse.Namespace, shared: int = 1
) -> RunConfig:
    source = {"name": "refcoco", "path": str(folder / "data"), "split": split}
    text = {"id": str(folder / "text"), "tokenizer": str(SMALL_VOCABULARY)}
    return parse_config(
        {
            "model": {"name": "rec", "head": options.head, "vision": {"id": str(folder / "vision")}, "text": text},
            "data": {
                "train": source,
                "eval": source,
                "batch_size": options.batch_size,
                "eval_batch_size": 16,
                "workers": options.workers,
                "expressions_per_image": shared,
                "cache": cache,
            },
        }
    )


class Variant:
    """A model, its data and its optimizer, trained one step at a time."""

    def __init__(self, config: RunConfig, options: argparse.Namespace):
        self.device = torch.device(options.device)
        self.precision = options.precision
        self.model = config.model.build().to(self.device).train()
        self.optimizer = build_optimizer(self.model, config.optim)
        self.data = training_dataset(config, self.model, evaluations=[])
        self.order = training_sampler(config, self.data.source)
        self.loader = DataLoader(
            self.data,
            config.data.batch_size,
            sampler=self.order,
            num_workers=config.data.workers,
            drop_last=True,
            collate_fn=self.data.collate,
            persistent_workers=config.data.workers > 0,
        )
        self.batches = self._forever()
        self.rates: list[float] = []  # expressions per second of each step
        self.reading: list[float] = []  # share of each step spent waiting for its batch

    def _forever(self) -> Iterator[Batch | EncodedBatch]:
        epoch = 0
        while True:
            self.order.begin_epoch(epoch)
            yield from self.loader
            epoch += 1

    def step(self, measured: bool) -> None:
        start = time.perf_counter()
        batch = next(self.batches)
        read = time.perf_counter()
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.model(batch)
        loss = torch.stack(list(self.model.loss(output, batch).values())).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()  # waits until the GPU has finished
        end = time.perf_counter()
        if measured:
            self.rates.append(len(batch) / (end - start))
            self.reading.append((read - start) / (end - start))


class DataPath:
    """The training batches of a run as its trainer gets them, without the network."""

    def __init__(self, config: RunConfig):
        start = time.perf_counter()
        self.data = TrainingData(config, config.model.build(), Accelerator(), evaluations=[])
        self.seconds_to_load = time.perf_counter() - start
        self.rates: list[float] = []  # expressions per second of each epoch
        self.rates_of_core: list[float] = []  # the same per second of CPU time, which other programs change less
        self.epoch = 0

    def run_epoch(self, measured: bool) -> None:
        start, cpu, count = time.perf_counter(), time.process_time(), 0
        for (batch,) in self.data.steps(self.epoch, 0):
            count += len(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.epoch += 1
        if measured:
            self.rates.append(count / (time.perf_counter() - start))
            self.rates_of_core.append(count / (time.process_time() - cpu))


def measure_data(folder: Path, options: argparse.Namespace) -> None:
    """Print the rates of the data path, by where the features are and how many expressions share an image."""
    write_data(folder / "data", "train", options.images, len(EXPRESSIONS))
    write_data(folder / "data", "val", 1, 1)
    for encoder, settings in ENCODERS.items():  # one layer: features of the same shape, soon written
        config = AutoConfig.for_model(**settings | {"num_hidden_layers": 1})
        AutoModel.from_config(config).save_pretrained(folder / encoder)
    options.workers = 0
    build_cache(configured(folder, "train", {"folder": str(folder / "cache")}, options))
    running: dict[str, DataPath] = {}
    for shared in (1, len(EXPRESSIONS)):
        for resident, workers in ((False, 0), (False, 2), (True, 0)):
            options.workers = workers
            config = configured(
                folder, "train", {"folder": str(folder / "cache"), "resident": resident}, options, shared
            )
            place = "in memory" if resident else f"files, {workers} data workers"
            running[f"{place}, {shared} of an image together"] = DataPath(config)
    for round_index in range(-1, options.rounds):  # the first round warms up
        for data_path in running.values():
            data_path.run_epoch(measured=round_index >= 0)
    for title, data_path in running.items():
        rates = data_path.rates
        text = f"{statistics.median(rates):9,.0f} expressions/s ({min(rates):,.0f} to {max(rates):,.0f})"
        core = f"{statistics.median(data_path.rates_of_core):9,.0f} per second of CPU time of the main process"
        print(f"{title:45} {text}, {core}; loaded in {data_path.seconds_to_load:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="expressions per batch (default: 32, with --data-only 512)")
    parser.add_argument("--head", default="pooled", help="pooled or dense (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="bf16 is autocast")
    parser.add_argument("--data-only", action="store_true", help="measure how fast batches are made, without a network")
    parser.add_argument("--images", type=int, default=1024, help="of --data-only (default: %(default)s)")
    options = parser.parse_args()
    options.batch_size = options.batch_size or (512 if options.data_only else 32)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine(options.device)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        if options.data_only:
            return measure_data(folder, options)
        write_data(folder / "data", "train", 2 * options.batch_size, 1)  # no batch contains an image twice
        write_data(folder / "data", "val", max(1, options.batch_size // 2), len(EXPRESSIONS))
        for encoder, settings in ENCODERS.items():
            AutoModel.from_config(AutoConfig.for_model(**settings)).save_pretrained(folder / encoder)
        cache = {"folder": str(folder / "cache")}
        configs = {
            "encoders in every step": configured(folder, "train", None, options),
            "cache": configured(folder, "train", cache, options),
            "cache, expressions share images": configured(folder, "val", cache, options, shared=7),
        }
        start = time.perf_counter()
        for config in list(configs.values())[1:]:
            build_cache(config)
        print(f"the caches were built in {time.perf_counter() - start:.0f} s", flush=True)
        running = {title: Variant(config, options) for title, config in configs.items()}
        for round_index in range(-1, options.rounds):  # the first round warms up
            for variant in running.values():
                variant.step(measured=round_index >= 0)

    first = next(iter(running.values())).rates
    for title, variant in running.items():
        ratio = statistics.median(rate / base for rate, base in zip(variant.rates, first, strict=True))
        rate, waiting = statistics.median(variant.rates), statistics.median(variant.reading)
        rates = f"{rate:8.1f} expressions/s ({min(variant.rates):.1f} to {max(variant.rates):.1f})"
        print(f"{title:34} {rates}, {ratio:5.1f}x, waiting for batches {waiting:.1%} of the time")


if __name__ == "__main__":
    main()
