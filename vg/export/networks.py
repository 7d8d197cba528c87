"""Both families as modules from tensors to tensors: a text encoder, a detector, and the two together.

Every image is queried with every prompt. Grounding DINO takes one prompt of any number of phrases at a time, rec takes
N prompts of one expression each; the rows of its head are the B * N pairs, image by image.
"""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vg import boxes as box_ops
from vg.errors import ConfigError
from vg.models.base import GroundingModel
from vg.models.grounding_dino.model import GroundingDino
from vg.models.grounding_dino.postprocess import best_pairs, phrase_scores
from vg.models.grounding_dino.text_encoder import TextFeatures
from vg.models.rec.model import RecModel
from vg.types import Features, Text


class Detections(NamedTuple):
    """The output of a detector: the K best boxes of every image, best first."""

    boxes: Tensor  # [B, K, 4] xyxy in 0..1 of the image
    scores: Tensor  # [B, K] in 0..1; not positive for a phrase that is in none of the prompts
    phrase_ids: Tensor  # [B, K] int64, index of the phrase; of the prompt, if that is one expression


class GroundingDinoText(nn.Module):
    """Prompts -> their features, which do not depend on the image."""

    def __init__(self, model: GroundingDino):
        super().__init__()
        self.text = model.text
        self.delimiters = model.text_spec.delimiter_ids

    def forward(self, token_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, T] int64 and bool (False = padding) -> [N, T, D], [N, T, D] and [N, T, T] bool, see TextFeatures."""
        text = self.text(token_ids, mask, self.delimiters)
        return text.tokens, text.positions, text.sub_sentences


class GroundingDinoDetector(nn.Module):
    """Images and features of prompts -> boxes; all images of a batch have one size, so that none is padded."""

    def __init__(self, model: GroundingDino):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor, phrase_tokens: Tensor, *features: Tensor) -> Detections:
        """images [B, 3, H, W], mask [1, T] bool, phrase_tokens [1, P, T] bool (see vg.types.Text), features."""
        model, count = self.model, images.shape[0]
        levels = model.neck(model.backbone(images))
        image = model.neck.flatten(levels, [[(x.shape[-2], x.shape[-1]) for x in levels]])
        image = image._replace(
            positions=image.positions.expand_as(image.tokens), centers=image.centers.expand(count, -1, -1)
        )
        tokens, *rest = (x.expand(count, *x.shape[1:]) for x in (*features, mask, phrase_tokens))
        output = model.ground(image, TextFeatures(tokens, *rest[:-1]))
        # As in `vg.models.grounding_dino.postprocess`: a single phrase may score all tokens of its prompt.
        num_phrases = torch.ones_like(phrase_tokens[0, :, 0], dtype=torch.int64).sum()
        extra = rest[-2] & (num_phrases == 1)
        scores = phrase_scores(output.logits[-1], rest[-1], extra, model.config.predict.score)  # [B, Q, P]
        boxes, scores, phrase_ids = best_pairs(output.boxes[-1], scores, model.config.predict.top_k)
        return Detections(_corners(boxes), scores, phrase_ids)


class RecText(nn.Module):
    """Expressions -> their features."""

    def __init__(self, model: RecModel):
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, mask: Tensor) -> tuple[Tensor]:
        """[N, T] int64 and bool (False = padding) -> [N, T, D]."""
        return self.model.encode_text(Text(token_ids, mask, mask, mask))[:1]


class RecDetector(nn.Module):
    """Images and features of expressions -> boxes."""

    def __init__(self, model: RecModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor, features: Tensor) -> Detections:
        """images [B, 3, H, W], mask [N, T] bool, features [N, T, D]."""
        model, count = self.model, (images.shape[0], mask.shape[0])
        image, grid = model.encode_images(images)
        head = model.head(Features(by_image(image, count), grid, by_prompt(features, count), by_prompt(mask, count)))
        boxes, scores = model.head.select_boxes(head)  # [B * N, K, 4], [B * N, K]
        boxes, scores = boxes.unflatten(0, count), scores.unflatten(0, count)
        phrase_ids = torch.arange(count[1], device=images.device).view(1, -1, 1).expand_as(scores)
        scores, order = scores.flatten(1).topk(scores.shape[1] * scores.shape[2])
        boxes = boxes.flatten(1, 2).take_along_dim(order.unsqueeze(-1), 1)
        return Detections(_corners(boxes), scores, phrase_ids.flatten(1).take_along_dim(order, 1))


class EndToEnd(nn.Module):
    """A text encoder and a detector; the inputs are those of the detector, with tokens in place of features."""

    def __init__(self, text: nn.Module, detector: nn.Module):
        super().__init__()
        self.text, self.detector = text, detector

    def forward(self, images: Tensor, token_ids: Tensor, mask: Tensor, *phrase_tokens: Tensor) -> Detections:
        return self.detector(images, mask, *phrase_tokens, *self.text(token_ids, mask))


class Networks(NamedTuple):
    text: nn.Module
    detector: nn.Module
    phrase_tokens: tuple[str, ...]  # the names of the inputs of the detector between mask and features
    features: dict[str, tuple[str, ...]]  # outputs of the text encoder -> the names of their axes
    fixed: dict[str, int]  # axes that are not dynamic -> their size


@singledispatch
def networks(model: GroundingModel) -> Networks:
    """Return text encoder and detector; raises ConfigError for a family without an export."""
    raise ConfigError(f"the family {type(model).__name__} cannot be exported; register it in vg/export/networks.py")


@networks.register
def _(model: GroundingDino) -> Networks:
    axes = ("prompts", "tokens")
    features = {"text_tokens": axes, "text_positions": axes, "text_sub_sentences": (*axes, "tokens")}
    return Networks(
        GroundingDinoText(model), GroundingDinoDetector(model), ("phrase_tokens",), features, {"prompts": 1}
    )


@networks.register
def _(model: RecModel) -> Networks:
    if model.config.keep_aspect:
        raise ConfigError(
            "model.keep_aspect=true cannot be exported yet: an exported rec takes images of one size; train with "
            "model.keep_aspect=false, or predict with the checkpoint"
        )
    if model.extra_text is not None:
        raise ConfigError(
            "a rec model with model.extra_text cannot be exported yet: a file contains one tokenizer; predict with the "
            "checkpoint"
        )
    size = dict.fromkeys(("height", "width"), model.config.image_size)  # every image is stretched to it
    return Networks(RecText(model), RecDetector(model), (), {"text_tokens": ("prompts", "tokens")}, size)


def by_image(x: Tensor, count: tuple[int, int]) -> Tensor:
    """[B, ...] -> [B * N, ...]: the value of the image of each row."""
    return x.unsqueeze(1).expand(*count, *x.shape[1:]).flatten(0, 1)


def by_prompt(x: Tensor, count: tuple[int, int]) -> Tensor:
    """[N, ...] -> [B * N, ...]: the value of the prompt of each row."""
    return x.unsqueeze(0).expand(*count, *x.shape[1:]).flatten(0, 1)


def _corners(boxes: Tensor) -> Tensor:
    return box_ops.cxcywh_to_xyxy(boxes.float()).clamp(0, 1)
