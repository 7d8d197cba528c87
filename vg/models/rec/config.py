"""Settings of the rec family; the defaults are the published model (frozen DINOv3 ViT-B/16 + BGE-small, 224 px)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import BeforeValidator, Field, PositiveInt

from vg.losses.config import BoxLossConfig, Weight
from vg.models.settings import TINY_BERT, EncoderConfig, ExtraTextEncoderConfig, ModelSettings, TextEncoderConfig
from vg.settings import Settings, by_name

if TYPE_CHECKING:
    from vg.models.rec.heads import DenseHead, PooledHead
    from vg.models.rec.model import RecModel

Dropout = Annotated[float, Field(ge=0, lt=1)]


@dataclass
class VisionEncoderConfig(EncoderConfig):
    id: str | None = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    layers: Annotated[list[int], Field(min_length=1)] | None = None
    """Layers, or stages of Swin and convolutional networks, whose outputs are concatenated along the channels, such as
    [3, 6, 9, 12]; by default the last one."""
    mixed_width: PositiveInt | None = None
    """Mix the channels of the features into this many by a fixed random projection, so that a cache is smaller."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and any(first >= second for first, second in pairwise(self.layers)):
            raise ValueError(f"layers {self.layers}: list each layer once, in increasing order")


@dataclass
class BgeConfig(TextEncoderConfig):
    id: str | None = "BAAI/bge-small-en-v1.5"


@dataclass
class PooledLossConfig(BoxLossConfig):
    """Weights of the loss terms; zero switches a term off. The published model was trained with DIoU alone."""

    diou: Weight = 1.0
    l1: Weight = 0.0
    giou: Weight = 0.0


@dataclass
class DenseLossConfig(BoxLossConfig):
    """Weights of the loss terms; zero switches a box term off, except for the last one."""

    token: Weight = 1.0
    """Cross-entropy between the scores of the image tokens and the tokens inside the ground-truth box; if objects are
    any, the sum of the cross-entropies of all tokens. The scores have no other training signal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.token:
            raise ValueError(
                "token must be positive: otherwise the score head has no gradient, and training with several processes "
                "needs one for every parameter"
            )


@dataclass
class PooledHeadConfig(Settings):
    """The published head: text tokens query the image, and their mean regresses one box."""

    name: Literal["pooled"] = "pooled"
    width: PositiveInt = 512
    layers: PositiveInt = 6
    heads: PositiveInt = 8
    feedforward: PositiveInt = 2048
    dropout: Dropout = 0.1
    loss: PooledLossConfig = field(default_factory=PooledLossConfig)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")

    def build(self, vision_width: int, text_width: int) -> PooledHead:
        from vg.models.rec.heads import PooledHead

        return PooledHead(self, vision_width, text_width)


@dataclass
class DenseHeadConfig(Settings):
    """vg's own head: image and text tokens attend to one another, every image token predicts a score and a box."""

    name: Literal["dense"] = "dense"
    width: PositiveInt = 256
    layers: PositiveInt = 4
    heads: PositiveInt = 8
    feedforward: PositiveInt = 1024
    dropout: Dropout = 0.1
    num_boxes: PositiveInt = 5
    """Number of boxes that `predict` returns, best first; an upper limit with `objects: any`."""
    objects: Literal["one", "any"] = "one"
    """How many objects an expression names: exactly one, or also none or several, with a probability for each box."""
    loss: DenseLossConfig = field(default_factory=DenseLossConfig)

    def __post_init__(self) -> None:
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width ({self.width}) must be a multiple of 4 x heads ({self.heads}): sines and cosines of x and y"
            )

    def build(self, vision_width: int, text_width: int) -> DenseHead:
        from vg.models.rec.any_objects import AnyObjectsHead
        from vg.models.rec.heads import DenseHead

        return (AnyObjectsHead if self.objects == "any" else DenseHead)(self, vision_width, text_width)


HeadConfig = Annotated[
    Union[PooledHeadConfig, DenseHeadConfig],  # noqa: UP007 - Python 3.10 cannot evaluate `|` under Annotated in pydantic
    Field(discriminator="name"),
    BeforeValidator(by_name),
]


@dataclass
class RecConfig(ModelSettings):
    """Referring expression comprehension: one box for one expression, or any number with `head.objects: any`."""

    name: Literal["rec"] = "rec"
    weights: str | None = None
    """Run or checkpoint of vg to start from, whose settings are the same."""
    image_size: PositiveInt = 224
    """Side of the square to which images are stretched, in pixels; a multiple of the stride of the encoder."""
    keep_aspect: bool = False
    """Keep the aspect ratio of an image, up to whole tokens, instead of stretching it: as many tokens as a square of
    image_size has, or slightly fewer."""
    max_tokens: PositiveInt = 64
    """Longest expression in tokens, special tokens included; a longer one is an error."""
    vision: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    text: BgeConfig = field(default_factory=BgeConfig)
    extra_text: ExtraTextEncoderConfig | None = None
    """A second text encoder with a tokenizer of its own, such as {id: openai/clip-vit-base-patch16}: the head gets the
    tokens of both."""
    head: HeadConfig = field(default_factory=PooledHeadConfig)

    @property
    def frozen_encoders(self) -> Mapping[str, EncoderConfig]:
        encoders = (("vision", self.vision), ("text", self.text), ("extra_text", self.extra_text))
        return {name: encoder for name, encoder in encoders if encoder and encoder.frozen and encoder.id}

    def build(self, pretrained: bool = True) -> RecModel:
        from vg.models.rec.model import RecModel

        return RecModel(self, pretrained)

    def rebuild(self) -> RecModel:
        return replace(self, weights=None).build(pretrained=bool(self.frozen_encoders))

    @classmethod
    def tiny(cls) -> RecConfig:
        convnext = {"model_type": "dinov3_convnext", "hidden_sizes": [16, 32], "depths": [1, 1]}
        return cls(
            image_size=32,
            vision=VisionEncoderConfig(architecture=convnext | {"layer_scale_init_value": 1.0}, frozen=False),
            text=BgeConfig(architecture=TINY_BERT, frozen=False),
            head=DenseHeadConfig(width=32, layers=1, heads=2, feedforward=64, dropout=0.0),
        )
