"""The folder that `vg label` writes, which any number of processes complete.

labels/
    labels.json                 settings of the labels: a folder has labels of one model, data and set of options
    label_map.json              {"0": phrase}, if the phrases are the same for all images
    000000.jsonl, ...           ODVG lines of each shard, a line per image in their order; or .parquet
    000000.skipped.json, ...    images of a shard that cannot be read, with --bad-images skip
    labels.coco.json            all labels as COCO, with --format coco, once all shards are there
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

from vg.data.detection.line_files import LABEL_MAP, SETTINGS
from vg.errors import ConfigError
from vg.files import read_json, write_shared
from vg.inference.formats import Record, write_results

FORMATS = ("odvg", "coco", "parquet")
COCO = "labels.coco.json"
INFORMATIVE = ("model", "data")  # these may move
Line = Mapping[str, Any]


class LabelFolder:
    """Writes shards of labels, each once and as a whole.

    bad_images may change from "error" to "skip", because no image of a finished shard was unreadable then.

    Args:
        settings: JSON values that determine the labels; "shards" is the number of shards, "format" one of FORMATS.
        label_map: number -> phrase, if the phrases are the same for all images.

    Raises:
        ConfigError: the folder has labels with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], label_map: dict[str, str] | None):
        self.path = path
        self._format, self._num_shards = settings["format"], settings["shards"]
        self._classes = tuple((label_map or {}).values())  # in the order of the labels
        path.mkdir(parents=True, exist_ok=True)
        file = path / SETTINGS
        if not file.exists():
            with _unless_there(file):
                write_shared(file, _indented(settings), replace=False)  # the first process decides
        found = read_json(file, dict)
        skips_from_now_on = found.get("bad_images") == "error" and settings.get("bad_images") == "skip"
        if skips_from_now_on:
            found["bad_images"] = "skip"
        changed = [k for k in settings | found if k not in INFORMATIVE and found.get(k) != settings.get(k)]
        if changed:
            raise ConfigError(f"{path} has labels with other settings ({', '.join(changed)}): use another folder")
        if skips_from_now_on:
            with _unless_there(file):
                write_shared(file, _indented(found))
        if label_map is not None and not (path / LABEL_MAP).exists():
            with _unless_there(path / LABEL_MAP):
                write_shared(path / LABEL_MAP, _indented(label_map))

    def missing(self, shards: Iterable[int]) -> list[int]:
        """Return the shards that are not written yet."""
        return [shard for shard in shards if not self._file(shard).exists()]

    def write(self, shard: int, lines: Sequence[Line], skipped: Sequence[Mapping[str, str]]) -> None:
        """Write the ODVG lines of a shard, and the images that could not be read."""
        if skipped:
            report = self.path / f"{shard:06d}.skipped.json"
            with _unless_there(report):
                write_shared(report, _indented(skipped))
        with _unless_there(self._file(shard)):
            write_shared(self._file(shard), _parquet(lines) if self._format == "parquet" else _jsonl(lines))

    def finish(self) -> bool:
        """Write what needs all shards; return whether they are there."""
        if self.missing(range(self._num_shards)):
            return False
        joined = self.path / COCO
        if self._format == "coco" and not joined.exists():
            own = self.path / f"{COCO}.{uuid4().hex}"  # another process may write it, too
            with _unless_there(joined):
                write_results(self._records(), own, "coco")
                own.replace(joined)
        for partial in self.path.glob("*.partial"):  # of processes that were killed, or have nothing left to write
            partial.unlink(missing_ok=True)
        return True

    def _file(self, shard: int) -> Path:
        return self.path / f"{shard:06d}.{'parquet' if self._format == 'parquet' else 'jsonl'}"

    def _records(self) -> Iterator[Record]:
        for shard in range(self._num_shards):
            with self._file(shard).open("rb") as file:
                yield from (_record(json.loads(line), self._classes) for line in file)


@contextmanager
def _unless_there(file: Path) -> Iterator[None]:
    """Write a file; its unfinished copy may disappear if another process has written the file in the meantime."""
    try:
        yield
    except FileNotFoundError:
        if not file.exists():
            raise


def _indented(values: Any) -> bytes:
    """Return JSON; surrogates, which names that are not UTF-8 have, are escaped as JSON escapes them."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _jsonl(lines: Iterable[Line]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _record(line: Line, classes: Sequence[str] = ()) -> Record:
    """Return the record of `Result.to_dict` of an ODVG line.

    Args:
        classes: the phrases of all images, in the order of their labels; by default those that have boxes.
    """
    items = line["detection"]["instances"] if "detection" in line else line["grounding"]["regions"]
    names = [item["category"] if "category" in item else item["phrase"] for item in items]
    phrases = list(classes or dict.fromkeys(names))
    boxes = [
        {"phrase": name, "phrase_id": phrases.index(name), "score": item["score"], "box": item["bbox"]}
        for name, item in zip(names, items, strict=True)
    ]
    size = {key: line[key] for key in ("height", "width")}
    return {"image": line["filename"], **size, "phrases": phrases, "boxes": boxes}


def _parquet(lines: Iterable[Line]) -> bytes:
    """A row per image; `caption` is null without captions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    box = pa.struct({"phrase": pa.string(), "score": pa.float64(), "box": pa.list_(pa.float64(), 4)})
    schema = pa.schema(
        {
            "image": pa.string(),
            "height": pa.int32(),
            "width": pa.int32(),
            "caption": pa.string(),
            "boxes": pa.list_(box),
        }
    )
    rows = [{**_record(line), "caption": line.get("grounding", {}).get("caption")} for line in lines]
    content = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), content)
    return content.getvalue()
