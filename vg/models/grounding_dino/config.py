"""Settings of Grounding DINO; the defaults are the published Swin-T model (OGC)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from vg.errors import ConfigError
from vg.hub import loading
from vg.losses.config import LossConfig
from vg.models.settings import TINY_BERT, ModelSettings, TextEncoderConfig
from vg.settings import Settings, by_name
from vg.types import ImageSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from vg.models.grounding_dino.backbone import Backbone
    from vg.models.grounding_dino.model import GroundingDino

Probability = Annotated[float, Field(ge=0, lt=1)]
Stages = Annotated[list[PositiveInt], Field(min_length=4, max_length=4)]  # a number for each stage of the backbone


@dataclass
class BackboneConfig(Settings, ABC):
    """Settings of every image backbone; the networks are those of transformers."""

    id: str | None = None
    """Hub id or local folder of ImageNet weights to start from; null: random weights, or those of `weights`."""
    stages: list[PositiveInt] = field(default_factory=lambda: [2, 3, 4])
    """Stages (1 to 4) whose outputs become levels of the feature pyramid; the last one must be 4."""

    def __post_init__(self) -> None:
        if self.stages != sorted(set(self.stages)) or self.stages[-1:] != [4]:
            raise ValueError(f"stages ({self.stages}) must be ascending and end with 4: later stages would be unused")

    @abstractmethod
    def transformers_config(self) -> PreTrainedConfig:
        """Return the settings of the network in transformers."""

    def _network(self, architecture: type[PreTrainedModel], pretrained: bool) -> PreTrainedModel:
        settings = self.transformers_config()
        if self.id and pretrained:
            with loading(self.id, "model.backbone.id", ConfigError):
                return architecture.from_pretrained(self.id, config=settings, trust_remote_code=False)
        return architecture(settings)


@dataclass
class SwinConfig(BackboneConfig):
    """Swin transformer (Liu et al. 2021). Swin-B: 128, [2, 2, 18, 2], [4, 8, 16, 32], 12; Swin-L: 192."""

    name: Literal["swin"] = "swin"
    width: PositiveInt = 96
    depths: Stages = field(default_factory=lambda: [2, 2, 6, 2])
    heads: Stages = field(default_factory=lambda: [3, 6, 12, 24])
    window: PositiveInt = 7
    drop_path: Probability = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = [self.width * 2**stage for stage in range(len(self.heads))]
        if any(width % heads for width, heads in zip(widths, self.heads, strict=True)):
            raise ValueError(f"heads ({self.heads}) must divide the widths of the stages ({widths})")

    def transformers_config(self) -> PreTrainedConfig:
        import transformers

        return transformers.SwinConfig(
            embed_dim=self.width,
            depths=self.depths,
            num_heads=self.heads,
            window_size=self.window,
            drop_path_rate=self.drop_path,
            out_features=[f"stage{stage}" for stage in self.stages],
        )

    def build(self, pretrained: bool) -> Backbone:
        from torch import nn
        from transformers import SwinBackbone

        from vg.models.grounding_dino.backbone import Backbone

        network = self._network(SwinBackbone, pretrained)
        # transformers has one more norm after the last stage, whose output is not used.
        for module in network.modules():
            if isinstance(getattr(module, "layernorm", None), nn.LayerNorm):
                module.layernorm = nn.Identity()
        return Backbone(network)


@dataclass
class ResNetConfig(BackboneConfig):
    """ResNet (He et al. 2016) with frozen batch norms; the stem and the first stage are frozen, too."""

    name: Literal["resnet"] = "resnet"
    depths: Stages = field(default_factory=lambda: [3, 4, 6, 3])
    widths: Stages = field(default_factory=lambda: [256, 512, 1024, 2048])
    """Each larger than the one before: in checkpoints the stage of an input projection is known by its width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.widths != sorted(set(self.widths)):
            raise ValueError(f"widths ({self.widths}) must increase from stage to stage")

    def transformers_config(self) -> PreTrainedConfig:
        import transformers

        stages = [f"stage{stage}" for stage in self.stages]
        return transformers.ResNetConfig(depths=self.depths, hidden_sizes=self.widths, out_features=stages)

    def build(self, pretrained: bool) -> Backbone:
        from transformers import ResNetBackbone

        from vg.models.grounding_dino.backbone import Backbone

        network = self._network(ResNetBackbone, pretrained)
        network.embedder.requires_grad_(False)
        network.encoder.stages[0].requires_grad_(False)
        return Backbone(network)


@dataclass
class BertConfig(TextEncoderConfig):
    """BERT (Devlin et al. 2019), the text backbone."""

    id: str | None = "google-bert/bert-base-uncased"
    frozen: bool = False


@dataclass
class ImageConfig(Settings):
    shortest: PositiveInt = 800
    """Shorter side of the resized image in pixels."""
    longest: PositiveInt = 1333
    """Upper limit of the longer side in pixels."""
    mean: tuple[float, float, float] = ImageSpec.mean
    """Of the three channels in 0..1, with which images are normalized; those of ImageNet by default."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = ImageSpec.std
    mix_sizes: bool = False
    """Run images of different sizes through the backbone in one padded pass, as all other implementations do. Padding
    then leaks into Swin's windows, group norms and query positions, and results depend on the rest of the batch. Unlike
    theirs, the query selection never selects a token of the padding, whose box is (1, 1, 1, 1) whatever the image."""


@dataclass
class ClassHeadConfig(Settings):
    """Similarity between a query and a text token, which gives the logit of that token for that query."""

    similarity: Literal["dot", "cosine"] = "dot"
    """cosine needs `scale: learned`."""
    scale: Literal["one", "width", "learned"] = "one"
    """Factor of the similarity: 1 (official), 1/sqrt(width) (MM-Grounding-DINO), or exp of a learned parameter. The
    latter is the inverse temperature of a cosine; mmdetection also adds it when it fine-tunes official weights."""
    bias: bool = False
    """Add a learned bias (MM-Grounding-DINO)."""

    def __post_init__(self) -> None:
        if self.similarity == "cosine" and self.scale != "learned":
            raise ValueError(
                f"similarity=cosine needs scale=learned, not {self.scale}: a cosine is in -1..1, a range too small for "
                "logits"
            )


@dataclass
class DenoisingConfig(Settings):
    """Contrastive denoising in training (DINO, Zhang et al. 2022): extra queries reconstruct boxes from noisy ones."""

    num_queries: PositiveInt = 100
    """Upper limit of positive queries per prompt, but at least one for each box; there are as many negative ones."""
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Half of this fraction of the queries gets a random label."""
    box_noise: Annotated[float, Field(ge=0)] = 1.0
    """Sides move by up to half this fraction of the box size; those of negative queries by half to all of it."""
    num_labels: PositiveInt | None = None
    """Size of the label embedding; phrase ids are taken modulo this number. null: as many as the training data has
    classes if every prompt has all of them, otherwise 256."""


@dataclass
class PredictConfig(Settings):
    """Postprocessing: from the logits and boxes of queries to predictions."""

    score: Literal["mean", "max"] = "mean"
    """Score of a phrase: the mean of its token probabilities, as in COCO evaluation, or their max, as in REC
    evaluation (over all tokens of the prompt if it has a single phrase)."""
    top_k: PositiveInt = 300
    threshold: Probability = 0.0
    """Drop boxes with a lower score."""
    nms: Annotated[float, Field(gt=0, le=1)] | None = None
    """IoU above which the lower-scored of two boxes of a phrase is dropped; null: no NMS, as in published results."""


@dataclass
class GroundingDinoConfig(ModelSettings):
    """Grounding DINO (Liu et al. 2023, arXiv 2303.05499) and MM-Grounding-DINO (Zhao et al. 2024, arXiv 2401.02361)."""

    name: Literal["grounding_dino"] = "grounding_dino"
    weights: str | None = None
    """Checkpoint to start from, in any format: an official or mmdetection .pth, a transformers folder or Hub id, or
    a checkpoint of vg."""
    backbone: Annotated[
        Union[SwinConfig, ResNetConfig],  # noqa: UP007 - pydantic on Python 3.10
        Field(discriminator="name"),
        BeforeValidator(by_name),
    ] = field(default_factory=SwinConfig)
    text: BertConfig = field(default_factory=BertConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    max_tokens: PositiveInt = 256
    """Upper limit of tokens per prompt, special tokens included; phrases that do not fit go into further prompts."""

    width: PositiveInt = 256
    """Channels of image tokens, text tokens and queries."""
    levels: Annotated[int, Field(ge=1, le=5)] = 4
    """Levels of the feature pyramid; those beyond the stages of the backbone are convolved from its last stage. There
    are at most 5: the boxes that the query selection proposes at a sixth level would be larger than the image."""
    encoder_layers: PositiveInt = 6
    decoder_layers: PositiveInt = 6
    heads: PositiveInt = 8
    """Heads of attention over image tokens and queries; text layers and fusion have half as many."""
    points: PositiveInt = 4
    """Sampling points of deformable attention per head and level."""
    feedforward: PositiveInt = 2048
    """Inner width of feed-forward networks; text layers and the fusion attention have half of it."""
    num_queries: PositiveInt = 900
    position_temperature: PositiveFloat = 20.0
    """Temperature of the sine encoding of image positions."""
    logit_eps: tuple[float, float] = (1e-3, 1e-3)
    """Clamp of the inverse sigmoid of boxes, for refinement between layers and for predictions. Official 1e-3, 1e-3;
    mmdetection 1e-3, 1e-5; transformers 1e-5, 1e-5. It matters at image borders."""
    shared_heads: bool = True
    """Share the box and class heads between decoder layers (official); false: one per layer (MM-Grounding-DINO)."""
    fusion: Literal["bidirectional", "gated"] = "bidirectional"
    """How feature enhancer layers combine the modalities: add the attention output, or mix it by a learned gate."""
    classes: ClassHeadConfig = field(default_factory=ClassHeadConfig)

    dropout: Probability = 0.0
    fusion_dropout: Probability = 0.0
    """Dropout of the attention between image and text; mmdetection trains with 0.1, and with drop path 0."""
    fusion_drop_path: Probability = 0.1
    """Stochastic depth of both types of fusion: a sample keeps its own stream with this probability."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: half the memory, but slower."""
    denoising: DenoisingConfig | None = None
    """null: no denoising; mmdetection always trains with it: `denoising: {}`."""
    loss: LossConfig = field(default_factory=LossConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)

    def __post_init__(self) -> None:
        if self.heads % 2 or self.width % self.heads or self.feedforward % self.heads or self.width % 32:
            raise ValueError(
                f"heads ({self.heads}) must be even and divide width ({self.width}) and feedforward "
                f"({self.feedforward}); width must be a multiple of 32 (group norms)"
            )
        if self.levels < len(self.backbone.stages):
            raise ValueError(
                f"{self.levels} levels are fewer than the {len(self.backbone.stages)} stages of the backbone"
            )

    def build(self, pretrained: bool = True) -> GroundingDino:
        """Build the network.

        Args:
            pretrained: load `weights`, or else the weights of backbone and text encoder; False: random weights.
        """
        from vg.models.grounding_dino.model import GroundingDino

        return GroundingDino(self, pretrained)

    @classmethod
    def tiny(cls) -> GroundingDinoConfig:
        """Preset that trains from scratch in seconds on one CPU core, for tests."""
        return cls(
            backbone=SwinConfig(width=16, depths=[1, 1, 1, 1], heads=[1, 2, 4, 8], window=3, drop_path=0.0),
            text=BertConfig(architecture=TINY_BERT),
            image=ImageConfig(shortest=64, longest=120),
            width=64,
            encoder_layers=2,
            decoder_layers=2,
            heads=4,
            points=2,
            feedforward=64,
            num_queries=20,
            fusion_drop_path=0.0,
        )
