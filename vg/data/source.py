"""What every data set of vg is: a sequence of samples that knows where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vg.types import Sample


class DataError(ValueError):
    """Something is wrong with the data; the message names the file, row or key and how to mend it."""


class BadSampleError(DataError):
    """One sample cannot be used (`data.bad_samples: skip` goes on without it)."""


@dataclass(frozen=True)
class Provenance:
    """Which data a result was measured on; every evaluation carries it."""

    data: str  # "refcoco (unc)"
    split: str  # "val"


class Source(Protocol):
    """A data set: rows in, samples out. Fresh scenes or other randomness may depend on `epoch` and `index` only."""

    provenance: Provenance

    def __len__(self) -> int: ...

    def load(self, index: int, epoch: int) -> Sample:
        """Read one sample; raises BadSampleError, naming the item, where that is impossible."""
        ...
