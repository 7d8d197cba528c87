"""The values that pass between folders: a sample on its way from a file to a metric.

Shape legend of the project: B batch, R prompts, Q queries, T text tokens, P phrases, N boxes, L decoder layers, S image
tokens of all levels, D channels, K predicted boxes of one image, H and W pixels; other axes are words: levels, heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from vg.movable import Movable

if TYPE_CHECKING:  # keeps `import vg` and the configuration free of torch
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class Coverage(IntEnum):
    """How far annotators marked the objects of a phrase in an image: not at all, some, or all there are, maybe none."""

    UNKNOWN, SOME, ALL = range(3)


class Caption(NamedTuple):
    """A text that is the prompt of a sample as it stands; the phrases of the sample are spans of it."""

    text: str
    spans: tuple[tuple[tuple[int, int], ...], ...]  # P phrases, each with the (begin, end) of its characters
    location: str = ""  # file and line, for error messages


@dataclass(frozen=True)
class Sample:
    """One image with phrases and the boxes of the objects that they name.

    A referring expression is a sample with one phrase and one box; a detection image has many of both.
    """

    id: str  # unique within its dataset and the same in every run: results are keyed by it
    image: np.ndarray  # [H, W, 3] uint8, RGB
    phrases: tuple[str, ...]  # P phrases
    boxes: np.ndarray  # [N, 4] float32, xyxy in pixels
    phrase_ids: np.ndarray  # [N] int64: boxes[n] belongs to phrases[phrase_ids[n]]
    expression_type: str = ""  # such as "relation": metrics are also reported per type; empty if there are no types
    crowd: np.ndarray | None = None  # [N] bool, crowd regions (COCO `iscrowd`); None without any
    areas: np.ndarray | None = None  # [N] float32, segmentation areas in square pixels, if known
    shortest: int | None = None  # shorter side in pixels that augmentation chose for resizing, if it did
    seed: tuple[int, int, int] | None = None  # (seed, epoch, index), which all random choices depend on
    caption: Caption | None = None  # the prompt, if it is not made of the phrases
    coverage: np.ndarray | None = None  # [P] uint8, a Coverage of each phrase, of federated data; None: ALL


@dataclass(frozen=True)
class EncodedSample:
    """One expression with the features of frozen encoders; the arrays are memory-mapped files."""

    id: str
    image_key: tuple[str, int]  # cache folder, and index of image and view in it: equal for samples of one image
    image: np.ndarray  # [S, D] float16
    grid: tuple[int, int]  # rows and columns of the last tokens
    text: np.ndarray | None  # [T, D] float16; None if the text encoder is trained
    size: tuple[int, int]  # (height, width) of the view in pixels
    phrase: str
    box: np.ndarray  # [4] float32, xyxy in pixels of the view
    expression_type: str


class Text(NamedTuple):
    """Tokenized prompts of a batch: one per sample, or several where one cannot hold all phrases of a sample."""

    token_ids: Tensor  # [R, T] int64
    mask: Tensor  # [R, T] bool, False = padding
    phrase_tokens: Tensor  # [R, P, T] bool, tokens of each phrase of the sample; all False if in another prompt
    sample_ids: Tensor  # [R] int64, index of the sample that a prompt belongs to: 0, 1, 1, 2, ...
    extra: Text | None = None  # the same prompts for a second text encoder


class TextArrays(NamedTuple):
    """Text in NumPy, for inference without torch."""

    token_ids: np.ndarray  # [R, T] int64
    mask: np.ndarray  # [R, T] bool
    phrase_tokens: np.ndarray  # [R, P, T] bool
    sample_ids: np.ndarray  # [R] int64
    extra: TextArrays | None = None

    def tensors(self) -> Text:
        import torch

        return Text._make([*map(torch.from_numpy, self[:4]), self.extra and self.extra.tensors()])


@dataclass(frozen=True)
class Target(Movable):
    """Ground truth of one sample."""

    id: str
    size: tuple[int, int]  # (height, width) of the original image in pixels
    phrases: tuple[str, ...]  # P phrases
    boxes: Tensor  # [N, 4] cxcywh, 0..1 of the image without padding
    phrase_ids: Tensor  # [N] int64
    expression_type: str = ""
    crowd: Tensor | None = None  # [N] bool, as in Sample
    areas: Tensor | None = None  # [N] float32
    caption: str | None = None  # the prompt, if it is not made of the phrases
    coverage: Tensor | None = None  # [P] uint8, as in Sample

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle tensors by value: a data worker would otherwise open a shared file for each of them."""
        return _new_target, tuple(value.numpy() if hasattr(value, "numpy") else value for value in vars(self).values())


def _new_target(*values: Any) -> Target:
    """Make a target of its values, with arrays in place of tensors."""
    import torch

    return Target(*(torch.from_numpy(value) if hasattr(value, "dtype") else value for value in values))  # type: ignore[arg-type]


class PromptTargets(NamedTuple):
    """Ground truth of every prompt of a batch: the boxes of its phrases, padded to the most that a prompt has."""

    boxes: Tensor  # [R, N, 4] cxcywh, 0..1 of the image without padding
    positive_map: Tensor  # [R, N, T] bool, the tokens of the phrase of each box
    phrase_ids: Tensor  # [R, N] int64, index of that phrase among the phrases of the image
    mask: Tensor  # [R, N] bool, True = a box; False = padding, which comes last and has no meaning
    counts: tuple[int, ...]  # [R] boxes of each prompt; on the host, so that reading them needs no synchronization

    @classmethod
    def without_boxes(cls, text: Text) -> PromptTargets:
        """Return targets with N = 0, for batches that are only predicted."""
        mask = text.mask.new_zeros((len(text.mask), 0))
        boxes, positive_map = (mask.unsqueeze(-1).expand(-1, -1, size) for size in (4, text.mask.shape[1]))
        return cls(boxes.float(), positive_map, mask.long(), mask, (0,) * len(mask))


class LossName(NamedTuple):
    """Key of a loss term; `str` gives its name in logs, such as "class", "l1_encoder" or "giou_denoising_layer3"."""

    term: str
    component: str = ""  # "encoder" or "denoising"; empty for the predictions of the model
    layer: int | None = None  # decoder layer, counted from 0; None for the last layer, and where there are no layers

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer{self.layer}"
        return "_".join(filter(None, (self.term, self.component, layer)))


class Features(NamedTuple):
    """Output of a model's encoders and all that its head needs; float16 where it is read from a cache."""

    image: Tensor  # [B, S, D of the image encoder] tokens: class and registers, the cells row by row, padding
    grid: tuple[int, int]  # rows, columns; of the image with the most cells
    text: Tensor | Text  # [R, T, D of the text encoder]; its input if it is trained and only images are cached
    text_mask: Tensor  # [R, T] bool, False = padding
    image_ids: Tensor | None = None  # [R] int64, index of the image of an expression; None: expression r has image r
    max_per_image: int | None = None  # expressions of one image; None: computed from image_ids, which synchronizes
    grids: tuple[tuple[int, int], ...] | None = None  # [B] of each image; None if all are equal: there is no padding


@dataclass(frozen=True)
class Batch(Movable):
    """Input of a model and the ground truth."""

    images: Tensor  # [B, 3, H, W] float32, normalized; zeros right of and below an image smaller than H x W
    sizes: tuple[tuple[int, int], ...]  # B times (height, width) without padding; boxes are relative to Target.size
    text: Text
    targets: list[Target]  # of the samples
    prompt_targets: PromptTargets  # the boxes of `targets` by prompt, see vg.data.collate.prompt_targets
    image_ids: Tensor  # [samples] int64, index of the image of each sample
    max_per_image: int | None = None  # samples that have the same image

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class EncodedBatch(Movable):
    """A batch whose images and expressions are encoded already; expressions (R) may share images (B <= R)."""

    features: Features
    targets: list[Target]  # R, one per expression

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Prediction(Movable):
    """Predicted boxes of one sample, best first."""

    id: str
    boxes: Tensor  # [K, 4] float32, xyxy in pixels of the original image
    scores: Tensor  # [K] float32, 0..1
    phrase_ids: Tensor  # [K] int64
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class ImageSpec(ABC):
    """How a model needs its images: resized by a rule of the subclass, scaled to 0..1, then normalized per channel."""

    mean: tuple[float, float, float] = field(default=(0.485, 0.456, 0.406), kw_only=True)  # ImageNet
    std: tuple[float, float, float] = field(default=(0.229, 0.224, 0.225), kw_only=True)

    @abstractmethod
    def resized(self, height: int, width: int, shortest: int | None = None) -> tuple[int, int]:
        """Return the new (height, width) in pixels of an image; `shortest` (see Sample) applies if the rule has one."""


@dataclass(frozen=True)
class StretchedImage(ImageSpec):
    """Every image is resized to height x width."""

    height: int
    width: int

    def resized(self, height: int, width: int, shortest: int | None = None) -> tuple[int, int]:
        return self.height, self.width


@dataclass(frozen=True)
class FittedImage(ImageSpec):
    """Resize at constant aspect ratio: the shorter side to `shortest`, the longer one to at most about `longest` px."""

    shortest: int
    longest: int

    def resized(self, height: int, width: int, shortest: int | None = None) -> tuple[int, int]:
        """Round as the DETR family: 480 x 640 -> 800 x 1066, because the longer side is truncated."""
        short, long, side = min(height, width), max(height, width), shortest or self.shortest
        if long / short * side > self.longest:
            side = max(1, round(self.longest * short / long))
        other = int(side * long / short) if side > 1 else min(int(long / short), self.longest)  # if one pixel wide
        return (side, other) if height <= width else (other, side)


@dataclass(frozen=True)
class TextSpec:
    """How a model needs its text."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int  # of one prompt, special tokens included
    delimiters: tuple[str, ...] = ()  # the first is appended to every phrase; empty: a prompt is one expression
    positions: int | None = None  # of the text encoder, if limited; with delimiters, they restart in every phrase
    extra: TextSpec | None = None  # of a second text encoder

    @cached_property
    def delimiter_ids(self) -> tuple[int, ...]:
        """Token ids of [CLS], [SEP] and those delimiters that are in the vocabulary (unknown words share an id)."""
        ids = self.tokenizer.convert_tokens_to_ids(list(self.delimiters))
        known = (token_id for token_id in ids if token_id != self.tokenizer.unk_token_id)
        return (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, *known)
