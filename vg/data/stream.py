"""Settings of a stream: training data that is read while it is downloaded, in the order of its files."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from pydantic import PositiveInt

from vg.data.detection.vocabulary import VocabularyConfig
from vg.errors import ConfigError, DataError
from vg.hub import loading
from vg.settings import Settings

KEYS = ("__key__", "__url__")  # columns of a webdataset: name of a sample and file


@dataclass
class StreamConfig(Settings):
    """Which dataset to stream. Its rows have an image and an ODVG line, as the files that vg shard writes."""

    name: Literal["stream"] = "stream"
    path: str = field(kw_only=True)
    """What `datasets.load_dataset` opens: a dataset on the Hub, a folder, or a format (parquet, webdataset) for
    `data_files`."""
    data_files: str | list[str] | None = None
    """Files or URLs, which may contain *, such as s3://bucket/train/*.parquet; all files of the dataset by default."""
    subset: str | None = None
    """Configuration of a dataset on the Hub that has several."""
    split: str = "train"
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    samples: PositiveInt = field(kw_only=True)
    """Samples that count as an epoch, because the length of a stream is unknown; a stream is repeated without end."""
    image: str = "image"
    """Column of the images, files inside the rows; in a webdataset the extension of their files, such as jpg."""
    annotation: str = "annotation"
    """Column of the ODVG lines, which are JSON text (see vg.data.detection.odvg); in a webdataset json."""
    window: PositiveInt = 1000
    """Samples that each data worker shuffles together; it keeps two windows in memory, as image files. The order of the
    files is shuffled, too, but not the samples of different files: write files whose samples are shuffled."""
    label_map: str | None = None
    """Json file {"0": "person", ...}, for lines with numbered classes; or index.json of vg shard."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """For numbered classes, see vg.data.detection.vocabulary."""
    captions: Literal["phrases", "whole"] = "phrases"
    """Prompt of a line with a caption, see vg.data.detection.odvg."""

    def __post_init__(self) -> None:
        if self.label_map is None and self.vocabulary != VocabularyConfig():
            raise ValueError("vocabulary is for numbered classes, which need a label_map")

    def build(self) -> NoReturn:
        """Raise ConfigError: a stream has no length and no order, which all uses but training need."""
        raise ConfigError(
            f"{self} is a stream, which can be data.train of vg train only, alone and without a cache: all else needs "
            "samples that can be read in any order, those of any other dataset"
        )

    def __str__(self) -> str:
        files = [self.data_files] if isinstance(self.data_files, str) else self.data_files or []
        return " ".join([self.path, *files[:1], *([f"and {len(files) - 1} more"] if len(files) > 1 else [])])

    def open(self) -> Any:
        """Return the rows as a datasets.IterableDataset, images and lines not decoded.

        Raises:
            ConfigError: datasets is older than 5.2.
            DataError: it cannot be opened, or has no such columns.
        """
        import datasets

        if not hasattr(datasets, "Json"):
            raise ConfigError(f"a stream needs datasets>=5.2, this is {datasets.__version__}: pip install -U datasets")
        image, features = datasets.Image(decode=False), None
        if self.path == "webdataset":  # types that are guessed from the first rows would drop keys of the others
            text = datasets.Value("string")
            features = datasets.Features(
                {self.image: image, self.annotation: datasets.Json(), **dict.fromkeys(KEYS, text)}
            )
        of_hub = self.data_files is None or "/" in self.path
        try:
            with loading(self.path, "data.train.path", DataError, "dataset") if of_hub else nullcontext():
                rows = datasets.load_dataset(
                    self.path,
                    self.subset,
                    data_files=self.data_files,
                    split=self.split,
                    revision=self.revision,
                    features=features,
                    streaming=True,
                )
        except DataError:
            raise
        except Exception as error:  # of the libraries for URLs, of any type
            raise DataError(f"the stream {self} cannot be opened: {type(error).__name__}: {error}") from error
        if rows.features is None:
            raise DataError(f"the columns of {self} have no types, as those of parquet and webdataset files have")
        if missing := {self.image, self.annotation} - {*rows.features}:
            raise DataError(
                f"{self} has no column {' and no column '.join(sorted(missing))}, only {', '.join(rows.features)}; set "
                "data.train.image and data.train.annotation to the columns of the images and of the ODVG lines"
            )
        if isinstance(rows.features[self.annotation], dict):
            raise DataError(
                f"{self}: the column {self.annotation} has keys that were found in some rows; others would be lost. "
                "Store it as JSON text; read a webdataset with path: webdataset and its files in data_files"
            )
        columns = [self.image, self.annotation, *(key for key in KEYS if key in rows.features)]
        return rows.select_columns(columns).cast_column(self.image, image)
