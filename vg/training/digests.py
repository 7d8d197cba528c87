"""Digests of the annotations of a run: a resumed run compares them with those that its checkpoint has."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from accelerate import PartialState

from vg.cache.source import CachedSource
from vg.config import DataConfig
from vg.data.mixture import sources_of
from vg.data.source import Source
from vg.data.subset import Subset
from vg.training.data import describe_source

logger = logging.getLogger(__name__)

CONSEQUENCES = {
    "train": "the run continues at the same position of the epoch, and its next steps differ",
    "eval": "earlier scores are of other data, and only a higher score replaces the best checkpoint",
}


class Digests:
    """Digests of the annotations of some sources; the main process computes them when the first checkpoint is written.

    Args:
        sources: of `config.datasets()`; None for a stream.
    """

    def __init__(self, config: DataConfig, sources: Sequence[Source[Any] | None]):
        self.sources = dict(zip(config.datasets(), sources, strict=True))

    @cached_property
    def _known(self) -> dict[str, tuple[str, str]]:
        """Description and digest of each source."""
        return {
            name: (describe_source(source), " ".join(_fingerprint(part) for part in sources_of(source)))
            for name, source in self.sources.items()
            if source is not None
        }

    def state(self) -> dict[str, tuple[str, str]]:
        """Return what a checkpoint keeps, which the main process writes."""
        return self._known if PartialState().is_main_process else {}

    def warn_of_changes(self, before: Mapping[str, tuple[str, str]], step: int) -> None:
        """Warn of every source that is not as in the checkpoint of a step; images may have been added on purpose."""
        for name, (now, digest) in self.state().items():
            then, old_digest = before.get(name, (now, digest))
            if digest != old_digest:
                role, _, _ = name.partition(".")
                change = f"{then}, now {now}" if then != now else f"{now}, but other annotations"
                logger.warning("data.%s changed since step %d: %s; %s", name, step, change, CONSEQUENCES[role])


def _fingerprint(source: Source[Any]) -> str:
    """Return the digest of the annotations of a source that is not a mixture; its length if it has none."""
    if (digest := source.fingerprint()) is not None:
        return digest
    return _fingerprint(source.source) if isinstance(source, Subset | CachedSource) else str(len(source))
