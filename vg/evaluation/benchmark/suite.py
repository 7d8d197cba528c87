"""Datasets and splits of the benchmark, and where they are found."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from vg.data.refcoco.source import Annotation, Refcoco, RefcocoConfig
from vg.data.subset import Subset
from vg.errors import ConfigError, DataError, NoSuchSplitError

logger = logging.getLogger(__name__)

HUB = "jxu124/refcoco-benchmark"  # all evaluation splits with their images


@dataclass(frozen=True)
class BenchmarkDataset:
    """A dataset and its possible locations below the data folder."""

    title: str
    splits: tuple[str, ...]
    folders: tuple[str, ...] = ()  # with this dataset alone, in any format that vg.data.refcoco.source reads
    names: tuple[str, ...] = ()  # its names in files and Hub datasets that hold several datasets
    partition: str | None = None  # the one that published results use
    hub: str | None = None
    files: str | None = None  # of single splits


_UNC = ("val", "testA", "testB")
_REVIEWED = "refcocos_annotation_reviewed/{}_{{split}}_reviewed.json"  # as in JierunChen/Ref-L4
DATASETS = {
    "refcoco": BenchmarkDataset("RefCOCO", _UNC, ("refcoco",), ("refcoco_unc",), "unc", HUB),
    "refcoco+": BenchmarkDataset(
        "RefCOCO+", _UNC, ("refcoco+", "refcocoplus"), ("refcoco_plus_unc", "refcocoplus_unc"), "unc", HUB
    ),
    "refcocog": BenchmarkDataset("RefCOCOg", ("val", "test"), ("refcocog",), ("refcocog_umd",), "umd", HUB),
    "refcoco-m": BenchmarkDataset("RefCOCO-M", ("val",), ("refcoco-m",), hub="moondream/refcoco-m"),
    "ref-l4": BenchmarkDataset("Ref-L4", ("val", "test"), ("Ref-L4",), hub="JierunChen/Ref-L4"),
    "grefcoco": BenchmarkDataset("gRefCOCO", _UNC, ("grefcoco",), partition="unc"),
    "refcoco-reviewed": BenchmarkDataset("RefCOCO (reviewed)", _UNC, files=_REVIEWED.format("refcoco")),
    "refcoco+-reviewed": BenchmarkDataset("RefCOCO+ (reviewed)", _UNC, files=_REVIEWED.format("refcoco+")),
    "refcocog-reviewed": BenchmarkDataset("RefCOCOg (reviewed)", ("val", "test"), files=_REVIEWED.format("refcocog")),
}
DEFAULT = ("refcoco", "refcoco+", "refcocog")


@dataclass(frozen=True)
class BenchmarkSplit:
    """One split of one dataset, ready to be evaluated."""

    dataset: str  # key of DATASETS
    name: str
    source: Refcoco | Subset
    annotations: list[Annotation]  # [samples]

    @property
    def id(self) -> str:
        return f"{self.dataset} {self.name}"

    @property
    def dataset_title(self) -> str:
        return DATASETS[self.dataset].title

    @property
    def title(self) -> str:
        return f"{self.dataset_title} {self.name}"


def open_splits(
    data: Path | None,
    images: Path | None = None,
    datasets: Sequence[str] = (),
    splits: Sequence[str] = (),
    limit: int | None = None,
) -> list[BenchmarkSplit]:
    """Open all requested splits.

    Args:
        data: folder with the datasets; by default they are downloaded from the Hub and cached.
        images: folder of the COCO train2014 images, for annotations without pixels.
        datasets: keys of DATASETS; by default RefCOCO, RefCOCO+ and RefCOCOg, as far as they are found.
        splits: by default all splits.
        limit: use only this many expressions of each split, evenly spaced; the results are not official then.

    Raises:
        ConfigError: the benchmark has no such dataset or split, or a folder does not exist.
        DataError: requested data or all data is missing, or data cannot be read.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: expected at least 1 expression, got {limit}")
    for key in datasets:
        if key not in DATASETS:
            raise ConfigError(f"--datasets: {key!r} is not one of {', '.join(DATASETS)}")
    for option, folder in (("--data", data), ("--images", images)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{option}: {folder} is not a folder")
    keys = datasets or DEFAULT
    known = dict.fromkeys(split for key in keys for split in DATASETS[key].splits)
    for split in splits:
        if split not in known:
            raise ConfigError(f"--splits: {split!r} is not one of {', '.join(known)}")
    found, missing = [], []
    for key in keys:
        for split in DATASETS[key].splits:
            if splits and split not in splits:
                continue
            try:
                found.append(_limited(key, split, open_source(key, split, data, images), limit))
            except NoSuchSplitError as error:
                missing.append(str(error))
    if missing and (datasets or not found):
        raise DataError("\n  ".join(["not all requested data was found:", *missing, _advice(data)]))
    for line in missing:
        logger.warning("left out: %s", line)
    return found


def open_source(key: str, split: str, data: Path | None, images: Path | None) -> Refcoco:
    """Open one split at its first location; raise NoSuchSplitError, which names all locations, if it has none."""
    candidates = _candidates(DATASETS[key], split, data, images)
    for config in candidates:
        try:
            return config.build()
        except NoSuchSplitError as error:
            logger.debug("%s", error)
        except DataError as error:
            if data is None:  # most likely there is no network
                raise DataError(f"{error}\n{_advice(data)}") from error
            raise
    paths = ", ".join(dict.fromkeys(config.path for config in candidates)) or "no matching folder or file"
    raise NoSuchSplitError(f"{key} {split} is not in {data or 'the Hub'} ({paths})")


def _candidates(dataset: BenchmarkDataset, split: str, data: Path | None, images: Path | None) -> list[RefcocoConfig]:
    """Return the locations where a split may be, the most likely one first."""
    if images is None and data is not None and (data / "train2014").is_dir():
        images = data
    locate = partial(RefcocoConfig, split=split, image_root=None if images is None else str(images))
    if data is None:
        return [locate(path=dataset.hub, dataset=next(iter(dataset.names), None))] if dataset.hub else []
    found = []
    for folder in (data / name for name in dataset.folders):
        if folder.is_dir():
            partition = dataset.partition if list(folder.glob("refs(*).p")) else None
            found.append(locate(path=str(folder), partition=partition))
    if dataset.files and (file := data / dataset.files.format(split=split)).is_file():
        found.append(locate(path=str(file)))
    for name in dataset.names:
        paths = [data / folder for folder in ("", "data") if list((data / folder).glob(f"{name}_*"))]
        paths += [file for file in (data / "refs.json", data / "refs.jsonl") if file.is_file()]
        found += [locate(path=str(path), dataset=name) for path in paths]
    return found


def _limited(key: str, split: str, source: Refcoco, limit: int | None) -> BenchmarkSplit:
    annotations = source.annotations()
    if limit is None or limit >= len(source):
        return BenchmarkSplit(key, split, source, annotations)
    indices = np.linspace(0, len(source) - 1, limit).round().astype(int)
    subset = Subset(source, indices)
    subset.provenance = replace(source.provenance, official=False)
    return BenchmarkSplit(key, split, subset, [annotations[index] for index in indices])


def _advice(data: Path | None) -> str:
    """Describe which files to download or copy."""
    folder = data or Path("DATA")
    return f"""Put one of these into {folder} and pass it as --data:
    the files of {HUB}, which include the images:
      hf download {HUB} --repo-type dataset --local-dir {folder}
    folders refcoco, refcoco+ and refcocog, each with refs(unc).p or refs(umd).p and instances.json of the refer
      toolbox, or with the files of jxu124/refcoco, jxu124/refcocoplus and jxu124/refcocog
    for the other datasets: folders refcoco-m and Ref-L4 with the files of moondream/refcoco-m and JierunChen/Ref-L4,
      the folder refcocos_annotation_reviewed of the latter, a folder grefcoco with grefs(unc).json and instances.json
  and, for annotations without pixels, the COCO images in {folder / "train2014"}, or in any folder with --images"""
