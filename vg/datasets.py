"""The datasets of a run: read from images, or from cached features if `data.cache` is set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from vg.cache.key import cache_folder, encodable
from vg.cache.settings import CacheConfig
from vg.cache.source import CachedSource, collate_encoded
from vg.config import DataConfig, RunConfig
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset, RunDataset, SourceDataset
from vg.data.mixture import Mixture, MixtureConfig, SourceConfig, configs_of
from vg.data.overlap import warn_of_unknown_phrases, without_overlap
from vg.data.prompt import Expressions
from vg.data.source import Source
from vg.models.base import GroundingModel
from vg.types import EncodedBatch, EncodedSample


def training_dataset(config: RunConfig, model: GroundingModel, evaluations: Sequence[Source]) -> RunDataset:
    """Return the training samples; its `collate` makes batches for the model.

    Images that are also in `evaluations` cause a warning or are dropped (`data.drop_overlap`). Evaluation data without
    any phrase of the training data causes a warning.

    Raises:
        ConfigError: features of this model cannot be cached.
        CacheError: a cache is missing, stale, incomplete or damaged.
        DataError: no training sample is left.
    """
    data, seed = config.data, config.train.seed
    if data.cache:
        cached = cached_source(data.train, data.cache, data.cache.views, model, seed)
        warn_of_unknown_phrases(cached, evaluations)
        source = without_overlap(cached, evaluations, data.drop_overlap)
        return SourceDataset(source, _collate(model), data.bad_samples)
    everything = data.train.build()
    warn_of_unknown_phrases(everything, evaluations)
    pixels = without_overlap(everything, evaluations, data.drop_overlap)
    collate = Collator(model.image_spec, model.text_spec, one_prompt=True, normalize=False, one_size=data.one_size)
    share_images = data.expressions_per_image > 1
    return GroundingDataset(pixels, data.augment.build(), seed, data.bad_samples, collate, share_images)


def evaluation_dataset(settings: SourceConfig, data: DataConfig, model: GroundingModel) -> RunDataset:
    """Return the samples of an evaluation dataset, without augmentation; raises as training_dataset."""
    if data.cache:
        cached = cached_source(settings, data.cache, ["plain"], model, seed=0)
        return SourceDataset(cached, _collate(model), data.bad_samples)
    collate = Collator(model.image_spec, model.text_spec, normalize=False)
    return GroundingDataset(settings.build(), bad_samples=data.bad_samples, collate=collate, share_images=True)


def cached_source(
    settings: SourceConfig, cache: CacheConfig, views: Sequence[str], model: GroundingModel, seed: int
) -> Source[EncodedSample]:
    """Open the cache of a dataset, or those of a mixture; raises as training_dataset."""
    if isinstance(settings, MixtureConfig):
        cached = [cached_source(dataset, cache, views, model, seed) for dataset in settings.datasets]
        return Mixture(cached, settings.weights, settings.seed)
    (dataset,) = configs_of(settings)
    source = dataset.build()
    return CachedSource(source, cache_folder(dataset, source, cache, views, encodable(model)), seed)


def uncached_text(model: GroundingModel) -> Expressions | None:
    """Return what tokenizes phrases for a text encoder that is trained; None if its features are cached."""
    return None if encodable(model).caches_text else Expressions(model.text_spec)


def _collate(model: GroundingModel) -> Callable[[Sequence[EncodedSample]], EncodedBatch]:
    return partial(collate_encoded, texts=uncached_text(model))
