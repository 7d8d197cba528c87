"""From samples to the batch that a model specifies: resize, normalize, tokenize, convert boxes to cxcywh in 0..1."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vg import boxes as box_ops
from vg.data.images import normalization, normalized, padded
from vg.data.prompt import Expressions, Prompts
from vg.types import Batch, FittedImage, ImageSpec, PromptTargets, Sample, Target, Text, TextSpec

logger = logging.getLogger(__name__)

STRIDE = 32  # pixels per token in the last stage of a backbone


@dataclass(frozen=True)
class PixelBatch(Batch):
    """A batch as it comes from data workers, with images [B, 3, H, W] uint8; `to` a device normalizes them there."""

    normalization: Tensor = field(kw_only=True)  # [2, 3, 1, 1] float32, mean and standard deviation of pixels 0..255

    def to(self, device: Any, non_blocking: bool = False) -> Batch:  # type: ignore[override]
        """Return a batch for the model; equal to one normalized on the host, bit for bit on a CPU."""
        moved = super().to(device, non_blocking)
        mean, std = moved.normalization
        images = moved.images.float().sub_(mean).div_(std)
        for image, (height, width) in zip(images, self.sizes, strict=True):
            if (height, width) != images.shape[2:]:
                image[:, height:].zero_()
                image[:, :, width:].zero_()
        own = {name: value for name, value in vars(moved).items() if name != "normalization"}
        return Batch(**own | {"images": images})


class Collator:
    """Makes batches according to an image and a text specification.

    Args:
        one_prompt: for training: phrases that do not fit into one prompt are dropped together with their boxes, phrases
            without boxes first. Otherwise such a sample gets several prompts.
        normalize: False makes a PixelBatch, for loaders that move their batches: a quarter of the memory to copy.
        one_size: resize all images of a batch to one size instead of padding them, which changes aspect ratios.

    Raises:
        ConfigError: the tokenizer lacks tokens that the text specification needs.
    """

    def __init__(
        self,
        image_spec: ImageSpec,
        text_spec: TextSpec,
        one_prompt: bool = False,
        normalize: bool = True,
        one_size: bool = False,
    ):
        self.image_spec = image_spec
        self.normalize = normalize
        self.one_size = one_size
        self.texts = Prompts(text_spec, one_prompt) if text_spec.delimiters else Expressions(text_spec)
        self.own_images = one_prompt and isinstance(self.texts, Prompts)  # in training, one prompt has one image
        # Shared memory: only the first worker of a DataLoader that drops boxes warns.
        self._warned = torch.zeros(1, dtype=torch.bool).share_memory_()

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Make a batch; raises DataError naming a sample whose phrases do not fit the model."""
        text = self.texts(samples)
        targets = [_target(sample, self._kept_boxes(sample, text, i)) for i, sample in enumerate(samples)]
        boxes = prompt_targets(text, targets)
        ids: dict[int, int] = {}  # of images, by that of the array
        indices = list(range(len(samples)))
        if not self.own_images:  # samples of one array share its image
            indices = [ids.setdefault(id(sample.image), len(ids)) for sample in samples]
            samples = [samples[indices.index(image_id)] for image_id in range(len(ids))]
        image_ids, max_per_image = torch.tensor(indices), max(map(indices.count, indices))
        if self.normalize:
            images, sizes = self.images(samples)
            return Batch(images, sizes, text, targets, boxes, image_ids, max_per_image)
        sizes = self._sizes(samples)
        pixels, mean_and_std = padded([sample.image for sample in samples], sizes), normalization(self.image_spec)
        return PixelBatch(
            *(torch.from_numpy(pixels), sizes, text, targets, boxes, image_ids, max_per_image),
            normalization=torch.from_numpy(mean_and_std),
        )

    def images(self, samples: Sequence[Sample]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """Return the images [B, 3, H, W], resized, normalized and padded, and the (height, width) without padding."""
        sizes = self._sizes(samples)
        return torch.from_numpy(normalized([sample.image for sample in samples], sizes, self.image_spec)), sizes

    def _sizes(self, samples: Sequence[Sample]) -> tuple[tuple[int, int], ...]:
        resized = self.image_spec.resized
        sizes = tuple(resized(sample.image.shape[0], sample.image.shape[1], sample.shortest) for sample in samples)
        if self.one_size:
            return (_common_size(sizes, self.image_spec),) * len(sizes)
        return sizes

    def _kept_boxes(self, sample: Sample, text: Text, sample_id: int) -> np.ndarray:
        """Return which boxes have their phrase in a prompt: [N] bool."""
        in_prompt = text.phrase_tokens[text.sample_ids == sample_id].any(dim=2).any(dim=0)  # [P]
        kept: np.ndarray = in_prompt.numpy()[sample.phrase_ids]
        if not kept.all() and not self._warned:
            self._warned[0] = True
            logger.warning(
                "%s: dropped %d of %d boxes because their phrases do not fit into the prompt; raise model.max_tokens "
                "or give fewer phrases (this warning is not repeated)",
                sample.id,
                (~kept).sum(),
                len(kept),
            )
        return kept


def _common_size(sizes: Sequence[tuple[int, int]], spec: ImageSpec) -> tuple[int, int]:
    """Return the size of the median aspect ratio; where any is allowed, rounded to multiples of STRIDE: few in all."""
    size = sorted(sizes, key=lambda size: size[1] / size[0])[len(sizes) // 2]
    if not isinstance(spec, FittedImage):
        return size
    height, width = (max(1, min(round(side / STRIDE), spec.longest // STRIDE)) * STRIDE for side in size)
    return height, width


def _target(sample: Sample, kept: np.ndarray) -> Target:
    """Make the target of the boxes that are kept, [N] bool."""

    def select(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values[kept], dtype=dtype)

    size = (sample.image.shape[0], sample.image.shape[1])
    return Target(
        id=sample.id,
        size=size,
        phrases=sample.phrases,
        boxes=box_ops.from_pixels(select(sample.boxes, torch.float32), size),
        phrase_ids=select(sample.phrase_ids, torch.long),
        expression_type=sample.expression_type,
        crowd=None if sample.crowd is None else select(sample.crowd, torch.bool),
        areas=None if sample.areas is None else select(sample.areas, torch.float32),
        caption=None if sample.caption is None else sample.caption.text,
        coverage=None if sample.coverage is None else torch.from_numpy(sample.coverage),
    )


def prompt_targets(text: Text, targets: Sequence[Target]) -> PromptTargets:
    """Select the boxes of every prompt: those of its image whose phrase it contains, in their order, without crowds.

    Called once per batch, on the CPU: on a GPU the counts would cost a synchronization.
    """
    rows = text.sample_ids
    boxes = pad_sequence([target.boxes for target in targets], batch_first=True)[rows]  # [R, N, 4]
    phrase_ids = pad_sequence([target.phrase_ids for target in targets], batch_first=True)[rows]  # [R, N]
    single = [torch.ones_like(t.phrase_ids, dtype=torch.bool) if t.crowd is None else ~t.crowd for t in targets]
    phrase_of_box = phrase_ids.unsqueeze(-1).expand(-1, -1, text.mask.shape[1])
    positive_map = text.phrase_tokens.gather(1, phrase_of_box)  # [R, N, T]
    positive_map = positive_map & pad_sequence(single, batch_first=True)[rows].unsqueeze(-1)
    selected = positive_map.any(dim=-1)  # [R, N]
    counts = selected.sum(dim=1)  # [R]
    mask = torch.arange(int(counts.max()), device=rows.device) < counts.unsqueeze(1)  # [R, most boxes of a prompt]
    order = (~selected).int().argsort(dim=1, stable=True)[:, : mask.shape[1]]
    row = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    return PromptTargets(
        boxes[row, order], positive_map[row, order], phrase_ids[row, order], mask, tuple(counts.tolist())
    )
