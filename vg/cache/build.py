"""Runs the frozen encoders of a model over its data once, and writes what they say into a cache of features."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vg.cache.select import cache_folder, parts
from vg.cache.source import INDEX, KEY, CachedSource, CacheFolder
from vg.cache.views import Pictures, Record
from vg.config import RunConfig
from vg.data.collate import Collator
from vg.data.prompt import Expressions
from vg.data.source import Source
from vg.distributed import new_accelerator, progress_bar
from vg.errors import BadSampleError, CacheError, ConfigError
from vg.files import replacing
from vg.models.base import EncodableModel

logger = logging.getLogger(__name__)

HALF = 2  # bytes
PROBES = 32  # pictures whose expressions tell how long expressions are


def build_cache(config: RunConfig) -> None:
    """Write the features of all data that a run reads; parts that are there stay, so that a killed build goes on.

    Under `accelerate launch` every process encodes its share of the parts.

    Raises:
        ConfigError: no folder is named, or the model has no frozen encoders.
        CacheError: the disk has not enough room, or features are beyond half precision.
    """
    if config.data.cache is None:
        raise ConfigError("data.cache names no folder; add data.cache.folder=cache")
    accelerator = new_accelerator()
    model = config.model.build()
    if not isinstance(model, EncodableModel):
        raise ConfigError(f"data.cache: {config.model.name} needs pixels, no features can be cached for it; remove it")
    model.to(accelerator.device).eval()
    builds: dict[Path, Build] = {}  # a source that is read twice is encoded once
    for settings, views in parts(config.data, config.data.cache):
        source = settings.build()
        folder = cache_folder(settings, source, config.data.cache, views, model)
        builds[folder.path] = Build(config, model, accelerator, source, folder)
    _announce(list(builds.values()), Path(config.data.cache.folder), accelerator)
    for build in builds.values():
        build.run()


def _announce(builds: Sequence[Build], root: Path, accelerator: Accelerator) -> None:
    """Tell what the disk will hold, before anything is written; raises CacheError where it cannot hold it."""
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    needed = sum(build.num_bytes for build in builds)
    if accelerator.is_main_process:
        for build in builds:
            print(build)
        print(f"to be written: {_size(needed)}; free on the disk: {_size(free)}", flush=True)
    if needed > free:
        raise CacheError(
            f"the features take {_size(needed)}, the disk of {root} has {_size(free)}; make room, set "
            "data.cache.folder to another disk, or take fewer data.cache.views"
        )


class Build:
    """The features of one source."""

    def __init__(
        self, config: RunConfig, model: EncodableModel, accelerator: Accelerator, source: Source, folder: CacheFolder
    ):
        self.model = model
        self.accelerator = accelerator
        self.source = source
        self.folder = folder
        self.texts = Expressions(model.text_spec)
        collate = Collator(model.image_spec, model.text_spec)
        self.pictures = Pictures(source, folder.key["views"], collate, config.data.bad_samples == "skip")
        self.batch_size = config.data.eval_batch_size
        self.workers = config.data.workers
        self.done = (folder.path / INDEX).exists()
        missing = sum(len(folder.parts[number]) for number in folder.missing())
        self.picture_bytes = 0 if self.done else missing * self._bytes_of_picture()
        self.word_bytes = 0 if self.done else self._bytes_of_words()

    @property
    def num_bytes(self) -> int:
        return self.picture_bytes + self.word_bytes

    def __str__(self) -> str:
        key = self.folder.key
        counts = f"{len(self.pictures):,} pictures ({', '.join(key['views'])}), {len(self.source):,} expressions"
        size = f"{_size(self.picture_bytes)} of images, at most about {_size(self.word_bytes)} of words to write"
        return f"{key['data']} ({key['split']}): {counts}; {'finished' if self.done else size} -> {self.folder.path}"

    def run(self) -> None:
        """Write what is missing; all processes take part."""
        if self.done:
            return
        folder, main = self.folder, self.accelerator.is_main_process
        (folder.path / "pictures").mkdir(parents=True, exist_ok=True)
        (folder.path / "words").mkdir(exist_ok=True)
        if main:
            self._warn_of_fresh_pictures()
            _write(folder.path / KEY, json.dumps(folder.key, indent=1).encode())
        missing = folder.missing()
        self.accelerator.wait_for_everyone()  # all have counted before one of them writes
        self._encode_pictures(self._mine(missing))
        self.accelerator.wait_for_everyone()
        records = self._records()
        expressions = _distinct(records)
        starts = range(0, len(expressions), folder.words_part_size)
        missing = [part for part in range(len(starts)) if not folder.words(part).exists()]
        self.accelerator.wait_for_everyone()
        self._encode_words(expressions, self._mine(missing))
        self.accelerator.wait_for_everyone()
        if main:
            _write(folder.path / INDEX, self._index(records, expressions))
            CachedSource(self.source, folder, seed=0)  # reads it all, for a last check
        self.accelerator.wait_for_everyone()

    def _mine(self, numbers: Sequence[int]) -> Sequence[int]:
        return numbers[self.accelerator.process_index :: self.accelerator.num_processes]

    def _progress(self, total: int, what: str) -> tqdm:
        return progress_bar(self.accelerator, total=total, desc=f"{self.folder.key['split']} {what}", unit=what)

    @torch.inference_mode()
    def _encode_pictures(self, missing: Sequence[int]) -> None:
        """Every batch is of one part, so that a part is done when its last batch is."""
        at_once = max(1, self.batch_size // self.folder.num_views)
        ranges = [self.folder.parts[number] for number in missing]
        batches = [list(part[n : n + at_once]) for part in ranges for n in range(0, len(part), at_once)]
        loader = DataLoader(self.pictures, batch_sampler=batches, num_workers=self.workers, collate_fn=_collate)
        with self._progress(sum(map(len, ranges)), "pictures") as bar:
            loaded: Iterator[tuple[list[Record], Tensor]] = iter(loader)
            for number, part in zip(missing, ranges, strict=True):
                records: list[Record] = []
                features = []
                while len(records) < len(part):
                    more, images = next(loaded)
                    tokens, _ = self.model.encode_images(images.to(self.accelerator.device))  # [batch x V, S, D]
                    features.append(self._halved(tokens))
                    records += more
                    bar.update(len(more))
                _write(self.folder.pictures(number), np.concatenate(features))  # [part x V, S, D]
                _write(self.folder.record(number), json.dumps(records).encode())

    @torch.inference_mode()
    def _encode_words(self, expressions: Sequence[str], missing: Sequence[int]) -> None:
        size = self.folder.words_part_size
        parts = [expressions[number * size : (number + 1) * size] for number in missing]
        with self._progress(sum(map(len, parts)), "expressions") as bar:
            for number, part in zip(missing, parts, strict=True):
                words: list[np.ndarray] = [np.empty(0)] * len(part)
                order = sorted(range(len(part)), key=lambda place: len(part[place]))  # so that little is padding
                for first in range(0, len(part), self.batch_size):
                    chosen = order[first : first + self.batch_size]
                    named = [part[place] for place in chosen]
                    text = self.texts.text(named, [f"{self.folder.key['data']}"] * len(named))
                    text = type(text)(*(each.to(self.accelerator.device) for each in text))
                    tokens = self._halved(self.model.encode_text(text))  # [R, T, D]
                    for place, row, mask in zip(chosen, tokens, text.mask.cpu().numpy(), strict=True):
                        words[place] = row[mask]
                    bar.update(len(chosen))
                _write(self.folder.words(number), np.concatenate(words))  # [tokens, D]

    def _halved(self, features: Tensor) -> np.ndarray:
        halved = features.half()
        if not halved.isfinite().all():
            raise CacheError(
                f"features reach {features.abs().max():.3g}, which half precision does not hold (65,504 at most); "
                "train this encoder with data.cache=null"
            )
        return halved.cpu().numpy()

    def _records(self) -> list[Record]:
        """What is said about every picture."""
        files = [self.folder.record(part) for part in range(len(self.folder.parts))]
        return [record for file in files for record in json.loads(file.read_text())]

    def _index(self, records: Sequence[Record], expressions: Sequence[str]) -> dict[str, np.ndarray]:
        num_samples, num_views = len(self.source), self.folder.num_views
        numbers = {expression: number for number, expression in enumerate(expressions)}
        pictures = np.zeros(num_samples, np.int64)
        sizes = np.zeros((len(records), num_views, 2), np.int64)
        boxes = np.zeros((num_samples, num_views, 4), np.float32)
        words = np.zeros((num_samples, num_views), np.int64)
        bad = np.zeros(num_samples, bool)
        ids, kinds = [""] * num_samples, [""] * num_samples
        for picture, record in enumerate(records):
            pictures[[*record["samples"], *record["bad"]]] = picture
            bad[record["bad"]] = True
            sizes[picture] = [view["size"] for view in record["views"]]
            for place, sample in enumerate(record["samples"]):
                boxes[sample] = [view["boxes"][place] for view in record["views"]]
                words[sample] = [numbers[view["phrases"][place]] for view in record["views"]]
                ids[sample], kinds[sample] = record["ids"][place], record["kinds"][place]
        strings = {"ids": ids, "kinds": kinds, "expressions": list(expressions)}
        return {
            "pictures": pictures,  # [samples]
            "sizes": sizes,  # [pictures, V, 2]
            "boxes": boxes,  # [samples, V, 4] xyxy in pixels
            "words": words,  # [samples, V]
            "bad": bad,  # [samples]
            "ends": np.cumsum(self._num_tokens(expressions)),  # [E]
            "grid": np.array(self._encode_black()[1]),
            **{name: np.frombuffer(json.dumps(values).encode(), np.uint8) for name, values in strings.items()},
        }

    def _num_tokens(self, expressions: Sequence[str]) -> list[int]:
        return [len(token_ids) for token_ids in self.model.text_spec.tokenizer(list(expressions))["input_ids"]]

    @torch.inference_mode()
    def _encode_black(self) -> tuple[Tensor, tuple[int, int]]:
        """The features of a black picture, which are as many as those of any other."""
        height, width = self.model.image_spec.resized(1, 1)
        return self.model.encode_images(torch.zeros(1, 3, height, width, device=self.accelerator.device))

    def _bytes_of_picture(self) -> int:
        return self._encode_black()[0].numel() * self.folder.num_views * HALF

    @torch.inference_mode()
    def _bytes_of_words(self) -> int:
        """A guess from some expressions that no two samples share one, as if there were no repetitions."""
        probes = [self.pictures[n][0] for n in range(0, len(self.pictures), -(-len(self.pictures) // PROBES))]
        num_tokens = sum(self._num_tokens(_distinct(probes)))
        num_samples = max(1, sum(len(record["samples"]) for record in probes))
        text = self.texts.text(["word"], ["probe"])
        width = self.model.encode_text(type(text)(*(each.to(self.accelerator.device) for each in text))).shape[-1]
        return round(num_tokens / num_samples * len(self.source) * width * HALF)

    def _warn_of_fresh_pictures(self) -> None:
        try:
            now, later = (self.source.load(0, epoch).image for epoch in (0, 1))
        except BadSampleError:
            return
        if now.shape != later.shape or (now != later).any():
            logger.warning(
                "%s (%s) shows new pictures in every epoch; the cache keeps those of the first one",
                self.folder.key["data"],
                self.folder.key["split"],
            )


def _collate(items: Sequence[tuple[Record, Tensor]]) -> tuple[list[Record], Tensor]:
    return [record for record, _ in items], torch.cat([images for _, images in items])


def _distinct(records: Sequence[Record]) -> list[str]:
    """All expressions in all views, each once, in the order in which they come first."""
    return list(dict.fromkeys(e for record in records for view in record["views"] for e in view["phrases"]))


def _write(path: Path, content: bytes | np.ndarray | dict[str, np.ndarray]) -> None:
    with replacing(path, is_file=True) as partial, partial.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        elif isinstance(content, np.ndarray):
            np.save(file, content)
        else:
            np.savez(file, **content)  # type: ignore[arg-type]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"
