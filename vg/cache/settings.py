"""Settings of the cache of features (`data.cache`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from vg.settings import Settings, no_from_yaml


@dataclass
class CacheConfig(Settings):
    """Features of frozen encoders on disk, which `vg cache` writes; training and evaluation read them, not images."""

    folder: str
    views: Annotated[list[Literal["plain", "flip", "crop", "flip_crop"]], Field(min_length=1)] = field(
        default_factory=lambda: ["plain"]
    )
    """Versions of each training image, one of which is drawn per epoch: as it is, flipped with "left" and "right"
    swapped in the phrases, cropped without losing a box, or both; all take the same space on disk."""
    resident: Literal["auto", True, False] = "auto"
    """Keep the features of the training data in the memory of the device and make batches there, without data workers.
    auto: if they take at most half of the free memory of a GPU, or a quarter of the available RAM on a CPU. true: an
    error if they do not fit. The samples and batches are the same."""
    precision: Annotated[Literal["no", "bf16"], BeforeValidator(no_from_yaml)] = "no"
    """bf16: `vg cache` runs the encoders in mixed precision (autocast), faster on a GPU. Such features are a cache of
    their own: it does not serve a run that asks for `no`, which is float32."""
    trust: bool = False
    """Use the features without comparing the image files with those that were encoded."""

    def __post_init__(self) -> None:
        if twice := [view for view in ("plain", "flip") if self.views.count(view) > 1]:
            raise ValueError(f"views lists {' and '.join(twice)} twice, with the same features; list each once")
