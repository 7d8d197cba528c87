"""Settings of the rec family; the defaults are the published model (frozen DINOv3 ViT-B/16 + BGE-small, 224 px)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import BeforeValidator, Field

from vg.models.encoder_config import TINY_BERT, EncoderConfig, TextEncoderConfig
from vg.settings import Settings, by_name

if TYPE_CHECKING:
    from vg.models.rec.heads import DenseHead, PooledHead
    from vg.models.rec.model import RecModel


@dataclass
class VisionEncoderConfig(EncoderConfig):
    id: str | None = "facebook/dinov3-vitb16-pretrain-lvd1689m"


@dataclass
class BgeConfig(TextEncoderConfig):
    id: str | None = "BAAI/bge-small-en-v1.5"


@dataclass
class PooledLossConfig(Settings):
    """Weights of the loss terms; zero switches a term off. The published model was trained with DIoU alone."""

    diou: float = 1.0
    l1: float = 0.0
    giou: float = 0.0


@dataclass
class DenseLossConfig(Settings):
    """Weights of the loss terms; zero switches a term off."""

    token: float = 1.0
    """Cross-entropy between the scores of the image tokens and the tokens inside the true box."""
    diou: float = 0.0
    l1: float = 5.0
    giou: float = 2.0


@dataclass
class PooledHeadConfig(Settings):
    """The published head: text tokens query the image, their mean regresses one box."""

    name: Literal["pooled"] = "pooled"
    width: int = 512
    layers: int = 6
    heads: int = 8
    feedforward: int = 2048
    dropout: float = 0.1
    loss: PooledLossConfig = field(default_factory=PooledLossConfig)

    def build(self, vision_width: int, text_width: int) -> PooledHead:
        from vg.models.rec.heads import PooledHead

        return PooledHead(self, vision_width, text_width)


@dataclass
class DenseHeadConfig(Settings):
    """Our head: image and text tokens attend to one another, every image token scores itself and proposes a box."""

    name: Literal["dense"] = "dense"
    width: int = 256
    layers: int = 4
    heads: int = 8
    feedforward: int = 1024
    dropout: float = 0.1
    num_boxes: int = 5
    """How many boxes `predict` returns, best first."""
    loss: DenseLossConfig = field(default_factory=DenseLossConfig)

    def __post_init__(self) -> None:
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width ({self.width}) must be a multiple of 4 x heads ({self.heads}): sines and cosines of x and y"
            )

    def build(self, vision_width: int, text_width: int) -> DenseHead:
        from vg.models.rec.heads import DenseHead

        return DenseHead(self, vision_width, text_width)


HeadConfig = Annotated[
    Union[PooledHeadConfig, DenseHeadConfig],  # noqa: UP007 - Python 3.10 cannot evaluate `|` under Annotated in pydantic
    Field(discriminator="name"),
    BeforeValidator(by_name),
]


@dataclass
class RecConfig(Settings):
    """Referring expression comprehension: one expression, one box."""

    name: Literal["rec"] = "rec"
    image_size: int = 224
    """Side of the square that images are stretched to, in pixels."""
    max_tokens: int = 64
    """Longest expression in tokens, the two special ones included; a longer one is an error."""
    vision: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    text: BgeConfig = field(default_factory=BgeConfig)
    head: HeadConfig = field(default_factory=PooledHeadConfig)

    def build(self, pretrained: bool = True) -> RecModel:
        """Build the network.

        Args:
            pretrained: load the weights of encoders that have an id; False gives random ones (a checkpoint follows,
                or only shapes matter).
        """
        from vg.models.rec.model import RecModel

        return RecModel(self, pretrained)

    def build_without_encoders(self) -> RecModel:
        """The network for features that the frozen encoders made before; raises ConfigError where one is not frozen."""
        from vg.models.rec.model import RecModel

        return RecModel(self, encoders=False)

    def rebuild(self) -> RecModel:
        """The network for a checkpoint of vg to be loaded into, which brings all but the frozen encoders."""
        return self.build()

    @classmethod
    def tiny(cls) -> RecConfig:
        """Preset that trains from scratch in seconds on one CPU core, for tests."""
        convnext = {"model_type": "dinov3_convnext", "hidden_sizes": [16, 32], "depths": [1, 1]}
        return cls(
            image_size=32,
            vision=VisionEncoderConfig(architecture=convnext | {"layer_scale_init_value": 1.0}, frozen=False),
            text=BgeConfig(architecture=TINY_BERT, frozen=False),
            head=DenseHeadConfig(width=32, layers=1, heads=2, feedforward=64, dropout=0.0),
        )
