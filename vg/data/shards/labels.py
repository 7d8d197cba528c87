"""Images of a dataset in shards with the labels that vg label has written for them; no image is copied."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from vg.data.detection.issues import RaiseFirstError
from vg.data.detection.line_files import SETTINGS, LineFiles, label_map_of
from vg.data.detection.odvg_lines import read_label_map
from vg.data.shards.index import Index
from vg.data.shards.source import Shards, ShardsConfig
from vg.errors import DataError
from vg.files import read_json


class LabeledShards(Shards):
    """A sample per line of labels; the key `sample` of a line is the index of its image in the shards.

    Args:
        labels: the folder.

    Raises:
        DataError: see Shards and LineFiles; or there are no labels, or labels of another dataset.
    """

    def __init__(self, config: ShardsConfig, labels: str) -> None:
        self._labels = LineFiles(Path(labels))
        self._classes = read_label_map(label_map_of(Path(labels)), RaiseFirstError(labels))
        super().__init__(config)
        digest = hashlib.sha256(super().fingerprint().encode())
        samples = []
        for text, location in self._labels:
            digest.update(text)
            try:
                samples.append(int(json.loads(text)["sample"]))
            except (ValueError, KeyError, TypeError) as error:
                fix = "label the images of these shards with vg label"
                raise DataError(f"{labels}, {location}: no index of a sample ({error!r}); {fix}") from error
        if not samples:
            raise DataError(f"{labels} has no label to train on; label the images with a lower --threshold")
        self._samples = np.array(samples, np.int64)  # [lines]
        file = Path(labels, SETTINGS)
        settings = read_json(file, dict) if file.is_file() else None  # not beside lines that were written otherwise
        other = settings is not None and settings.get("names") != digest_of(
            super().fingerprint(), settings.get("captions")
        )
        if other or (np.diff(self._samples) <= 0).any() or self._samples[-1] >= len(self.index) or samples[0] < 0:
            origin = f", of {settings.get('data')}" if settings else ""
            raise DataError(
                f"{labels} has labels of another dataset than {config.path}{origin}; label its images again"
            )
        self._fingerprint = digest.hexdigest()

    def _parsed(self, index: Index) -> Index:
        names = None if self._classes is None else [name for _, name in self._classes.values()]
        return replace(index, classes=names, category_ids=None, all_detections=names is not None)

    def fingerprint(self) -> str:
        """Return a digest of the index and of the labels."""
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._labels)

    def image_bytes(self, index: int) -> bytes:
        return super().image_bytes(int(self._samples[index]))

    def _line(self, index: int) -> tuple[bytes, str]:
        text, location = self._labels[index]
        return text, f"{self._labels.path}, {location}"

    def shard_ends(self) -> np.ndarray:
        return np.searchsorted(self._samples, super().shard_ends())

    def image_sizes(self, epoch: int) -> np.ndarray:
        return super().image_sizes(epoch)[self._samples]

    def image_groups(self, epoch: int) -> np.ndarray:
        return super().image_groups(epoch)[self._samples]

    def image_keys(self) -> list[str]:
        keys = super().image_keys()
        return [keys[sample] for sample in self._samples.tolist()]


def digest_of(fingerprint: str, captions: str | None) -> str:
    """Return the `names` in labels.json for images of shards, and the key of the captions in their lines."""
    return hashlib.sha256(f"{fingerprint} {captions}".encode()).hexdigest()
