"""Labels shards of images: reads ahead, runs the model, and writes every shard when it is done."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vg.data.detection.annotations import MIN_SIDE
from vg.errors import BadSampleError
from vg.inference.grounder import Grounder
from vg.inference.read_ahead import NUM_THREADS, Ready, read_batches
from vg.inference.result import Boxes, Result
from vg.labeling.captions import PIPELINE, Captions
from vg.labeling.output import LabelFolder, Line
from vg.labeling.phrases import Classes, Labels, Prompt, Thresholds
from vg.labeling.plan import PlannedImage, open_plan
from vg.machine import num_cores

MAX_THREADS = 8  # that read images for one GPU


@dataclass(frozen=True)
class LabelSettings:
    """What to label, and how: the arguments of `vg label`."""

    checkpoint: str
    data: str
    output: str
    phrases: Thresholds | None = None  # these, or those of captions, or by default the classes of the model
    captions: str | None = None
    pipeline: str = PIPELINE
    image_root: str | None = None
    shard_size: int = 1000
    threshold: float | None = None
    nms: float | None = None
    exclusive: bool = False  # nms compares boxes of all phrases
    format: str = "odvg"
    bad_images: str = "error"
    batch_size: int = 8
    device: str | None = None
    dtype: str | None = None
    tokenizer: str | None = None
    overrides: tuple[str, ...] = ()


@dataclass
class Counts:
    """What was labeled, by one worker or several."""

    images: int = 0
    boxes: int = 0
    skipped: int = 0  # images that could not be read
    phrases: Counter[str] = field(default_factory=Counter)  # boxes of each
    forward: float = 0.0  # seconds in forward passes
    total: float = 0.0  # seconds in everything, without loading the model

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Planned(NamedTuple):
    """A batch as the network takes it."""

    prompts: list[Prompt]  # of every image
    batch: Any  # of the images with phrases


class Labeler:
    """A model and its images, ready to label any shards; the labels of a shard do not depend on the others.

    Raises:
        UserError: see Grounder, open_plan, Classes, Captions and LabelFolder.
    """

    def __init__(self, settings: LabelSettings):
        self.settings = settings
        self.plan = open_plan(
            settings.data, settings.captions, settings.image_root, settings.shard_size, settings.bad_images
        )
        classes = None if settings.phrases is None else Classes(settings.phrases)
        device = local_device(settings.device, settings.checkpoint)
        self.grounder = Grounder(
            settings.checkpoint, device, settings.tokenizer, settings.overrides, dtype=settings.dtype
        )
        if classes is None and settings.captions is None:
            classes = Classes(self.grounder.classes)
            self.settings = settings = replace(settings, phrases=dict.fromkeys(classes.prompt.phrases))
        self._prompter = classes or Captions(settings.pipeline, self.grounder.backend.texts)
        self.folder = LabelFolder(Path(settings.output), self._recorded(), classes.label_map() if classes else None)
        self._threads = read_threads(self.grounder.backend.device)

    def run(self, shards: Sequence[int]) -> Iterator[Counts]:
        """Label shards in their order; yields the counts of every batch after it is done.

        Raises:
            BadSampleError: an image cannot be read, unless `bad_images` is "skip".
            PredictionError: the model predicts NaN or Inf.
        """
        ready = read_batches(self._batches(shards), self._prepare, self._threads)
        for shard in shards:
            self.grounder.backend.forget_prompts()
            lines: list[Line] = []
            skipped: list[dict[str, str]] = []
            while len(lines) + len(skipped) < self.plan.size(shard):
                batch = next(ready)
                for image, error in batch.bad:
                    if self.settings.bad_images == "error":
                        fix = "; --bad-images skip leaves out images that cannot be read"
                        raise BadSampleError(f"{error}{fix}") from error
                    skipped.append({"filename": image.name, "error": str(error)})
                counts = Counts(skipped=len(batch.bad))
                lines += self._lines(batch, counts)
                yield counts
            self.folder.write(shard, lines, skipped)

    def finish(self) -> dict[str, str] | None:
        """Complete the folder, if all shards are there; return the settings of a dataset of images and labels."""
        if not self.folder.finish():
            return None
        captions = {} if self.settings.captions is None else {"captions": "whole"}
        return self.plan.train_data(self.settings.output) | captions

    def _batches(self, shards: Sequence[int]) -> Iterator[list[PlannedImage]]:
        """Yield the images of the shards in batches, none of which has images of two shards."""
        with ThreadPoolExecutor(1, "vg-shards") as pool:  # to download the next shard before it is needed
            waiting = deque(pool.submit(self.plan.images, shard) for shard in shards[:1])
            for shard in [*shards[1:], None]:
                images = waiting.popleft().result()
                if shard is not None:
                    waiting.append(pool.submit(self.plan.images, shard))
                for start in range(0, len(images), self.settings.batch_size):
                    yield images[start : start + self.settings.batch_size]

    def _prepare(self, images: Sequence[PlannedImage], pixels: Sequence[np.ndarray]) -> Planned:
        prompts = self._prompter.prompts(images)
        wanted = [(x, prompt.phrases) for x, prompt in zip(pixels, prompts, strict=True) if prompt.phrases]
        batch = self.grounder.backend.prepare(*map(list, zip(*wanted, strict=True))) if wanted else None
        return Planned(prompts, batch)

    def _lines(self, ready: Ready[PlannedImage], counts: Counts) -> Iterator[Line]:
        """Predict for a batch, and yield the line of every image."""
        if not ready.images:
            return
        prompts, batch = ready.prepared
        start = time.perf_counter()
        found = iter(self.grounder.backend.predict(batch) if batch is not None else ())
        counts.forward += time.perf_counter() - start
        for image, pixels, prompt in zip(ready.images, ready.pixels, prompts, strict=True):
            boxes = next(found) if prompt.phrases else Boxes(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
            labels = self._selected(Result(image.name, pixels, prompt.phrases, *boxes))
            counts.images += 1
            counts.boxes += len(labels.boxes)
            counts.phrases.update(prompt.phrases[index] for index in labels.phrase_ids.tolist())
            yield {**image.extra, **self._prompter.line(labels, prompt)}

    def _selected(self, result: Result) -> Labels:
        """Select boxes by their thresholds, round them, and leave out those that training leaves out."""
        default = self.grounder.threshold(self.settings.threshold)
        if self.settings.threshold is None and not default:
            result = result.best()
        own = self.settings.phrases or {}
        limits = [default if (limit := own.get(phrase)) is None else limit for phrase in result.phrases]
        result = result.select(result.scores >= np.array(limits, np.float32)[result.phrase_ids])
        if self.settings.nms is not None:
            result = result.nms(self.settings.nms, self.settings.exclusive)
        boxes = np.round(result.boxes.astype(np.float64), 2)
        kept = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
        scores = np.round(result.scores.astype(np.float64), 4)
        return Labels(result.name, *result.size, boxes[kept], scores[kept], result.phrase_ids[kept])

    def _recorded(self) -> dict[str, Any]:
        """Return what determines the labels."""
        settings, plan = self.settings, self.plan
        names = (
            "threshold",
            "nms",
            "exclusive",
            "format",
            "bad_images",
            "batch_size",
            "dtype",
            "tokenizer",
            "shard_size",
            "captions",
        )
        return {
            "model": settings.checkpoint,
            "weights": self.grounder.backend.digest(),
            "overrides": list(settings.overrides),
            "data": settings.data,
            "images": plan.num_images,
            "names": plan.digest,
            "shards": len(plan),
            **{name: getattr(settings, name) for name in names},
            "phrases": settings.phrases and [list(pair) for pair in settings.phrases.items()],
            "pipeline": self._prompter.version if isinstance(self._prompter, Captions) else None,
        }


def local_device(device: str | None, checkpoint: str) -> str | None:
    """Return the GPU of this process among those that torchrun started on this machine, or the device as given."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or device not in (None, "cuda"):
        return device
    if checkpoint.endswith(".onnx"):
        return device and f"cuda:{rank}"
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(rank) % count}" if count else device


def read_threads(device: str) -> int:
    """Return how many threads read images: for a GPU, the share of this process in the cores of the machine."""
    if device.startswith("cpu"):
        return NUM_THREADS
    return min(max(NUM_THREADS, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))), MAX_THREADS)
