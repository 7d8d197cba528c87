"""Damaged shards and indices: every message names the file and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet
import pytest

from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.shards.containers import Entry, write_shard
from vg.data.shards.index import INDEX, SAMPLES, Index, ShardFile, write_rows
from vg.data.shards.lines import line_of
from vg.data.shards.source import Shards, ShardsConfig
from vg.data.shards.write import write_shards
from vg.data.source import Provenance
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import BadSampleError, DataError
from vg.files import sha256_of
from vg.types import Sample

SHAPES = ShapesConfig(split="val", size=7, image_size=64)


@pytest.fixture(params=["tar", "parquet"])
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Shards:
    write_shards(SHAPES, tmp_path / "out", request.param, samples_per_shard=3)
    return ShardsConfig(path=str(tmp_path / "out")).build()


def file_of(shards: Shards, number: int) -> Path:
    return Path(shards.path, shards.index.shards[number].file)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / INDEX).read_bytes())
    edit(values)
    (folder / INDEX).write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["../000000.tar", "/tmp/000000.tar", "samples.npy", "000000.tar\n", "0.sh", "", None])
def test_names_that_lead_out_of_the_folder(name: str | None, shards: Shards, tmp_path: Path) -> None:
    """A cache would write a file of that name."""
    edit_index(tmp_path / "out", lambda values: values["shards"][1].update(file=name))
    with pytest.raises(DataError, match=r"index\.json names the file .*, which vg shard never writes; copy its"):
        ShardsConfig(path=f"file://{tmp_path}/out", cache=str(tmp_path / "cache")).build()
    assert not (tmp_path / "cache").exists()


def test_name_of_the_table(shards: Shards, tmp_path: Path) -> None:
    edit_index(tmp_path / "out", lambda values: values["table"].update(file="../samples.npy"))
    with pytest.raises(DataError, match=r"names the file '\.\./samples\.npy', which vg shard never writes"):
        ShardsConfig(path=f"file://{tmp_path}/out", cache=str(tmp_path / "cache")).build()


def test_truncated_shard(shards: Shards) -> None:
    file = file_of(shards, 1)
    with file.open("r+b") as opened:
        opened.truncate(5000)
    shards.load(0, 0)
    with pytest.raises(
        DataError, match=rf"the shard {file} is truncated: it has 5,000 bytes, .*; copy it again"
    ) as error:
        shards.load(4, 0)
    assert not isinstance(error.value, BadSampleError), "not one sample, which could be skipped"
    assert [message.split(" is ")[0] for message in shards.damaged_files()] == [f"the shard {file}"]


def test_shard_that_is_truncated_while_it_is_read(shards: Shards) -> None:
    shards.load(0, 0)
    file = file_of(shards, 0)
    with file.open("r+b") as opened:
        opened.truncate(100)
    with pytest.raises(DataError, match=rf"{file}, sample 0 ends beyond the end of the file: the shard is truncated"):
        shards.load(0, 0)


def test_shard_that_vanishes(shards: Shards) -> None:
    shards.load(0, 0)
    for number in (0, 1):
        file_of(shards, number).unlink()
    shards.load(1, 0)  # it is still open
    with pytest.raises(DataError, match=rf"cannot read the shard {file_of(shards, 1)}: No such file.*; copy it again"):
        shards.load(3, 0)


def test_parquet_without_a_column(tmp_path: Path) -> None:
    write_shards(SHAPES, tmp_path, "parquet", samples_per_shard=4)
    file = tmp_path / "000000.parquet"
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(table.drop_columns(["annotation"]), file)
    entry = ShardFile(file.name, 4, file.stat().st_size, sha256_of(file))
    edit_index(tmp_path, lambda values: values["shards"].__setitem__(0, entry._asdict()))
    with pytest.raises(
        DataError, match=r"000000.parquet has no column annotation, only id, image, width, height; write"
    ):
        ShardsConfig(path=str(tmp_path)).build().load(0, 0)
    file.write_bytes(bytes(entry.bytes))
    with pytest.raises(DataError, match=r"000000.parquet is not a parquet file"):
        ShardsConfig(path=str(tmp_path)).build().load(0, 0)


def test_damaged_bytes(shards: Shards) -> None:
    """Damage of an image or a line is a bad sample, which names the shard; checksums find all others."""
    file, row = file_of(shards, 0), shards._rows[1]
    content = bytearray(file.read_bytes())
    content[int(row["line_start"])] = ord("x")
    content[int(shards._rows[2]["image_start"]) + 60] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadSampleError, match=rf"lines that are not valid ODVG: .*{file.name}, sample 1: .*not JSON"):
        shards.load(1, 0)
    with pytest.raises(BadSampleError, match=rf"{file.name}, sample 2\) cannot be read"):
        shards.load(2, 0)
    assert list(shards.damaged_files()) == [f"{file}: its SHA-256 is not that of {INDEX}"]


def test_another_version(shards: Shards) -> None:
    folder = Path(shards.path)
    edit_index(folder, lambda values: values.update(version=2))
    with pytest.raises(DataError, match=rf"{folder / INDEX} has version 2, this vg reads version 1; write"):
        ShardsConfig(path=str(folder)).build()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "shards": 3}', "\xff"])
def test_files_that_are_not_an_index(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(DataError, match=rf"{tmp_path / INDEX} is not an index of shards"):
        ShardsConfig(path=str(tmp_path)).build()


def test_missing_index(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"cannot read {tmp_path / 'none' / INDEX}: No such file.*vg shard has written"
    ):
        ShardsConfig(path=str(tmp_path / "none")).build()


def test_positions_of_another_dataset(tmp_path: Path) -> None:
    for size in (5, 7):
        write_shards(ShapesConfig(split="val", size=size, image_size=64), tmp_path / str(size))
    shutil.copy(tmp_path / "5" / SAMPLES, tmp_path / "7" / SAMPLES)
    with pytest.raises(DataError, match=rf"{SAMPLES} is truncated: it has .* bytes"):
        ShardsConfig(path=str(tmp_path / "7")).build()
    edit_index(tmp_path / "7", lambda values: values["table"].update(bytes=(tmp_path / "5" / SAMPLES).stat().st_size))
    with pytest.raises(
        DataError, match=rf"{SAMPLES} does not belong to index.json, which has 7 samples; it has .*\[5\]"
    ):
        ShardsConfig(path=str(tmp_path / "7")).build()
    (tmp_path / "7" / SAMPLES).write_bytes(b"x" * (tmp_path / "5" / SAMPLES).stat().st_size)
    with pytest.raises(DataError, match=rf"{SAMPLES} cannot be read"):
        ShardsConfig(path=str(tmp_path / "7")).build()


def test_a_vocabulary_that_is_not_used(tmp_path: Path) -> None:
    write_shards(OdvgConfig.miniature(tmp_path), tmp_path / "out")
    with pytest.warns(UserWarning, match="vocabulary is not used: it is for numbered classes"):
        ShardsConfig(path=str(tmp_path / "out"), vocabulary=VocabularyConfig(only=["cat"])).build()


def test_equal_phrases_cannot_be_written() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    sample = Sample("7", image, ("a", "a"), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    with pytest.raises(BadSampleError, match=r"sample 7: a phrase occurs twice in \('a', 'a'\)"):
        line_of(sample, "7.jpg")


def test_open_files_are_bounded(tmp_path: Path) -> None:
    write_shards(ShapesConfig(split="val", size=150, image_size=64), tmp_path, samples_per_shard=1)
    shards = ShardsConfig(path=str(tmp_path)).build()
    before = psutil.Process().num_fds()
    for index in range(len(shards)):
        shards.load(index, 0)
    assert psutil.Process().num_fds() - before <= 64
    del shards
    assert psutil.Process().num_fds() <= before


def test_an_index_of_many_samples_opens_without_reading_it(tmp_path: Path) -> None:
    """A million samples in a thousand shards; scripts/benchmarks/shards.py opens ten million."""
    entry = Entry("0", "0", b"x", ".jpg", b"{}\n", (48, 64), 0)
    shard, rows = write_shard(tmp_path / "0.tar", "tar", [entry])
    entries = [shard._replace(samples=1000)] * 1000
    table = write_rows(tmp_path, (np.repeat(rows, 1000) for _ in entries), 1_000_000)
    provenance = Provenance("many", "train")
    index = Index("tar", entries, table, provenance, None, None, all_detections=False, skipped=0, settings={})
    index.write(tmp_path)
    memory = psutil.Process().memory_info
    before = memory().rss
    shards = ShardsConfig(path=str(tmp_path)).build()
    assert len(shards) == 1_000_000
    assert memory().rss - before < rows.itemsize * 1_000_000 / 4
    assert shards.image_sizes(0)[-1].tolist() == [48, 64]
