"""Which data the benchmark is about, and where each split of it is found."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vg.data.overlap import Subset
from vg.data.refcoco.source import Annotation, Refcoco, RefcocoConfig
from vg.errors import ConfigError, DataError, NoSuchSplitError

logger = logging.getLogger(__name__)

HUB = "jxu124/refcoco-benchmark"  # all evaluation splits with their pictures


@dataclass(frozen=True)
class BenchmarkSet:
    """A data set and the places it may lie in, below the folder of all data."""

    title: str
    splits: tuple[str, ...]
    folders: tuple[str, ...] = ()  # of its own, in any form that vg.data.refcoco.source reads
    datasets: tuple[str, ...] = ()  # its names where one place holds several
    partition: str | None = None  # the one that benchmarks are about
    hub: str | None = None
    files: str | None = None  # of single splits


_UNC = ("val", "testA", "testB")
_REVIEWED = "refcocos_annotation_reviewed/{}_{{split}}_reviewed.json"  # as JierunChen/Ref-L4 holds them
SETS = {
    "refcoco": BenchmarkSet("RefCOCO", _UNC, ("refcoco",), ("refcoco_unc",), "unc", HUB),
    "refcoco+": BenchmarkSet(
        "RefCOCO+", _UNC, ("refcoco+", "refcocoplus"), ("refcoco_plus_unc", "refcocoplus_unc"), "unc", HUB
    ),
    "refcocog": BenchmarkSet("RefCOCOg", ("val", "test"), ("refcocog",), ("refcocog_umd",), "umd", HUB),
    "refcoco-m": BenchmarkSet("RefCOCO-M", ("val",), ("refcoco-m",), hub="moondream/refcoco-m"),
    "ref-l4": BenchmarkSet("Ref-L4", ("val", "test"), ("Ref-L4",), hub="JierunChen/Ref-L4"),
    "grefcoco": BenchmarkSet("gRefCOCO", _UNC, ("grefcoco",), partition="unc"),
    "refcoco-reviewed": BenchmarkSet("RefCOCO (reviewed)", _UNC, files=_REVIEWED.format("refcoco")),
    "refcoco+-reviewed": BenchmarkSet("RefCOCO+ (reviewed)", _UNC, files=_REVIEWED.format("refcoco+")),
    "refcocog-reviewed": BenchmarkSet("RefCOCOg (reviewed)", ("val", "test"), files=_REVIEWED.format("refcocog")),
}
DEFAULT = ("refcoco", "refcoco+", "refcocog")


@dataclass(frozen=True)
class Part:
    """One split of one data set, ready to be evaluated."""

    key: str  # of SETS
    split: str
    source: Refcoco | Subset
    annotations: list[Annotation]  # [samples]

    @property
    def title(self) -> str:
        return f"{SETS[self.key].title} {self.split}"

    @property
    def name(self) -> str:
        return f"{self.key} {self.split}"


def open_parts(
    data: Path | None,
    images: Path | None = None,
    sets: Sequence[str] = (),
    splits: Sequence[str] = (),
    limit: int | None = None,
) -> list[Part]:
    """All splits that are asked for.

    Args:
        data: folder with the data sets; by default they come from the Hub, which keeps a copy on this machine.
        images: folder of COCO's train2014 pictures, for annotations without pixels.
        sets: keys of SETS; by default the three of the name RefCOCO, of which those that are not there are left out.
        splits: by default all that are there.
        limit: only so many expressions of each split, evenly spaced; the results are not official then.

    Raises:
        ConfigError: no such data set or split in this benchmark, or no such folder.
        DataError: one that was asked for is not there, or nothing is; or what is there cannot be read.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: {limit} expressions are none to evaluate")
    for key in sets:
        if key not in SETS:
            raise ConfigError(f"--sets: {key!r} is none of {', '.join(SETS)}")
    for option, folder in (("--data", data), ("--images", images)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{option}: {folder} is not a folder")
    keys = sets or DEFAULT
    known = dict.fromkeys(split for key in keys for split in SETS[key].splits)
    for split in splits:
        if split not in known:
            raise ConfigError(f"--splits: {split!r} is none of {', '.join(known)}")
    parts, missing = [], []
    for key in keys:
        for split in SETS[key].splits:
            if splits and split not in splits:
                continue
            try:
                parts.append(_part(key, split, open_source(key, split, data, images), limit))
            except NoSuchSplitError as error:
                missing.append(str(error))
    if missing and (sets or not parts):
        raise DataError("\n  ".join(["not all that was asked for is there:", *missing, _advice(data)]))
    for line in missing:
        logger.warning("left out: %s", line)
    return parts


def open_source(key: str, split: str, data: Path | None, images: Path | None) -> Refcoco:
    """One split, wherever it lies; NoSuchSplitError that names the places where it was looked for."""
    places = _places(SETS[key], split, data, None if images is None else str(images))
    for config in places:
        try:
            return config.build()
        except NoSuchSplitError as error:
            logger.debug("%s", error)
        except DataError as error:
            if data is None:  # no network, most likely
                raise DataError(f"{error}\n{_advice(data)}") from error
            raise
    looked = ", ".join(dict.fromkeys(config.path for config in places)) or "nothing of its name"
    raise NoSuchSplitError(f"{key} {split} is not in {data or 'the Hub'} ({looked})")


def _places(wanted: BenchmarkSet, split: str, data: Path | None, image_root: str | None) -> list[RefcocoConfig]:
    """Where to look, the likeliest place first."""
    if data is None:
        dataset = wanted.datasets[0] if wanted.datasets else None
        hub = RefcocoConfig(path=wanted.hub or "", split=split, dataset=dataset, image_root=image_root)
        return [hub] if wanted.hub else []
    if image_root is None and (data / "train2014").is_dir():
        image_root = str(data)
    places = []
    for folder in (data / name for name in wanted.folders):
        if folder.is_dir():
            partition = wanted.partition if list(folder.glob("refs(*).p")) else None
            places.append(RefcocoConfig(path=str(folder), split=split, image_root=image_root, partition=partition))
    if wanted.files and (data / wanted.files.format(split=split)).is_file():
        file = data / wanted.files.format(split=split)
        places.append(RefcocoConfig(path=str(file), split=split, image_root=image_root))
    for dataset in wanted.datasets:
        for name in ("", "data"):
            if list((data / name).glob(f"{dataset}_*")):
                places.append(RefcocoConfig(path=str(data / name), split=split, image_root=image_root, dataset=dataset))
        for file in (data / "refs.json", data / "refs.jsonl"):
            if file.is_file():
                places.append(RefcocoConfig(path=str(file), split=split, image_root=image_root, dataset=dataset))
    return places


def _part(key: str, split: str, source: Refcoco, limit: int | None) -> Part:
    source.load(0, epoch=0)  # if the pictures are missing, that is better known now
    annotations = source.annotations()
    if limit is None or limit >= len(source):
        return Part(key, split, source, annotations)
    chosen = np.linspace(0, len(source) - 1, limit).round().astype(int)
    part = Subset(source, chosen)
    part.provenance = replace(source.provenance, official=False)
    return Part(key, split, part, [annotations[index] for index in chosen])


def _advice(data: Path | None) -> str:
    """Which files to place where."""
    folder = data or Path("DATA")
    return f"""Place one of these in {folder} and give it as --data:
    the files of {HUB}, which have the pictures in them:
      hf download {HUB} --repo-type dataset --local-dir {folder}
    folders refcoco, refcoco+ and refcocog, each with refs(unc).p or refs(umd).p and instances.json of the refer
      toolbox, or with the files of jxu124/refcoco, jxu124/refcocoplus and jxu124/refcocog
    for further sets: folders refcoco-m and Ref-L4 with the files of moondream/refcoco-m and JierunChen/Ref-L4, a
      folder refcocos_annotation_reviewed out of the latter, a folder grefcoco with grefs(unc).json and instances.json
  and, for all that comes without pixels, COCO's pictures in {folder / "train2014"}, or anywhere with --images"""
