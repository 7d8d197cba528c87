"""Runs the frozen encoders of a model once over the data of a run and writes their features into a cache."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vg.cache.format import (
    INDEX,
    KEY,
    CacheFolder,
    checksum_of,
    read_records,
    write_file,
    write_records,
)
from vg.cache.key import cache_folder, encodable
from vg.cache.repair import discard_invalid
from vg.cache.source import CachedSource
from vg.cache.views import ImageViews, Record, ViewBatch
from vg.config import DataConfig, RunConfig
from vg.data.collate import Collator
from vg.data.mixture import OneDatasetConfig, configs_of
from vg.data.prompt import Expressions
from vg.data.source import Source
from vg.distributed import new_accelerator, processes_per_machine, progress_bar
from vg.errors import BadSampleError, CacheError, ConfigError, printable
from vg.machine import num_cores, size_text
from vg.models.base import EncodableModel
from vg.movable import map_tensors
from vg.types import Sample, Text
from vg.workers import new_loader

logger = logging.getLogger(__name__)

BYTES_PER_VALUE = 2  # float16
MOST_WORKERS = 16  # more cores decode faster than a GPU encodes
NUM_PROBES = 32  # images whose expressions are sampled to estimate the size of the text features


def build_cache(config: RunConfig) -> None:
    """Write the features of all data of a run; existing shards are kept, so an interrupted build continues.

    Shards that are damaged, or of which an image has changed, are written again.

    Under `accelerate launch` the shards are distributed over the processes.

    Raises:
        ConfigError: `data.cache` is not set, or the model has no frozen encoders.
        CacheError: there is not enough disk space, or features exceed the range of float16.
    """
    data, cache = config.data, config.data.cache
    if cache is None:
        raise ConfigError("data.cache is not set; add data.cache.folder=cache")
    accelerator = new_accelerator()
    model = encodable(config.model.build())
    model.to(accelerator.device).eval()
    views: list[tuple[OneDatasetConfig, Sequence[str]]] = [(dataset, cache.views) for dataset in configs_of(data.train)]
    views += [(dataset, ["plain"]) for settings in data.eval_datasets().values() for dataset in configs_of(settings)]
    found: dict[Path, tuple[Source[Sample], CacheFolder]] = {}  # a dataset that is used twice is encoded once
    for dataset, stored in views:
        source = dataset.build()
        folder = cache_folder(dataset, source, cache, stored, model)
        found[folder.path] = source, folder
    accelerator.wait_for_everyone()  # all processes have found the same folders before one of them changes a file
    if accelerator.is_main_process:
        for _, folder in found.values():
            discard_invalid(folder)
    accelerator.wait_for_everyone()
    builds = {path: Build(data, model, accelerator, source, folder) for path, (source, folder) in found.items()}

    root = Path(cache.folder)
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    needed = sum(build.image_bytes + build.text_bytes for build in builds.values())
    if accelerator.is_main_process:
        total = f"to be written: {size_text(needed)}; free on the disk: {size_text(free)}"
        print(*map(printable, map(str, builds.values())), total, sep="\n", flush=True)
    if needed > free:
        raise CacheError(
            f"the features need {size_text(needed)}, the disk of {root} has {size_text(free)} left; free some space, "
            "set data.cache.folder to another disk, or use fewer data.cache.views"
        )
    for build in builds.values():
        build.run()


@dataclass
class Build:
    """The features of one dataset."""

    data: DataConfig
    model: EncodableModel
    accelerator: Accelerator
    source: Source[Sample]
    folder: CacheFolder
    image_bytes: int = 0  # to be written
    text_bytes: int = 0

    def __post_init__(self) -> None:
        collate = Collator(self.model.image_spec, self.model.text_spec)
        self.images = ImageViews(self.source, self.folder.key["views"], collate, self.data.bad_samples == "skip")
        self.done = (self.folder.path / INDEX).exists()
        if not self.done:
            self._measure()

    @torch.inference_mode()
    def _measure(self) -> None:
        """Compute `grid`, `num_tokens`, `image_bytes` and `text_bytes`."""
        height, width = self.model.image_spec.resized(1, 1)  # a square has as many tokens as any image
        black = torch.zeros(1, 3, height, width, device=self.accelerator.device)
        features, self.grid = self.model.encode_images(black)
        self.num_tokens = features.shape[1]
        num_images = sum(len(self.folder.shards[shard]) for shard in self.folder.missing_shards())
        self.image_bytes = num_images * features.numel() * self.folder.num_views * BYTES_PER_VALUE
        if not self.folder.has_text:
            return
        # Extrapolated from the expressions of some images, as if no two samples shared one.
        probes = [self.images[n][0] for n in range(0, len(self.images), -(-len(self.images) // NUM_PROBES))]
        num_tokens = sum(self._num_tokens(_distinct(probes)))
        num_samples = max(1, sum(len(record["samples"]) for record in probes))
        width = self.model.encode_text(self._text(["word"]))[0].shape[-1]
        self.text_bytes = round(num_tokens / num_samples * len(self.source) * width * BYTES_PER_VALUE)

    def __str__(self) -> str:
        views = ", ".join(self.folder.key["views"])
        counts = f"{len(self.images):,} images ({views}), {len(self.source):,} expressions"
        size = f"to write: images {size_text(self.image_bytes)}"
        size += f", text at most about {size_text(self.text_bytes)}" if self.folder.has_text else ""
        return f"{self.folder.name}: {counts}; {'complete' if self.done else size} -> {self.folder.path}"

    def run(self) -> None:
        """Write what is missing; all processes must call this."""
        if self.done:
            return
        folder, main = self.folder, self.accelerator.is_main_process
        if main:
            self._warn_about_changing_images()
            if not (folder.path / KEY).exists() or (folder.has_text and "text" not in folder.stored):
                write_file(folder.path / KEY, json.dumps({**folder.key, **folder.stored}, indent=1).encode())
        missing = folder.missing_shards()
        self.accelerator.wait_for_everyone()  # all processes have listed the files before one of them writes
        self._encode_images(self._own(missing))
        self.accelerator.wait_for_everyone()
        files = [folder.image_records(shard) for shard in range(len(folder.shards))]
        records = [record for file in files for record in read_records(file)]
        expressions = _distinct(records)
        if folder.has_text:
            missing = folder.missing_texts(expressions)
            self.accelerator.wait_for_everyone()
            self._encode_texts(expressions, self._own(missing))
            self.accelerator.wait_for_everyone()
        if main:
            write_file(folder.path / INDEX, self._index(records, expressions))
            CachedSource(self.source, folder, seed=0)  # reads and checks all files
        self.accelerator.wait_for_everyone()

    def _own(self, shards: Sequence[int]) -> Sequence[int]:
        """Return the shards of this process."""
        return shards[self.accelerator.process_index :: self.accelerator.num_processes]

    def _progress(self, total: int, unit: str) -> tqdm:
        return progress_bar(self.accelerator, total=total, desc=f"{self.folder.key['split']} {unit}", unit=unit)

    @torch.inference_mode()
    def _encode_images(self, shards: Sequence[int]) -> None:
        """Write image shards; no batch spans two shards, so a shard is complete after its last batch."""
        batch_size = max(1, self.data.eval_batch_size // self.folder.num_views)
        ranges = [self.folder.shards[shard] for shard in shards]
        batches = [list(shard[n : n + batch_size]) for shard in ranges for n in range(0, len(shard), batch_size)]
        device = self.accelerator.device
        options = {"collate_fn": self.images.batch, "pin_memory": device.type == "cuda"}
        loader = new_loader(self.images, self._num_workers(), batch_sampler=batches, **options)
        with self._progress(sum(map(len, ranges)), "images") as bar:
            loaded: Iterator[ViewBatch] = iter(loader)
            for shard, indices in zip(shards, ranges, strict=True):
                records: list[Record] = []
                features = []
                while len(records) < len(indices):
                    batch = next(loaded).to(device, non_blocking=device.type != "mps")
                    with self._autocast():
                        tokens, grids = self.model.encode_sizes(batch.normalized(), batch.sizes)  # [batch x V, S, D]
                    tokens = F.pad(tokens, (0, 0, 0, self.num_tokens - tokens.shape[1]))
                    views = [view for record in batch.records for view in record["views"]]
                    for view, grid in zip(views, grids, strict=True):
                        view["grid"] = grid
                    features.append(self._to_half(tokens))
                    records += batch.records
                    bar.update(len(batch.records))
                array = np.concatenate(features)  # [images x V, S, D]
                for n, record in enumerate(records):
                    first = n * self.folder.num_views
                    record["checksums"] = [checksum_of(row) for row in array[first : first + self.folder.num_views]]
                write_file(self.folder.image_features(shard), array)
                write_records(self.folder.image_records(shard), records)

    @torch.inference_mode()
    def _encode_texts(self, expressions: Sequence[str], shards: Sequence[int]) -> None:
        ranges = self.folder.text_shards(len(expressions))
        chunks = [expressions[ranges[shard].start : ranges[shard].stop] for shard in shards]
        with self._progress(sum(map(len, chunks)), "expressions") as bar:
            for shard, chunk in zip(shards, chunks, strict=True):
                features: list[np.ndarray] = [np.empty(0)] * len(chunk)
                order = sorted(range(len(chunk)), key=lambda row: len(chunk[row]))  # similar lengths, little padding
                for first in range(0, len(chunk), self.data.eval_batch_size):
                    rows = order[first : first + self.data.eval_batch_size]
                    text = self._text([chunk[row] for row in rows])
                    with self._autocast():
                        encoded, masks = self.model.encode_text(text)  # [R, T, D], [R, T]
                    tokens = self._to_half(encoded)
                    for row, values, mask in zip(rows, tokens, masks.cpu().numpy(), strict=True):
                        features[row] = values[mask]
                    bar.update(len(rows))
                write_file(self.folder.text_features(shard), np.concatenate(features))  # [tokens, D]
                written = {"expressions": chunk, "checksums": [checksum_of(values) for values in features]}
                write_records(self.folder.text_records(shard), written)

    def _num_workers(self) -> int:
        """Return data workers: on a GPU, which encodes faster than some cores decode, all cores of this process."""
        workers = self.data.workers
        if workers == 0 or self.accelerator.device.type != "cuda":
            return workers
        return max(workers, min(MOST_WORKERS, num_cores() // processes_per_machine(self.accelerator)))

    def _autocast(self) -> torch.autocast:
        enabled = self.folder.key["precision"] == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def _text(self, expressions: Sequence[str]) -> Text:
        names = [self.folder.name] * len(expressions)
        text = Expressions(self.model.text_spec).arrays(expressions, names).tensors()
        moved: Text = map_tensors(text, lambda tensor: tensor.to(self.accelerator.device))
        return moved

    def _to_half(self, features: Tensor) -> np.ndarray:
        half = features.half()
        if not half.isfinite().all():
            raise CacheError(
                f"features reach {features.abs().max():.3g}, which exceeds the range of float16 (65,504); train this "
                "encoder with data.cache=null"
            )
        return half.cpu().numpy()

    def _index(self, records: Sequence[Record], expressions: Sequence[str]) -> dict[str, np.ndarray]:
        num_samples, num_views = len(self.source), self.folder.num_views
        expression_ids = {expression: index for index, expression in enumerate(expressions)}
        images = np.zeros(num_samples, np.int64)
        sizes, grids = np.zeros((2, len(records), num_views, 2), np.int64)
        boxes = np.zeros((num_samples, num_views, 4), np.float32)
        texts = np.zeros((num_samples, num_views), np.int64)
        bad = np.zeros(num_samples, bool)
        ids, types = [""] * num_samples, [""] * num_samples
        for image, record in enumerate(records):
            images[[*record["samples"], *record["bad"]]] = image
            bad[record["bad"]] = True
            sizes[image] = [view["size"] for view in record["views"]]
            grids[image] = [view["grid"] for view in record["views"]]
            for n, sample in enumerate(record["samples"]):
                boxes[sample] = [view["boxes"][n] for view in record["views"]]
                texts[sample] = [expression_ids[view["phrases"][n]] for view in record["views"]]
                ids[sample], types[sample] = record["ids"][n], record["types"][n]
        strings = {"ids": ids, "types": types, "expressions": list(expressions)}
        return {
            "images": images,  # [samples]
            "sizes": sizes,  # [images, V, 2]
            "boxes": boxes,  # [samples, V, 4] xyxy in pixels
            "texts": texts,  # [samples, V]
            "bad": bad,  # [samples]
            "grid": np.array(self.grid),  # that of a square, which has the most cells
            "grids": grids,  # [images, V, 2]
            "files": np.array([record["file"] for record in records], np.int64),  # [images, 3]
            "image_checksums": np.array([record["checksums"] for record in records]),  # [images, V]
            **(self._text_entries(expressions) if self.folder.has_text else {}),
            **{name: np.frombuffer(json.dumps(values).encode(), np.uint8) for name, values in strings.items()},
        }

    def _text_entries(self, expressions: Sequence[str]) -> dict[str, np.ndarray]:
        files = [self.folder.text_records(shard) for shard in range(len(self.folder.text_shards(len(expressions))))]
        checksums = np.array([value for file in files for value in read_records(file)["checksums"]], np.int64)
        return {"ends": np.cumsum(self._num_tokens(expressions)), "text_checksums": checksums}  # [E] each

    def _num_tokens(self, expressions: Sequence[str]) -> np.ndarray:
        """Return the tokens of each expression, those of both text encoders if there are two."""
        spec = self.model.text_spec
        tokens = [x.tokenizer(list(expressions))["input_ids"] for x in (spec, spec.extra) if x]
        return np.sum([[len(token_ids) for token_ids in rows] for rows in tokens], axis=0)

    def _warn_about_changing_images(self) -> None:
        try:
            first, second = (self.source.load(0, epoch).image for epoch in (0, 1))
        except BadSampleError:
            return
        if first.shape != second.shape or (first != second).any():
            logger.warning("%s has new images in every epoch; the cache keeps those of the first", self.folder.name)


def _distinct(records: Sequence[Record]) -> list[str]:
    """Return the expressions of all views without repetition, in order of first occurrence."""
    return list(dict.fromkeys(e for record in records for view in record["views"] for e in view["phrases"]))
