"""What a run reads: its data as published, or the features that frozen encoders made of it before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vg.cache.source import FORMAT, CachedSource, CacheFolder
from vg.cache.views import image_indices
from vg.config import CacheConfig, DataConfig, RunConfig
from vg.data import DatasetConfig
from vg.data.mixture import Mixture, MixtureConfig, SourceConfig
from vg.data.samplers import EpochSampler, ImageGroupedSampler
from vg.data.source import HasFingerprint, HasImageKeys, Source
from vg.errors import ConfigError
from vg.models.base import EncodableModel, EncodableModelConfig, GroundingModel


def build_model(config: RunConfig) -> GroundingModel:
    """The model to train, without its encoders where their features come from a cache.

    Raises:
        ConfigError: the model has no encoders whose features could be cached, or trains them.
    """
    if config.data.cache is None:
        return config.model.build()
    if not isinstance(config.model, EncodableModelConfig):
        raise ConfigError(f"data.cache: {config.model.name} needs pixels, no features can be cached for it; remove it")
    return config.model.build_without_encoders()


def training_source(config: RunConfig, model: GroundingModel) -> Source:
    """The training data.

    Raises:
        CacheError: features are to be read that are missing, stale, incomplete or damaged.
    """
    data = config.data
    if data.cache is None:
        return data.train.build()
    return _cached(data.train, data.cache, data.cache.views, model, config.train.seed)


def evaluation_source(settings: SourceConfig, data: DataConfig, model: GroundingModel) -> Source:
    """The same for one of the evaluation sets, whose pictures are shown as they are."""
    return settings.build() if data.cache is None else _cached(settings, data.cache, ["plain"], model, 0)


def training_order(config: RunConfig, source: Source) -> EpochSampler:
    """The order of the training samples."""
    if config.data.cache is not None and config.data.cache.together > 1:
        return ImageGroupedSampler(source, config.train.seed, config.data.cache.together)
    return EpochSampler(len(source), config.train.seed)


def parts(data: DataConfig, cache: CacheConfig) -> list[tuple[DatasetConfig, Sequence[str]]]:
    """All single sources that a run reads, each with the views of it that a cache keeps."""
    wanted: list[tuple[SourceConfig, Sequence[str]]] = [(data.train, cache.views)]
    wanted += [(settings, ["plain"]) for settings in data.eval_datasets().values()]
    return [
        (part, views)
        for settings, views in wanted
        for part in (settings.parts if isinstance(settings, MixtureConfig) else [settings])
    ]


def cache_folder(
    settings: DatasetConfig, source: Source, cache: CacheConfig, views: Sequence[str], model: EncodableModel
) -> CacheFolder:
    """Where the features of a source lie; raises ConfigError where an encoder is not frozen."""
    numbers = image_indices(source)
    key: dict[str, Any] = {
        "data": source.provenance.data,
        "split": source.provenance.split,
        "settings": asdict(settings),
        "samples": len(source),
        "annotations": source.fingerprint() if isinstance(source, HasFingerprint) else None,
        "pictures": _digest(source.image_keys()) if isinstance(source, HasImageKeys) else None,
        "views": list(views),
        "transform": {"name": type(model.image_spec).__name__, **asdict(model.image_spec)},
        **model.feature_key(),
        "format": dict(FORMAT),
    }
    return CacheFolder(Path(cache.folder), key, int(numbers.max()) + 1)


def _cached(
    settings: SourceConfig, cache: CacheConfig, views: Sequence[str], model: GroundingModel, seed: int
) -> Source:
    if isinstance(settings, MixtureConfig):
        cached = [_cached(part, cache, views, model, seed) for part in settings.parts]
        return Mixture(cached, settings.weights, settings.seed)
    if not isinstance(model, EncodableModel):
        raise ConfigError("data.cache: this model needs pixels; set data.cache=null")
    source = settings.build()
    return CachedSource(source, cache_folder(settings, source, cache, views, model), seed)


def _digest(values: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()
