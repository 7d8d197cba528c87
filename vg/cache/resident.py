"""Cached features of the training data in the memory of the device, where batches are made by indexing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator

from vg import boxes as box_ops
from vg.cache.resident_text import READERS, feature_table, id_tables
from vg.cache.settings import CacheConfig
from vg.cache.source import CachedSource
from vg.data.dataset import RunDataset, SourceDataset
from vg.data.mixture import Mixture
from vg.data.prompt import Expressions
from vg.data.source import Source
from vg.data.subset import Subset
from vg.distributed import processes_per_machine
from vg.errors import ConfigError
from vg.machine import available_ram, size_text
from vg.models.base import largest_grid
from vg.types import EncodedBatch, EncodedSample, Features, Target, Text

Key = TypeVar("Key")


def resident_features(
    data: RunDataset, cache: CacheConfig, accelerator: Accelerator, texts: Expressions | None = None
) -> tuple[RunDataset, str]:
    """Load the features of a cached dataset into the memory of the device, as far as `data.cache.resident` allows.

    auto: if they take at most half of the free memory of a GPU, or a quarter of the available RAM elsewhere, which the
    processes of a machine share.

    Args:
        texts: see ResidentFeatures.

    Returns:
        The dataset with features in memory, or the given one, which reads them from files; and a sentence for the plan.

    Raises:
        ConfigError: they are larger than the free memory, but `resident` is true.
        CacheError: features are damaged.
    """
    device, folders = accelerator.device, {source.folder.path: source for source, _ in _leaves(data.source)}
    needed = sum(source.num_bytes for source in folders.values())
    if device.type == "cuda":
        free, share, place = torch.cuda.mem_get_info(device)[0], 1 / 2, "the GPU"
    else:
        free, share, place = available_ram() // processes_per_machine(accelerator), 1 / 4, "the CPU"
    limit = {"auto": share * free, True: free, False: -1}[cache.resident]
    size, memory = size_text(needed), f"{size_text(free)} that are free in the memory of {place}"
    if needed <= limit:
        return ResidentFeatures(data, device, texts), f"features: {size} of the {memory}"  # type: ignore[arg-type]
    if cache.resident is True:
        raise ConfigError(
            f"data.cache.resident=true: the features take {size}, more than the {memory}; set it to auto or false, "
            "which reads them from files"
        )
    reason = f", more than {share:g} of the {memory}" if cache.resident else ""
    return data, f"features: {size}, read from files (data.cache.resident={str(cache.resident).lower()}{reason})"


class ResidentFeatures(SourceDataset[EncodedSample]):
    """A cached dataset in memory: its samples are the indices of entries, of which `collate` makes a batch.

    An entry is a sample in a view. The batches equal those of the given dataset, but are on the device.

    Args:
        data: samples of a CachedSource, of a part of one, or of a mixture of these.
        texts: tokenizes the phrases, if only the features of images are cached.

    Raises:
        BadSampleError: a phrase is too long for `texts`.
        CacheError: features are damaged.
    """

    def __init__(self, data: SourceDataset[EncodedSample], device: torch.device, texts: Expressions | None = None):
        super().__init__(data.source, self.batch, "skip" if data.skip else "error")  # type: ignore[arg-type]
        self.device = device
        leaves = list(_leaves(data.source))
        folders = {source.folder.path: source for source, _ in leaves}  # one that is used twice is loaded once
        self.num_views = leaves[0][0].folder.num_views
        self.num_prefix = leaves[0][0].num_prefix
        grids = np.concatenate([source.grids.reshape(-1, 2) for source in folders.values()])
        self.grid, self.grids = largest_grid([(rows, columns) for rows, columns in grids.tolist()])  # of rows

        first_rows, num_rows = _offsets({path: source.index["sizes"].size // 2 for path, source in folders.items()})
        self.image_shape = leaves[0][0].image_shape  # S, D
        # A row for each image and view, because selecting rows of a matrix is faster than of three dimensions.
        self.image = torch.empty((num_rows, math.prod(self.image_shape)), dtype=torch.float16, device=device)
        for path, source in folders.items():
            self._read(source, first_rows[path])
        chosen = [(source.folder.path, source.index["texts"].ravel()) for source, _ in leaves]  # of entries
        self.is_encoded = texts is None
        self.texts = id_tables(folders, chosen, device, texts) if texts else [feature_table(folders, chosen, device)]

        # Entry (first sample of the source + sample) * V + view
        self.first, _ = _offsets({source: len(source) for source, _ in leaves})
        self.ids: list[str] = []  # of samples, as the next one
        self.types: list[str] = []
        self.phrases: list[str] = []  # of entries, as the following
        self.sizes: list[tuple[int, int]] = []
        rows, boxes = [], []
        for source, prefix in leaves:
            images, phrases = source.index["images"], source.index["texts"]  # [samples], [samples, V]
            sizes, views = source.index["sizes"][images], np.arange(self.num_views)  # [samples, V, 2]
            self.ids += [prefix + id for id in source.texts["ids"]]
            self.types += source.texts["types"]
            self.phrases += [source.texts["expressions"][text] for text in phrases.ravel().tolist()]
            self.sizes += [(height, width) for height, width in sizes.reshape(-1, 2).tolist()]
            rows.append(first_rows[source.folder.path] + images[:, None] * self.num_views + views)
            scale = torch.from_numpy(sizes[..., [1, 0, 1, 0]]).float()  # [samples, V, 4]
            boxes.append(box_ops.xyxy_to_cxcywh(torch.from_numpy(source.index["boxes"]) / scale).flatten(0, 1))
        self.rows = np.concatenate([x.ravel() for x in rows])
        self.boxes = torch.cat(boxes).to(device)  # [entries, 4] cxcywh 0..1
        self.phrase_ids = torch.zeros(1, dtype=torch.long, device=device)  # of all targets

    def _read(self, source: CachedSource, first_row: int) -> None:
        """Copy the features of the images of a source into the memory of the device."""
        folder = source.folder

        def read_images(shard: int) -> None:
            start = first_row + folder.shards[shard].start * self.num_views
            features = torch.from_numpy(source.image_shard(shard)).flatten(1)
            self.image[start : start + len(features)].copy_(features)

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read_images, range(len(folder.shards))))

    def _load(self, index: int, epoch: int) -> int:  # type: ignore[override]
        """Return the index of an entry; raises BadSampleError as the source."""
        source: Source[EncodedSample] = self.source
        while not isinstance(source, CachedSource):
            if isinstance(source, Mixture):
                number, index, epoch = source.locate(index, epoch)
                source = source.sources[number]
            else:
                assert isinstance(source, Subset)
                index, source = int(source.indices[index]), source.source
        _, view = source.locate(index, epoch)
        return (self.first[source] + index) * self.num_views + view

    def batch(self, entries: Sequence[int]) -> EncodedBatch:
        """Make the batch that vg.cache.source.collate_encoded makes of these samples; never waits for the device."""
        chosen = np.array(entries)  # [R]
        images: dict[int, int] = {}  # row -> index in the batch
        image_ids = [images.setdefault(row, len(images)) for row in self.rows[chosen].tolist()]
        tokens = [text.rows(chosen) for text in self.texts]  # [R, T]
        numbers = torch.from_numpy(np.concatenate([list(images), image_ids, chosen, *(x.ravel() for x in tokens)]))
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()
        numbers = numbers.to(self.device, non_blocking=self.device.type != "mps")  # one copy for all
        sizes = [len(images), len(chosen), len(chosen), *(x.size for x in tokens)]
        rows, ids, chosen_here, *tokens_here = numbers.split(sizes)
        grid, grids = largest_grid([self.grids[row] for row in images]) if self.grids else (self.grid, None)
        found = [text.select(x, y.shape) for text, x, y in zip(self.texts, tokens_here, tokens, strict=True)]
        sample_ids = torch.arange(len(chosen), device=self.device)
        text: Text | None = None
        for values, mask in reversed([] if self.is_encoded else found):
            text = Text(values, mask, mask.unsqueeze(1), sample_ids, text)
        shape = self.num_prefix + math.prod(grid), self.image_shape[1]  # S, D
        features = Features(
            image=self.image[:, : math.prod(shape)].index_select(0, rows).unflatten(1, shape),  # [B, S, D]
            grid=grid,
            text=text or found[0][0],  # tokens [R, T], or features [R, T, D]
            text_mask=found[0][1],
            image_ids=ids,
            max_per_image=max(Counter(image_ids).values()),
            grids=grids,
        )
        boxes = self.boxes.index_select(0, chosen_here).split(1)  # R times [1, 4]
        targets = []
        for entry, box in zip(entries, boxes, strict=True):
            sample, phrases = entry // self.num_views, (self.phrases[entry],)
            id, kind = self.ids[sample], self.types[sample]
            targets.append(Target(id, self.sizes[entry], phrases, box, self.phrase_ids, kind))
        return EncodedBatch(features, targets)


def _leaves(source: Source, prefix: str = "") -> Iterator[tuple[CachedSource, str]]:
    """Yield the caches of a source, and what the ids of their samples begin with; none for samples with pixels."""
    if isinstance(source, CachedSource):
        yield source, prefix
    elif isinstance(source, Mixture):
        for number, part in enumerate(source.sources):
            yield from _leaves(part, prefix + source.prefix(number))
    elif isinstance(source, Subset):
        yield from _leaves(source.source, prefix)


def _offsets(lengths: Mapping[Key, int]) -> tuple[dict[Key, int], int]:
    """Return where each of several ranges begins that follow each other, and the end of the last one."""
    ends = list(accumulate(lengths.values(), initial=0))
    return dict(zip(lengths, ends[:-1], strict=True)), ends[-1]
