"""Settings of Grounding DINO; the defaults are the published Swin-T model (OGC), variants are small differences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import BeforeValidator, Field, PositiveInt

from vg.losses.config import LossConfig
from vg.models.encoder_config import TextEncoderConfig
from vg.models.settings import ModelSettings
from vg.settings import Settings, by_name

if TYPE_CHECKING:
    from vg.models.grounding_dino.image import Backbone
    from vg.models.grounding_dino.model import GroundingDino

Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass
class BackboneConfig(Settings):
    """Any of these, as transformers has it."""

    id: str | None = None
    """Hub id or local folder with ImageNet weights to start from; null starts from random ones, or from `weights`."""
    stages: list[PositiveInt] = field(default_factory=lambda: [2, 3, 4])
    """Which stages (1 to 4) give a level of the feature pyramid each."""

    def __post_init__(self) -> None:
        if self.stages != sorted(set(self.stages)) or self.stages[-1:] != [4]:
            raise ValueError(f"stages ({self.stages}) must rise and end with 4, or the last ones would be for nothing")


@dataclass
class SwinConfig(BackboneConfig):
    """Swin transformer (Liu et al. 2021). Swin-B: 128, [2, 2, 18, 2], [4, 8, 16, 32], 12; Swin-L: 192."""

    name: Literal["swin"] = "swin"
    width: PositiveInt = 96
    depths: list[PositiveInt] = field(default_factory=lambda: [2, 2, 6, 2])
    heads: list[PositiveInt] = field(default_factory=lambda: [3, 6, 12, 24])
    window: PositiveInt = 7
    drop_path: Share = 0.2

    def build(self, pretrained: bool) -> Backbone:
        from torch import nn
        from transformers import SwinBackbone
        from transformers import SwinConfig as NetworkConfig

        from vg.models.grounding_dino.image import Backbone

        settings = NetworkConfig(
            embed_dim=self.width,
            depths=self.depths,
            num_heads=self.heads,
            window_size=self.window,
            drop_path_rate=self.drop_path,
            out_features=[f"stage{stage}" for stage in self.stages],
        )
        network = (
            SwinBackbone.from_pretrained(self.id, config=settings) if self.id and pretrained else SwinBackbone(settings)
        )
        for (
            module
        ) in network.modules():  # transformers has one more norm behind the last stage, whose output no one reads
            if isinstance(getattr(module, "layernorm", None), nn.LayerNorm):
                module.layernorm = nn.Identity()
        return Backbone(network, [self.width * 2 ** (stage - 1) for stage in self.stages])


@dataclass
class ResNetConfig(BackboneConfig):
    """ResNet (He et al. 2016) with frozen batch norms; stem and first stage are not trained."""

    name: Literal["resnet"] = "resnet"
    depths: list[PositiveInt] = field(default_factory=lambda: [3, 4, 6, 3])
    widths: list[PositiveInt] = field(default_factory=lambda: [256, 512, 1024, 2048])

    def build(self, pretrained: bool) -> Backbone:
        from transformers import ResNetBackbone
        from transformers import ResNetConfig as NetworkConfig

        from vg.models.grounding_dino.image import Backbone

        settings = NetworkConfig(
            depths=self.depths,
            hidden_sizes=self.widths,
            out_features=[f"stage{stage}" for stage in self.stages],
        )
        network = (
            ResNetBackbone.from_pretrained(self.id, config=settings)
            if self.id and pretrained
            else ResNetBackbone(settings)
        )
        network.embedder.requires_grad_(False)
        network.encoder.stages[0].requires_grad_(False)
        return Backbone(network, [self.widths[stage - 1] for stage in self.stages])


@dataclass
class BertConfig(TextEncoderConfig):
    id: str | None = "google-bert/bert-base-uncased"
    frozen: bool = False


@dataclass
class ImageConfig(Settings):
    shortest: PositiveInt = 800
    """Shorter side of the resized image in pixels."""
    longest: PositiveInt = 1333
    """Limit of the longer side."""
    mix_sizes: bool = False
    """Images of different sizes share one pass of the backbone, as in all other implementations. Their padding leaks
    into Swin's windows, group norms and query positions, so that results depend on the other images of a batch."""


@dataclass
class ClassHeadConfig(Settings):
    """How a query is compared with a text token; the result is the logit of "this query shows what the token names"."""

    similarity: Literal["dot", "cosine"] = "dot"
    scale: Literal["one", "width", "learned"] = "one"
    """Factor of the similarity: 1 (official), 1/sqrt(width) (MM-Grounding-DINO) or exp of a learned number, which is
    the inverse temperature of a cosine and which mmdetection adds when it fine-tunes official weights."""
    bias: bool = False
    """A learned number is added (MM-Grounding-DINO)."""


@dataclass
class DenoisingConfig(Settings):
    """In training, further queries restore boxes from noisy ones (contrastive denoising, DINO, Zhang et al. 2022)."""

    num_queries: PositiveInt = 100
    """How many positive queries one prompt has at most, and as many negative ones; never fewer than it has boxes."""
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Half of this share of the queries is told a random phrase."""
    box_noise: Annotated[float, Field(ge=0)] = 1.0
    """Sides move by up to half this share of the width or height, those of negative queries by half to all of it."""
    num_labels: PositiveInt = 256
    """Numbers of phrases that are told apart."""


@dataclass
class PredictConfig(Settings):
    """From the logits of all queries to boxes."""

    score: Literal["mean", "max"] = "mean"
    """Over the probabilities of the tokens of a phrase: mean, as COCO results are computed, or max, as REC results are
    (there over all tokens of the prompt, if it has one phrase)."""
    top_k: PositiveInt = 300
    threshold: Share = 0.0
    """Boxes that score lower are left out."""
    nms: Annotated[float, Field(gt=0, le=1)] | None = None
    """IoU above which the worse of two boxes of one phrase is left out; null leaves all, as published results do."""


@dataclass
class GroundingDinoConfig(ModelSettings):
    """Grounding DINO (Liu et al. 2023, arXiv 2303.05499) and MM-Grounding-DINO (Zhao et al. 2024, arXiv 2401.02361)."""

    name: Literal["grounding_dino"] = "grounding_dino"
    weights: str | None = None
    """Checkpoint to start from, in any published dialect: an official or mmdetection .pth, a folder or Hub id of
    transformers, or a checkpoint of vg."""
    backbone: Annotated[
        Union[SwinConfig, ResNetConfig],  # noqa: UP007 - pydantic on Python 3.10
        Field(discriminator="name"),
        BeforeValidator(by_name),
    ] = field(default_factory=SwinConfig)
    text: BertConfig = field(default_factory=BertConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    max_tokens: PositiveInt = 256
    """Of one prompt, special tokens included; phrases beyond go into further prompts."""

    width: PositiveInt = 256
    levels: PositiveInt = 4
    """Of the feature pyramid; those beyond the stages of the backbone are convolved from its last stage."""
    encoder_layers: PositiveInt = 6
    decoder_layers: PositiveInt = 6
    heads: PositiveInt = 8
    """Of attention over image tokens and queries; text layers and fusion have half as many."""
    points: PositiveInt = 4
    """Sampled by deformable attention per head and level."""
    feedforward: PositiveInt = 2048
    """Inner width of the layers; half of it in text layers, and as the width of the fusion attention."""
    num_queries: PositiveInt = 900
    position_temperature: float = 20.0
    """Of the sine encoding of image positions."""
    logit_eps: tuple[float, float] = (1e-3, 1e-3)
    """Smallest distance to 0 and 1 in the inverse sigmoid of a box: where the decoder refines it, and where the head
    predicts it. Official 1e-3, 1e-3; mmdetection 1e-3, 1e-5; transformers 1e-5, 1e-5. It matters at image borders."""
    shared_heads: bool = True
    """All decoder layers share their box and class heads (official); false: each has its own (MM-Grounding-DINO)."""
    fusion: Literal["bidirectional", "gated"] = "bidirectional"
    """What a feature enhancer layer does with what it attended to: add it, or mix it in by a gate."""
    classes: ClassHeadConfig = field(default_factory=ClassHeadConfig)

    dropout: Share = 0.0
    fusion_dropout: Share = 0.0
    """Of the attention between image and text; mmdetection trains with 0.1, and with drop path 0."""
    fusion_drop_path: Share = 0.1
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: half of the memory, but more time."""
    denoising: DenoisingConfig | None = None
    """null trains without; mmdetection always trains with it: `denoising: {}`."""
    loss: LossConfig = field(default_factory=LossConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)

    def __post_init__(self) -> None:
        if self.heads % 2 or self.width % self.heads or self.feedforward % self.heads or self.width % 32:
            raise ValueError(
                f"heads ({self.heads}) must be even and divide width ({self.width}) and feedforward "
                f"({self.feedforward}); width must be a multiple of 32, for the group norms"
            )
        if self.levels < len(self.backbone.stages):
            raise ValueError(
                f"{self.levels} levels are fewer than the {len(self.backbone.stages)} stages of the backbone"
            )

    def build(self, pretrained: bool = True) -> GroundingDino:
        """Build the network.

        Args:
            pretrained: load `weights`, or else those of backbone and text encoder; False gives random ones (a
                checkpoint follows, or only shapes matter).
        """
        from vg.models.grounding_dino.model import GroundingDino

        return GroundingDino(self, pretrained)
