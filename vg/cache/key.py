"""What cached features depend on, and the search for a cache with such features.

A key contains paths, but a cache is found by content: paths do not count where other entries determine the content,
such as the digests of all annotations and of an encoder's weights. The index has sizes and digests of the image files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vg.cache.format import FORMAT, INDEX, KEY, CacheFolder, read_index
from vg.cache.images import changed_images, files_of, image_indices
from vg.cache.settings import CacheConfig
from vg.data.mixture import OneDatasetConfig
from vg.data.source import Source
from vg.errors import CacheError, ConfigError
from vg.files import read_json
from vg.models.base import EncodableModel, GroundingModel
from vg.settings import changes

logger = logging.getLogger(__name__)

# Settings of a dataset that determine where its files are, not what is in them.
LOCATIONS = ("path", "image_root", "label_map", "labels", "cache", "cache_gb")


def encodable(model: GroundingModel) -> EncodableModel:
    """Return the model; raises ConfigError if it has no encoders whose features could be cached."""
    if not isinstance(model, EncodableModel):
        raise ConfigError(f"data.cache: {type(model).__name__} has no features that can be cached; set data.cache=null")
    return model


def cache_folder(
    settings: OneDatasetConfig, source: Source, cache: CacheConfig, views: Sequence[str], model: EncodableModel
) -> CacheFolder:
    """Return the folder with the features of a source, or the one to write; raises ConfigError as `feature_key`.

    The key must not change with names in the code: an entry that is renamed makes all existing caches stale.
    """
    image_keys = source.image_keys()
    images = image_indices(source, image_keys)  # [samples]
    key: dict[str, Any] = {
        "data": source.provenance.data,
        "split": source.provenance.split,
        "settings": asdict(settings),
        "samples": len(source),
        "annotations": source.fingerprint(),
        "image_keys": None if image_keys is None else _digest(image_keys),  # paths, as far as they are not COCO ids
        "image_groups": hashlib.sha256(images.astype("<i8").tobytes()).hexdigest(),  # which samples share one
        "views": list(views),
        "transform": {"name": type(model.image_spec).__name__, **asdict(model.image_spec)},
        **model.feature_key(),
        "precision": cache.precision,
        "format": dict(FORMAT),
    }
    key = json.loads(json.dumps(key))  # tuples are lists, as in a file
    files = files_of(source, images)
    path = _locate(Path(cache.folder), key, files, cache.trust)
    stored = _keys(path.parent).get(path, key)
    return CacheFolder(path, key, int(images.max()) + 1, files, stored, cache.trust)


def check_complete(folder: CacheFolder) -> None:
    """Raise CacheError if a cache does not exist, is incomplete, or exists with another key only."""
    advice = "create it with `vg cache CONFIG` and the same overrides, or set data.cache=null"
    if (folder.path / INDEX).exists():
        return
    if folder.path.exists():
        total = len(folder.shards)
        raise CacheError(
            f"the cache {folder.path} is incomplete: {total - len(folder.missing_shards())} of {total} image shards "
            f"are written; {advice}"
        )
    root, key = folder.path.parent, folder.key
    keys = {
        path: found
        for path, found in _keys(root).items()
        if found["split"] == key["split"]
        and any(found[name] == key[name] is not None for name in ("data", "annotations"))
    }
    if not keys:
        raise CacheError(f"{root} contains no features of {folder.name}; {advice}")
    differences = sorted((_differences(key, found) for found in keys.values()), key=len)
    if not differences[0]:
        counts = [_num_changed(path, folder.files) for path, found in keys.items() if not _differences(key, found)]
        differences = [[f"{min(counts)} of its {folder.num_images} images differ"]]
    listed = "\n  ".join("; ".join(lines) for lines in differences[:3])
    raise CacheError(f"{root} contains features of {folder.name} with another key:\n  {listed}\n{advice}")


def _locate(root: Path, key: Mapping[str, Any], files: Sequence[Path | None], trust: bool) -> Path:
    name = re.sub(r"[^A-Za-z0-9]+", "_", f"{key['data']} {key['split']}").strip("_")
    exact = root / f"{name}-{_digest(key)[:16]}"  # with all paths
    if exact.exists():
        return exact
    counts = {}  # of images that differ
    for path, found in _keys(root).items():
        if not _differences(key, found):
            is_here = trust or found["settings"] == key["settings"]
            counts[path] = 0 if is_here else _num_changed(path, files)
    best = min(counts, key=lambda path: counts[path], default=None)
    if best is not None and counts[best] <= len(files) / 2:
        return best
    path = root / f"{name}-{_digest(_content(key))[:16]}"
    return exact if path in counts else path  # the cache of another version of the images is kept


def _keys(root: Path) -> dict[Path, dict[str, Any]]:
    """Return the keys of all caches in a folder, which may also have files of other programs."""
    keys = {}
    for file in sorted(root.glob(f"*/{KEY}")):
        try:
            key = read_json(file, dict)
        except OSError as error:
            reason = error.strerror
            logger.warning("%s cannot be read (%s), so its features are not used; remove the folder", file, reason)
            continue
        if {"data", "split", "settings", "annotations"} <= key.keys():
            keys[file.parent] = key
    return keys


def _num_changed(path: Path, files: Sequence[Path | None]) -> int:
    """Count the images that are not those of a cache, as far as it is complete and undamaged and both are known."""
    try:
        stored = read_index(path)["files"] if (path / INDEX).exists() else None
    except CacheError:  # reported, or repaired, where the cache is used
        stored = None
    return 0 if stored is None else len(changed_images(files, stored).changed)


def _content(key: Mapping[str, Any]) -> dict[str, Any]:
    """Return a key without the locations of what its other entries determine."""
    content: dict[str, Any] = _without_ids(key)
    if key["annotations"] is None:
        return content
    settings = _without(key["settings"], LOCATIONS)
    if settings.get("name") == "split":
        settings["dataset"] = _without(settings["dataset"], LOCATIONS)
    return _without(content, ["data", "image_keys"]) | {"settings": settings}


def _without_ids(value: Any) -> Any:
    """Return a value of a key without the ids of encoders, of which it has the weights."""
    if not isinstance(value, Mapping):
        return value
    return {name: _without_ids(entry) for name, entry in value.items() if name != "id" or "weights" not in value}


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return one line for each value in which the content of two keys differs; their text only if both have some."""
    if not ("text" in wanted and "text" in found):
        wanted, found = _without(wanted, ["text"]), _without(found, ["text"])
    changed = changes(_content(found), _content(wanted))
    return [_difference(name, old, new) for name, old, new in changed]


def _difference(name: str, old: Any, new: Any) -> str:
    if all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in (old, new)):
        return f"the {name} changed since the cache was written"
    return f"{name} is {new}, the cache has {old}"


def _without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
