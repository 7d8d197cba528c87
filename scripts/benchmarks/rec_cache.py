"""What the feature cache saves: training from it against encoders that run in every step, in expressions per second.

    python scripts/benchmarks/rec_cache.py [--rounds 5] [--threads 1] [--device cuda --precision bf16]

DINOv3 ViT-B/16, BGE-small and the published head at their full sizes with random weights, on random pictures with
seven expressions each. All ways run in turn in one process, one step of every way in each round; medians are printed,
those of the ratios too.
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
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel

from vg.cache.build import build_cache
from vg.cache.datasets import training_dataset
from vg.config import RunConfig, parse_config
from vg.models.encoders import SMALL_VOCABULARY
from vg.training.data import training_sampler
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


def write_data(folder: Path, split: str, num_pictures: int, num_expressions: int) -> None:
    """Pictures of COCO's size with so many expressions each, as json lines."""
    random = np.random.default_rng(0)
    rows = []
    for picture in range(num_pictures):
        pixels = random.integers(0, 255, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480)).save(folder / f"{split}{picture}.jpg")
        for place in range(num_expressions):
            box = [40 * place, 100, 200, 150]
            key = picture * num_expressions + place
            row = {"sent": EXPRESSIONS[(picture + place) % len(EXPRESSIONS)], "ann_id": key, "bbox": box}
            rows.append(row | {"image_path": f"{split}{picture}.jpg"})
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def configured(folder: Path, split: str, cache: dict[str, object] | None, options: argparse.Namespace) -> RunConfig:
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
                "cache": cache,
            },
        }
    )


class Way:
    """One way of training, step by step."""

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
        self.reading: list[float] = []  # share of each step until its batch is there

    def _forever(self) -> Iterator[Batch | EncodedBatch]:
        epoch = 0
        while True:
            self.order.begin_epoch(epoch)
            yield from self.loader
            epoch += 1

    def step(self, counts: bool) -> None:
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
        loss.item()  # a GPU has finished then
        end = time.perf_counter()
        if counts:
            self.rates.append(len(batch) / (end - start))
            self.reading.append((read - start) / (end - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="expressions (default: %(default)s)")
    parser.add_argument("--head", default="pooled")
    parser.add_argument("--threads", type=int, help="of torch (default: all cores)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write_data(folder / "data", "train", 2 * options.batch_size, 1)  # no batch has a picture twice
        write_data(folder / "data", "val", max(1, options.batch_size // 2), len(EXPRESSIONS))
        for encoder, settings in ENCODERS.items():
            AutoModel.from_config(AutoConfig.for_model(**settings)).save_pretrained(folder / encoder)
        cache = {"folder": str(folder / "cache")}
        ways = {
            "encoders in every step": configured(folder, "train", None, options),
            "cache": configured(folder, "train", cache, options),
            "cache, expressions share pictures": configured(
                folder, "val", cache | {"expressions_per_image": 7}, options
            ),
        }
        start = time.perf_counter()
        for config in list(ways.values())[1:]:
            build_cache(config)
        print(f"the caches were written in {time.perf_counter() - start:.0f} s", flush=True)
        running = {title: Way(config, options) for title, config in ways.items()}
        for number in range(-1, options.rounds):  # the first one warms up
            for way in running.values():
                way.step(counts=number >= 0)

    first = next(iter(running.values())).rates
    for title, way in running.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(way.rates, first, strict=True))
        rates = f"{statistics.median(way.rates):8.1f} expressions/s ({min(way.rates):.1f} to {max(way.rates):.1f})"
        print(
            f"{title:34} {rates}, {ratio:5.1f}x, waits for its batch {statistics.median(way.reading):.1%} of the time"
        )


if __name__ == "__main__":
    main()
