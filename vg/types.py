"""The values that cross a folder border: one sample on its way from a file to a number.

Shape legend used in the whole project: B batch, R prompts, Q queries, T text tokens, P phrases, N boxes, L layers,
S image tokens of all levels, D channels, K predicted boxes of one image, H and W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # keeps `import vg` and the configuration free of torch
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One picture with the phrases that name things in it and the boxes of these things.

    A referring expression is a sample with one phrase and one box; a detection image has many of both.
    """

    id: str  # unique within its data set, the same in every run: results are keyed by it
    image: np.ndarray  # [H, W, 3] uint8, RGB
    phrases: tuple[str, ...]  # P phrases
    boxes: np.ndarray  # [N, 4] float32, xyxy in pixels
    phrase_ids: np.ndarray  # [N] int64: boxes[n] shows phrases[phrase_ids[n]]
    expression_type: str = ""  # "relation": results are also reported for each type; empty for none
    crowd: np.ndarray | None = None  # [N] bool: a region of many things that nobody counted; None where no box is one
    areas: np.ndarray | None = None  # [N] float32, square pixels of the things without their surroundings, if known
    shortest: int | None = None  # shorter side in pixels that augmentation wants the image brought to, if any


class Text(NamedTuple):
    """The tokenised prompts of a batch: one for each image, or several where one cannot hold all its phrases."""

    token_ids: Tensor  # [R, T] int64
    mask: Tensor  # [R, T] bool, True = a real token
    phrase_tokens: Tensor  # [R, P, T] bool, the tokens of each phrase of the image; none where another prompt has it
    image_ids: Tensor  # [R] int64, which image of the batch a prompt asks about: 0, 1, 1, 2, ...


@dataclass(frozen=True)
class Target:
    """What a model should have answered for one sample."""

    id: str
    size: tuple[int, int]  # (height, width) of the original image in pixels
    phrases: tuple[str, ...]  # P phrases
    boxes: Tensor  # [N, 4] cxcywh, 0..1 of the image without padding
    phrase_ids: Tensor  # [N] int64
    expression_type: str = ""
    crowd: Tensor | None = None  # [N] bool, as in Sample
    areas: Tensor | None = None  # [N] float32

    def to(self, device: object, non_blocking: bool = False) -> Target:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)  # type: ignore[call-overload]

        crowd, areas = (None if part is None else move(part) for part in (self.crowd, self.areas))
        return replace(self, boxes=move(self.boxes), phrase_ids=move(self.phrase_ids), crowd=crowd, areas=areas)


class PromptTargets(NamedTuple):
    """Ground truth of every prompt of a batch: the boxes of its phrases, padded to the most that a prompt has."""

    boxes: Tensor  # [R, N, 4] cxcywh, 0..1 of the image without padding
    tokens: Tensor  # [R, N, T] bool, the tokens of the phrase of each box
    phrase_ids: Tensor  # [R, N] int64, index of that phrase among the phrases of the image
    mask: Tensor  # [R, N] bool, True = a box; False = padding, which comes last and has no meaning
    counts: tuple[int, ...]  # [R] boxes of each prompt; integers on the host, so that a GPU need not be waited for

    def apply(self, function: Callable[[Tensor], Tensor]) -> PromptTargets:
        boxes, tokens, phrase_ids, mask = map(function, self[:4])
        return PromptTargets(boxes, tokens, phrase_ids, mask, self.counts)

    @classmethod
    def without_boxes(cls, text: Text) -> PromptTargets:
        """Return targets with N = 0, for batches that are only predicted."""
        rows, tokens = text.mask.shape
        mask = text.mask.new_zeros((rows, 0))
        boxes, phrase_ids = mask.unsqueeze(-1).expand(-1, -1, 4).float(), mask.long()
        return cls(boxes, mask.unsqueeze(-1).expand(-1, -1, tokens), phrase_ids, mask, (0,) * rows)


class LossName(NamedTuple):
    """Key of a loss term; `str` gives its name in logs, such as "class", "l1_encoder" or "giou_denoising_layer3"."""

    term: str
    component: str = ""  # "encoder" or "denoising"; empty for the predictions of the model
    layer: int | None = None  # decoder layer, counted from 0; None for the last layer, and where there are no layers

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer{self.layer}"
        return "_".join(filter(None, (self.term, self.component, layer)))


class Features(NamedTuple):
    """What the encoders of a model made of pictures and expressions; what is read from a cache has half precision."""

    image: Tensor  # [B, S, D] the tokens of each picture, those of the grid last
    grid: tuple[int, int]  # rows, columns
    text: Tensor  # [R, T, D]


@dataclass(frozen=True)
class Batch:
    """What a model sees, and what it should have answered.

    Several samples may share a picture: then there are fewer pictures than targets, one prompt for each target, and
    text.image_ids says which picture a prompt asks about.
    """

    images: Tensor  # [B, 3, H, W] float32, normalised; zeros right of and below an image that is smaller than H x W
    sizes: tuple[tuple[int, int], ...]  # B times (height, width) without that padding; not where boxes are measured in
    text: Text
    targets: list[Target]
    prompt_targets: PromptTargets  # the boxes of `targets` by prompt, see vg.data.prompt.prompt_targets
    features: Features | None = None  # in place of pixels and token ids, which then hold nothing

    def to(self, device: object, non_blocking: bool = False) -> Batch:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)  # type: ignore[call-overload]

        features = self.features
        return Batch(
            images=move(self.images),
            sizes=self.sizes,
            text=Text(*map(move, self.text)),
            targets=[target.to(device, non_blocking) for target in self.targets],
            prompt_targets=self.prompt_targets.apply(move),
            features=features and Features(move(features.image), features.grid, move(features.text)),
        )

    def pin_memory(self) -> Batch:
        """The same with images, text and prompt targets in page-locked memory, for DataLoader(pin_memory=True)."""
        return replace(
            self,
            images=self.images.pin_memory(),
            text=Text(*(x.pin_memory() for x in self.text)),
            prompt_targets=self.prompt_targets.apply(lambda x: x.pin_memory()),
        )

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Prediction:
    """The answer for one sample, best box first."""

    id: str
    boxes: Tensor  # [K, 4] float32, xyxy in pixels of the original image
    scores: Tensor  # [K] float32, 0..1
    phrase_ids: Tensor  # [K] int64
    phrases: tuple[str, ...]

    def to(self, device: object) -> Prediction:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device)  # type: ignore[call-overload]

        return replace(self, boxes=move(self.boxes), scores=move(self.scores), phrase_ids=move(self.phrase_ids))


@dataclass(frozen=True)
class ImageSpec(ABC):
    """The pixels a model wants: resized by its own rule, scaled to 0..1, then normalised per channel."""

    mean: tuple[float, float, float] = field(default=(0.485, 0.456, 0.406), kw_only=True)  # ImageNet
    std: tuple[float, float, float] = field(default=(0.229, 0.224, 0.225), kw_only=True)

    @abstractmethod
    def resized(self, height: int, width: int, shortest: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels that an image of this size is brought to.

        Args:
            shortest: shorter side to aim at (see Sample.shortest), where the model leaves a choice.
        """


@dataclass(frozen=True)
class StretchedImage(ImageSpec):
    """Every image becomes height x width."""

    height: int
    width: int

    def resized(self, height: int, width: int, shortest: int | None = None) -> tuple[int, int]:
        return self.height, self.width


@dataclass(frozen=True)
class FittedImage(ImageSpec):
    """The image keeps its shape: the shorter side becomes `shortest`, but the longer one at most `longest` pixels."""

    shortest: int
    longest: int

    def resized(self, height: int, width: int, shortest: int | None = None) -> tuple[int, int]:
        """As the DETR family rounds: 480 x 640 -> 800 x 1066, for the longer side is cut, not rounded."""
        short, long = min(height, width), max(height, width)
        side = shortest or self.shortest
        if long / short * side > self.longest:
            side = max(1, round(self.longest * short / long))
        other = int(side * long / short)
        return (side, other) if height <= width else (other, side)


@dataclass(frozen=True)
class TextSpec:
    """The tokens a model wants."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int  # of one prompt
    # Tokens at which the model takes a prompt of many phrases apart, the first of which closes a phrase of ours;
    # none: a prompt is one expression as it stands.
    delimiters: tuple[str, ...] = ()

    @cached_property
    def delimiter_ids(self) -> tuple[int, ...]:
        """Of begin, end, and those delimiters that the vocabulary has (all unknown words share an id)."""
        ids = self.tokenizer.convert_tokens_to_ids(list(self.delimiters))
        known = (number for number in ids if number != self.tokenizer.unk_token_id)
        return (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, *known)
