"""Measure shards: opening an index of millions of samples, and reading samples from shards and from image files.

    python scripts/benchmarks/shards.py [--samples 10000000] [--images FOLDER] [--copies 2000] [--rounds 9]

Reading: the same samples, with boxes of 80 classes, from a COCO json with image files, from tar and from parquet, in
one process and in turn; in the order of training, in which samples are shuffled inside blocks of four shards. Every
round reads all samples; medians of the seconds, and of the ratios of each round. "Warm" files are in the memory of the
system, and CPU time is measured. "Cold" files are not, and elapsed time is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.benchmarks.machine import machine
from vg.data.detection.coco import CocoConfig
from vg.data.shards.containers import Entry, write_shard
from vg.data.shards.index import Index, write_rows
from vg.data.shards.source import ShardsConfig
from vg.data.shards.write import write_shards
from vg.data.source import Provenance, Source

_OPEN = """
import sys, time, psutil
from vg.data.shards.source import ShardsConfig
memory = psutil.Process().memory_info
before, start = memory().rss, time.perf_counter()
source = ShardsConfig(path=sys.argv[1]).build()
print(len(source), time.perf_counter() - start, (memory().rss - before) / 1e6, memory().rss / 1e6)
"""


def open_index(folder: Path, samples: int) -> tuple[float, float, float]:
    """Write an index of shards of 1,000 samples; return seconds to open it, MB added by that, and MB in all."""
    shard, rows = write_shard(folder / "0.tar", "tar", [Entry("0", "0", b"x", ".jpg", b"{}\n", (480, 640), 0)])
    shards = [shard._replace(samples=1000)] * (samples // 1000)
    table = write_rows(folder, (np.repeat(rows, 1000) for _ in shards), 1000 * len(shards))
    provenance = Provenance("many", "train")
    index = Index("tar", shards, table, provenance, None, None, all_detections=False, skipped=0, settings={})
    index.write(folder)
    command = [sys.executable, "-c", _OPEN, str(folder)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(5)]
    seconds, added, resident = (statistics.median(float(run[i]) for run in runs) for i in (1, 2, 3))
    return seconds, added, resident


def write_coco(folder: Path, images: Sequence[bytes], copies: int) -> CocoConfig:
    """Write `copies` image files with seven boxes each."""
    rng = np.random.default_rng(0)
    rows, annotations = [], []
    (folder / "images").mkdir()
    for index in range(copies):
        content = images[index % len(images)]
        (folder / "images" / f"{index:012d}.jpg").write_bytes(content)
        with Image.open(BytesIO(content)) as image:
            width, height = image.size
        rows.append({"id": index, "file_name": f"{index:012d}.jpg", "height": height, "width": width})
        for left, top, right, bottom in rng.uniform((0, 0, 0.5, 0.5), (0.4, 0.4, 1, 1), (7, 4)) * ([width, height] * 2):
            box = {
                "image_id": index,
                "category_id": int(rng.integers(80)),
                "bbox": [left, top, right - left, bottom - top],
            }
            annotations.append(box | {"id": len(annotations), "area": (right - left) * (bottom - top)})
    categories = [{"id": index, "name": f"class {index}"} for index in range(80)]
    (folder / "coco.json").write_text(
        json.dumps({"images": rows, "annotations": annotations, "categories": categories})
    )
    return CocoConfig(path=str(folder / "coco.json"), image_root=str(folder / "images"))


def drawn_images(number: int) -> list[bytes]:
    """Return JPEG files of 640 x 480 pixels, about as large as photos: smooth noise of several scales."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(number):
        image = np.zeros((480, 640, 3))
        for cells in (4, 16, 64, 320):
            small = rng.uniform(0, 64, (cells * 3 // 4, cells, 3)).astype(np.uint8)
            image += np.asarray(Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC))
        buffer = BytesIO()
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def training_order(samples: int, per_shard: int, seed: int) -> list[int]:
    """Return all samples, shuffled inside blocks of four shards, which are shuffled."""
    rng = np.random.default_rng(seed)
    shards = rng.permutation(-(-samples // per_shard))
    order = []
    for start in range(0, len(shards), 4):
        block = [
            np.arange(shard * per_shard, min(samples, (shard + 1) * per_shard)) for shard in shards[start : start + 4]
        ]
        order += rng.permutation(np.concatenate(block)).tolist()
    return order


def forget(folders: Sequence[Path]) -> None:
    """Remove files from the memory of the system."""
    os.sync()
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def seconds(source: Source, order: Sequence[int], clock: Callable[[], float]) -> float:
    start = clock()
    for index in order:
        source.load(index, 0)
    return clock() - start


def cpu_seconds(sources: Sequence[Source], order: Sequence[int]) -> list[float]:
    """Return the CPU time of each source; they take turns every 20 samples, so that other programs slow down all."""
    total = [0.0] * len(sources)
    for number, start in enumerate(range(0, len(order), 20)):
        for turn in range(len(sources)):
            which = (turn + number) % len(sources)
            total[which] += seconds(sources[which], order[start : start + 20], time.process_time)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000, help="in the index that is opened")
    parser.add_argument("--images", type=Path, help="folder of JPEG files to copy (default: 100 drawn images)")
    parser.add_argument("--copies", type=int, default=2000, help="image files that are read")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cold-rounds", type=int, default=5)
    options = parser.parse_args()
    machine("cpu")

    with tempfile.TemporaryDirectory() as name:
        opened, added, resident = open_index(Path(name), options.samples)
        print(f"index of {options.samples:,} samples: {opened:.2f} s, {added:.0f} MB more, {resident:.0f} MB in all")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = sorted(options.images.glob("*.jpg")) if options.images else []
        dataset = write_coco(folder, [file.read_bytes() for file in files] or drawn_images(100), options.copies)
        per_shard = max(1, options.copies // 20)
        for kind in ("tar", "parquet"):
            write_shards(dataset, folder / kind, kind, per_shard)  # type: ignore[arg-type]
        folders = {"image files": folder / "images", "tar": folder / "tar", "parquet": folder / "parquet"}
        sources = {"image files": dataset.build()}
        sources |= {kind: ShardsConfig(path=str(folder / kind)).build() for kind in ("tar", "parquet")}
        size = sum(file.stat().st_size for file in folders["image files"].iterdir())
        print(f"{options.copies} samples, {size / options.copies / 1e3:.0f} kB each, {per_shard} in a shard")
        print(
            "| read from | warm, CPU ms per sample | ratio | cold, ms per sample | ratio |\n|---|---:|---:|---:|---:|"
        )
        warm = {kind: list[float]() for kind in sources}
        cold = {kind: list[float]() for kind in sources}
        for number in range(max(options.rounds, options.cold_rounds)):
            order = training_order(options.copies, per_shard, number)
            turn = list(sources)[number % 3 :] + list(sources)[: number % 3]
            for kind in turn if number < options.cold_rounds else ():
                forget(list(folders.values()))
                cold[kind].append(seconds(sources[kind], order, time.perf_counter))
            if number < options.rounds:
                for kind, time_of_kind in zip(sources, cpu_seconds(list(sources.values()), order), strict=True):
                    warm[kind].append(time_of_kind)
        for kind in sources:
            cells = []
            for times in (warm, cold):
                ratio = statistics.median(a / b for a, b in zip(times[kind], times["image files"], strict=True))
                cells.append(f"{statistics.median(times[kind]) / options.copies * 1e3:.2f} | {ratio:.3f}")
            print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
