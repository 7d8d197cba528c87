"""What training and evaluation data share: images, which are reported or removed from training, and phrases."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from vg.data.detection.vocabulary import normalized_name
from vg.data.mixture import Mixture, sources_of
from vg.data.source import Loaded, Source
from vg.data.subset import Subset
from vg.errors import DataError


def without_overlap(train: Source[Loaded], evaluations: Sequence[Source], drop: bool) -> Source[Loaded]:
    """Return the training source, if `drop` without the samples whose image is also in an evaluation source.

    RefCOCO, RefCOCO+ and RefCOCOg all use images of COCO train2014, so the training split of one contains images of the
    test splits of another. Images are identified by their COCO id in the file name, otherwise by their path; generated
    images are never shared. Every overlap causes a warning.

    Raises:
        DataError: no training sample is left.
    """
    if isinstance(train, Mixture):
        sources = [without_overlap(source, evaluations, drop) for source in train.sources]
        return Mixture(sources, train.weights, train.seed)
    if (keys := train.image_keys()) is None:
        return train
    shared = np.zeros(len(keys), bool)  # [samples]
    for evaluation in (source for mixture in evaluations for source in sources_of(mixture)):
        if (evaluated_keys := evaluation.image_keys()) is not None:
            evaluated = set(evaluated_keys)
            overlap = np.array([key in evaluated for key in keys], bool)
            shared |= overlap
            if overlap.any():
                warnings.warn(
                    f"{overlap.sum()} of {len(train)} training samples of {train.provenance} have "
                    f"{len(evaluated & set(keys))} of the {len(evaluated)} images that {evaluation.provenance} is "
                    "evaluated on; "
                    + ("they are dropped from training" if drop else "data.drop_overlap=true drops them from training"),
                    stacklevel=2,
                )
    if not drop or not shared.any():
        return train
    if shared.all():
        raise DataError(
            f"{train.provenance}: every image is also in the evaluation data; take another split, or set "
            "data.drop_overlap=false"
        )
    return Subset(train, np.flatnonzero(~shared))


def warn_of_unknown_phrases(train: Source, evaluations: Sequence[Source]) -> None:
    """Warn of each evaluation source without any phrase of the training data, as far as the sources list phrases.

    Names of classes are compared with each other; expressions are free text, of which words are compared.
    """
    known = [_described(source) for source in sources_of(train)]
    if not all(names for names, _ in known):
        return
    for evaluation in (source for mixture in evaluations for source in sources_of(mixture)):
        names, is_text = _described(evaluation)
        by_word = is_text or any(is_text for _, is_text in known)
        trained = set().union(*(_units(names, by_word) for names, _ in known))
        if names and not trained & _units(names, by_word):
            listed = ", ".join(map(repr, sorted(names)[:3])) + (", ..." if len(names) > 3 else "")
            warnings.warn(
                f"{evaluation.provenance} is evaluated on {listed}: not one of these phrases is in the training data, "
                f"{train.provenance}; correct data.train or data.eval unless you want zero-shot evaluation",
                stacklevel=2,
            )


def _described(source: Source) -> tuple[set[str], bool]:
    """Return the phrases of a source, empty if it does not list them, and whether they are free text."""
    if source.category_ids is not None:
        return set(source.category_ids), False
    return {phrase for _, phrases in source.sample_phrases() for phrase in phrases}, True


def _units(names: set[str], by_word: bool) -> set[str]:
    """Return what is compared: normalized names, or all their words."""
    normalized = set(map(normalized_name, names))
    return {word for name in normalized for word in name.split()} if by_word else normalized
