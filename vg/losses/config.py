"""Settings of the set loss; the defaults are mmdetection's for Grounding DINO and MM-Grounding-DINO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from vg.settings import Settings

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass
class MatchingConfig(Settings):
    """What it costs to let a query show a box; the cheapest assignment of all boxes is the match."""

    class_cost: Literal["sum", "mean"] = "sum"
    """Over the tokens of the prompt: the sum of what each costs, be it named by the phrase or not (mmdetection), or the
    mean over the tokens of the phrase (Open-GroundingDino and transformers, with class_weight 1)."""
    class_weight: Weight = 2.0
    l1: Weight = 5.0
    giou: Weight = 2.0


@dataclass
class LossConfig(Settings):
    """Weights of the loss terms; zero switches a term off. Open-GroundingDino: class_weight 2, its matching above."""

    class_weight: Weight = 1.0
    """Of the focal loss between queries and text tokens."""
    l1: Weight = 5.0
    giou: Weight = 2.0
    focal_alpha: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of the positive tokens in the focal loss and in the class cost."""
    focal_gamma: Weight = 2.0
    """How much well classified tokens are discounted."""
    auxiliary: Weight = 1.0
    """Factor of all terms of the decoder layers before the last."""
    encoder: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Factor of all terms of the encoder output that queries are selected from; without any, nothing would learn to."""
    denoising: Weight = 1.0
    """Factor of all terms of the denoising queries, if the model has such."""
    alignment: Weight = 0.0
    """Of a contrastive loss between the vectors of the matched queries and of the tokens that name them (MDETR)."""
    alignment_temperature: Annotated[float, Field(gt=0)] = 0.07
    matching: MatchingConfig = field(default_factory=MatchingConfig)
