"""Calculate what pretraining of Grounding DINO on millions of images costs: disk, network, CPU cores and GPU days.

    python scripts/benchmarks/pretraining_cost.py FOLDER [CONFIG] [KEY=VALUE ...] [--num-images 20e6] [--gpus 64]

FOLDER has JPEG files that are typical of the data. Measured here: their bytes in a shard, and the CPU time in which one
core reads, decodes, augments and batches an image (one thread, so other work on the machine has little effect).
Counted here: the floating-point operations of matrix products and convolutions in a training step, for images of the
largest size. Calculated: all else, for GPUs that reach a share of their peak; the default is that of the estimated
step in README.md, 105 to 125 ms for 4 images of 800x1333. Not included: deformable sampling, which
is under 1 % of the operations, evaluations, checkpoints and restarts.

An encoder that is not on this machine can be described: 'model.text={id: null, architecture: {model_type: bert}}'.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks.machine import machine
from vg.config import RunConfig, load_config, recipe_path
from vg.data.collate import Collator
from vg.data.detection.odvg import OdvgConfig
from vg.data.shards.write import write_shards
from vg.datasets import training_dataset
from vg.errors import DataError
from vg.models.base import GroundingModel
from vg.types import Sample

PEAK = 989e12  # FLOP/s of an NVIDIA H100 SXM, bfloat16, dense (data sheet)
GPUS_PER_NODE = 8
NUM_CLASSES, BOXES = 365, 13  # of Objects365: classes, and boxes per image
WARM_UP = 8  # images that are not timed
DAY = 86_400  # seconds
TB, GB, KB = 1e12, 1e9, 1e3


def write_dataset(images: list[Path], folder: Path) -> OdvgConfig:
    """Write ODVG lines with random boxes and classes for the images."""
    generator = random.Random(0)
    names = {str(label): f"class {label}" for label in range(NUM_CLASSES)}
    lines = []
    for path in images:
        with Image.open(path) as image:
            width, height = image.size
        boxes = []
        for _ in range(BOXES):
            left, top = generator.uniform(0, 0.7 * width), generator.uniform(0, 0.7 * height)
            label = generator.randrange(NUM_CLASSES)
            box = [left, top, left + 0.25 * width, top + 0.25 * height]
            boxes.append({"bbox": box, "label": label, "category": names[str(label)]})
        line = {"filename": path.name, "height": height, "width": width, "detection": {"instances": boxes}}
        lines.append(json.dumps(line))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "names.json").write_text(json.dumps(names))
    root = str(images[0].parent)
    return OdvgConfig(path=str(folder / "train.jsonl"), label_map=str(folder / "names.json"), image_root=root)


def seconds_per_image(config: RunConfig, model: GroundingModel) -> float:
    """Return the CPU time of one core for an image of a training batch, at the median of the batches."""
    dataset = training_dataset(config, model, [])
    assert dataset.collate is not None
    size, times = config.data.batch_size, []
    for start in range(0, len(dataset) - size + 1, size):
        began = time.process_time()
        dataset.collate([dataset[index] for index in range(start, start + size)])  # type: ignore[misc]
        times.append((time.process_time() - began) / size)
    return float(np.median(times[-(-WARM_UP // size) :]))


def flops_per_image(model: GroundingModel, height: int, width: int) -> float:
    """Count the operations of forward and backward pass for an image of the given size, with all classes sampled."""
    phrases = tuple(f"class {label}" for label in range(60))
    boxes = np.tile(np.array([[10, 10, width / 2, height / 2]], np.float32), (BOXES, 1))
    sample = Sample("0", np.zeros((height, width, 3), np.uint8), phrases, boxes, np.arange(BOXES))
    batch = Collator(model.image_spec, model.text_spec, one_prompt=True)([sample])
    with FlopCounterMode(display=False) as counter:
        losses = model.loss(model.train()(batch), batch)
        torch.stack(list(losses.values())).sum().backward()
    return float(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="JPEG files")
    parser.add_argument("config", nargs="?", default=str(recipe_path("grounding_dino/pretrain_odvg_mm_t.yaml")))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--num-images", type=float, default=20e6, help="of the dataset (default: %(default)g)")
    parser.add_argument("--epochs", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=64, help="H100 (default: %(default)s)")
    parser.add_argument("--compute-share", type=float, default=0.12, help="of the peak (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine("cpu")
    images = sorted(options.folder.glob("*.jpg"))
    if len(images) < 3 * WARM_UP:
        raise DataError(f"{options.folder} has {len(images)} .jpg files, at least {3 * WARM_UP} are needed")
    config = load_config(options.config, options.overrides)
    model = config.model.build(pretrained=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = write_shards(write_dataset(images, folder), folder / "shards")
        bytes_each = sum(shard.bytes for shard in index.shards) / len(index)
        shards = {"name": "shards", "path": str(folder / "shards"), "vocabulary": {"negatives": 60}}
        train = f"data.train={json.dumps(shards)}"
        core = seconds_per_image(load_config(options.config, [*options.overrides, train]), model)
    height, width = model.image_spec.resized(480, 640)
    flops = flops_per_image(model, height, width)

    rate = options.compute_share * PEAK / flops  # images per second of a GPU
    total, nodes = rate * options.gpus, options.gpus / GPUS_PER_NODE
    days = options.epochs * options.num_images / total / DAY
    print(f"\n{len(images)} files, images of {width} x {height} px for the model\n")
    for what, value in (
        ("bytes of an image in a shard (measured)", f"{bytes_each / KB:.0f} kB"),
        ("one core reads, decodes, augments, batches (measured)", f"{1 / core:.1f} images/s"),
        ("a training step, per image (counted)", f"{flops / 1e12:.2f} TFLOP"),
        (f"disk for {options.num_images:g} images", f"{options.num_images * bytes_each / TB:.1f} TB"),
        (f"a GPU at {options.compute_share:.0%} of {PEAK / 1e12:.0f} TFLOP/s", f"{rate:.0f} images/s"),
        (f"{options.gpus} GPUs", f"{total:,.0f} images/s"),
        (f"{options.epochs} epochs", f"{days:.1f} days, {days * options.gpus:,.0f} GPU days"),
        ("network", f"{total * bytes_each / GB:.2f} GB/s, {total * bytes_each / GB / nodes:.3f} GB/s per node of 8"),
        ("CPU cores for the data", f"{rate * core:.1f} per GPU, {rate * core * GPUS_PER_NODE:.0f} per node of 8"),
    ):
        print(f"{what:55} {value}")


if __name__ == "__main__":
    main()
