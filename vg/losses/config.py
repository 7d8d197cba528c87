"""Settings of the losses; the defaults are mmdetection's for Grounding DINO and MM-Grounding-DINO."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from vg.settings import Settings

Weight = NonNegativeFloat


@dataclass
class BoxLossConfig(Settings):
    """Weights of the box terms of both families (`BOX_TERMS` of vg.losses.terms); zero switches a term off.

    One of them must be positive.
    """

    diou: Weight = 0.0
    l1: Weight = 5.0
    giou: Weight = 2.0

    def __post_init__(self) -> None:
        if not any(self.box_weights().values()):
            raise ValueError(
                f"give one of {', '.join(self.box_weights())} a positive weight: otherwise the box head has no "
                "gradient, and training with several processes needs one for every parameter"
            )

    def box_weights(self) -> dict[str, float]:
        """Return the weights of the box terms by name, without those of other terms that a subclass adds."""
        return {term.name: getattr(self, term.name) for term in fields(BoxLossConfig)}


@dataclass
class MatchingConfig(Settings):
    """Cost weights of Hungarian matching between queries and boxes."""

    class_cost: Literal["sum", "mean"] = "sum"
    """Class cost: the sum over all tokens of the prompt, positive or negative (mmdetection), or the mean over the
    tokens of the phrase (Open-GroundingDino and transformers, with class_weight 1)."""
    class_weight: Weight = 2.0
    l1: Weight = 5.0
    giou: Weight = 2.0


@dataclass
class LossConfig(BoxLossConfig):
    """Weights of the loss terms; zero switches a term off. The class term, one box term and `encoder` are needed.

    Open-GroundingDino: class_weight 2 and matching {class_cost: mean, class_weight: 1}.
    """

    class_weight: Weight = 1.0
    """Weight of the focal loss between queries and text tokens; the class logits have no other training signal."""
    focal_alpha: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Weight of positive tokens in the focal loss and in the class cost."""
    focal_gamma: Weight = 2.0
    """Focusing exponent: higher values reduce the loss of well-classified tokens."""
    auxiliary: Weight = 1.0
    """Factor of all terms of the decoder layers before the last one."""
    encoder: PositiveFloat = 1.0
    """Factor of all terms of the selected image tokens; query selection has no other training signal."""
    denoising: Weight = 1.0
    """Factor of all terms of the denoising queries, if there are any."""
    alignment: Weight = 0.0
    """Weight of a contrastive loss between matched queries and the tokens of their phrases (MDETR)."""
    alignment_temperature: PositiveFloat = 0.07
    matching: MatchingConfig = field(default_factory=MatchingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.class_weight:
            raise ValueError(
                "class_weight must be positive: otherwise the class logits are not trained and their bias has no "
                "gradient, and training with several processes needs one for every parameter"
            )
