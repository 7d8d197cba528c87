"""The samples of a stream: those of the shards, each once in a pass, continued at any position."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from tests.data.shards.test_equality import as_dict
from vg.cli import main
from vg.data.augment import AugmentConfig
from vg.data.detection.coco import CocoConfig
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.mixture import configs_of
from vg.data.shards.index import ShardFormat
from vg.data.shards.source import Shards, ShardsConfig
from vg.data.shards.write import write_shards
from vg.data.stream import StreamConfig
from vg.data.stream_samples import StreamDataset
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import BadSampleError, ConfigError, DataError
from vg.types import Sample

SIZE = 20  # samples, in five files

pytestmark = pytest.mark.skipif(not hasattr(datasets, "Json"), reason="needs datasets>=5.2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[ShardFormat, Path]:
    folder = tmp_path_factory.mktemp("stream")
    formats: tuple[ShardFormat, ...] = ("tar", "parquet")
    for format in formats:
        dataset = ShapesConfig(split="val", image_size=48, size=SIZE)
        write_shards(dataset, folder / format, format, samples_per_shard=4)
    return {format: folder / format for format in formats}


def config(shards: dict[ShardFormat, Path], format: ShardFormat = "parquet", **settings: Any) -> StreamConfig:
    settings = {"samples": SIZE, "window": 3} | settings
    if format == "tar":
        settings |= {"image": "png", "annotation": "json"}
    path = {"tar": "webdataset", "parquet": "parquet"}[format]
    return StreamConfig(path=path, data_files=str(shards[format] / f"*.{format}"), **settings)


def ids(samples: Sequence[Sample]) -> list[str]:
    return [sample.id for sample in samples]


@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_samples_are_those_of_the_shards(shards: dict[ShardFormat, Path], format: ShardFormat) -> None:
    source: Shards = ShardsConfig(path=str(shards[format])).build()
    expected = {sample.id: sample for sample in (source.load(index, 0) for index in range(SIZE))}
    first = list(islice(StreamDataset(config(shards, format)), 2 * SIZE))
    for sample in first[:SIZE]:
        found = as_dict(sample) | {"seed": None}
        assert str(found) == str(as_dict(expected.pop(sample.id)))
    assert not expected
    assert ids(first[:SIZE]) != ids(first[SIZE:])  # another order in the second pass
    assert sorted(ids(first[:SIZE])) == sorted(ids(first[SIZE:]))


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0), (2, 2), (5, 1), (3, 5)])
def test_readers_share_a_pass(shards: dict[ShardFormat, Path], processes: int, workers: int) -> None:
    """Every reader has other samples; those of all readers in one pass are all samples."""
    seen: Counter[str] = Counter()
    for process in range(processes):
        dataset = StreamDataset(config(shards), process, processes)
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=lambda sample: sample)
        for sample in islice(loader, 8 * SIZE):
            if sample.seed is not None and sample.seed[1] == 0:  # the first pass
                seen[sample.id] += 1
    assert len(seen) == SIZE
    assert {*seen.values()} == {1}


@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_every_position_continues(shards: dict[ShardFormat, Path], format: ShardFormat) -> None:
    """A run is resumed after each sample, and once more after the next two."""
    stream = config(shards, format)
    augment = AugmentConfig(flip=0.5, crop=0.5).build()

    def read(state: dict[str, Any] | None, count: int) -> tuple[list[Any], dict[str, Any]]:
        dataset = StreamDataset(stream, augment=augment, seed=3)
        if state is not None:
            dataset.load_state_dict(json.loads(json.dumps(state)))
        samples = [str(as_dict(sample)) for sample in islice(dataset, count)]
        return samples, dataset.state_dict()

    straight, _ = read(None, SIZE + 9)
    for stop in (1, 2, 3, 4, 10, SIZE - 1, SIZE, SIZE + 1):
        before, state = read(None, stop)
        between, state = read(state, 2)
        after, _ = read(state, 5)
        assert before + between + after == straight[: stop + 7]


def test_versions_of_datasets_that_start_again_are_refused(
    shards: dict[ShardFormat, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, calls = datasets.IterableDataset.load_state_dict, []

    def forget(rows: Any, state: dict[str, Any]) -> None:
        calls.append(state)
        if len(calls) == 1:  # the second time it starts from the beginning without a word, as datasets 5.0 did
            load(rows, state)

    monkeypatch.setattr(datasets.IterableDataset, "load_state_dict", forget)
    with pytest.raises(DataError, match=r"cannot continue the stream parquet .* after row 2"):
        StreamDataset(config(shards))


def table(folder: Path, lines: Sequence[Any], **columns: Any) -> StreamConfig:
    """Write lines beside a gray image to a parquet file, which a stream reads."""
    file = io.BytesIO()
    Image.new("RGB", (48, 48), "gray").save(file, "png")
    images = [{"bytes": file.getvalue(), "path": f"{name}.png"} for name, _ in zip("abcd", lines, strict=False)]
    rows = {"image": images, "annotation": list(lines)} | columns
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
    return StreamConfig(path="parquet", data_files=str(folder / "train.parquet"), samples=4)


GOOD = json.dumps({"filename": "a.png", "grounding": {"regions": [{"phrase": "dot", "bbox": [1, 2, 9, 9]}]}})


def test_bad_rows_are_named_or_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blank = GOOD.replace("dot", " ")
    inverted = GOOD.replace("[1, 2, 9, 9]", "[9, 2, 1, 9]")
    areas, crowd = (GOOD.replace("{", f'{{"{name}, ', 1) for name in ('areas": [1, 2]', 'iscrowd": ["no"]'))
    reasons = {"{": "not JSON", None: "expected JSON text", inverted: "inverted", blank: "regions without a phrase"}
    reasons |= {areas: "areas is .* for each of 1 boxes", crowd: "iscrowd is .* for each of 1 boxes"}
    for bad, reason in reasons.items():
        stream = table(tmp_path, [GOOD, bad])
        with pytest.raises(BadSampleError, match=rf"(?=.*train\.parquet, b\.png, row 1 of pass 0).*{reason}"):
            list(islice(StreamDataset(stream), 9))
        caplog.clear()
        assert ids(list(islice(StreamDataset(stream, bad_samples="skip"), 3))) == ["a.png"] * 3
        assert len(re.findall(f"skipped a bad sample: .*{reason}", caplog.text)) == 1, "in three passes"
    caplog.clear()
    list(islice(StreamDataset(table(tmp_path, [GOOD, None, None]), bad_samples="skip"), 3))
    assert len(re.findall("skipped a bad sample", caplog.text)) == 2, "one for each row, although their lines are equal"
    stream = table(tmp_path, ["{"])
    with pytest.raises(DataError, match="every sample is bad; the warnings above name the reasons"):
        next(iter(StreamDataset(stream, bad_samples="skip")))


def test_boxes_are_clipped_as_those_of_odvg(tmp_path: Path) -> None:
    line = GOOD.replace("[1, 2, 9, 9]", "[[1, 2, 99, 9], [5, 5, 5, 9]]")
    (sample,) = islice(StreamDataset(table(tmp_path, [line])), 1)
    assert sample.boxes.tolist() == [[1, 2, 48, 9]]


def test_the_next_window_is_read_while_one_is_used(
    shards: dict[ShardFormat, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise all data workers would pause together."""
    dataset, read, counts = StreamDataset(config(shards)), StreamDataset._read, []
    monkeypatch.setattr(StreamDataset, "_read", lambda self, rows, n: [counts.append(n), read(self, rows, n)][1])
    assert len(list(islice(dataset, SIZE))) == SIZE
    assert counts[0] == 3
    assert {*counts[1:]} == {0, 1}


def test_a_reader_without_rows_waits_for_the_next_pass(tmp_path: Path) -> None:
    """A file is empty; each process reads one of both files in a pass."""
    write_shards(ShapesConfig(split="val", image_size=48, size=2), tmp_path, samples_per_shard=2)
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    stream = config({"tar": tmp_path}, "tar")
    for process in range(2):
        assert len(list(islice(StreamDataset(stream, process, processes=2), 5))) == 5
    (tmp_path / "000000.tar").unlink()
    with pytest.raises(DataError, match="no rows for data worker 0"):
        next(iter(StreamDataset(stream)))


def test_numbered_classes(tmp_path: Path) -> None:
    dataset = CocoConfig.miniature(tmp_path)
    index = write_shards(dataset, tmp_path / "shards", "parquet")
    label_map = str(tmp_path / "shards" / "index.json")
    stream = config({"parquet": tmp_path / "shards"}, label_map=label_map)
    samples = list(islice(StreamDataset(stream), len(index)))
    assert sorted(ids(samples)) == sorted(dataset.build().load(i, 0).id for i in range(len(index)))
    assert {sample.phrases for sample in samples} == {tuple(index.classes or ())}
    with pytest.raises(BadSampleError, match="numbered classes without a label map"):
        next(iter(StreamDataset(replace(stream, label_map=None))))
    with pytest.raises(ValueError, match="vocabulary is for numbered classes, which need a label_map"):
        replace(stream, label_map=None, vocabulary=VocabularyConfig(only=["cat"]))


def test_columns_are_checked(tmp_path: Path) -> None:
    stream = table(tmp_path, [GOOD], other=[1])
    stream.annotation = "line"
    with pytest.raises(DataError, match=r"no column line, only image, annotation, other; set data\.train\.image"):
        StreamDataset(stream)
    with pytest.raises(DataError, match="keys that were found in some rows; others would be lost"):
        StreamDataset(table(tmp_path, [json.loads(GOOD)]))
    stream = table(tmp_path, [GOOD], file=["a.png"])
    stream.image = "file"
    with pytest.raises(DataError, match=r"column file has no image files in its first rows; paths .* not followed"):
        StreamDataset(stream)
    (tmp_path / "train.csv").write_text("image,annotation\n")
    with pytest.raises(DataError, match=r"the columns of csv .* have no types|cannot be opened"):
        StreamDataset(StreamConfig(path="csv", data_files=str(tmp_path / "train.csv"), samples=1))
    with pytest.raises(DataError, match=r"nowhere.* cannot be opened: .*data file"):
        StreamDataset(StreamConfig(path="parquet", data_files=str(tmp_path / "nowhere" / "*.parquet"), samples=1))


def test_a_truncated_file_is_named(shards: dict[ShardFormat, Path], tmp_path: Path) -> None:
    for file in shards["parquet"].glob("*.parquet"):
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:-200] if "2" in file.name else content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        list(islice(StreamDataset(config({"parquet": tmp_path})), SIZE))


def test_a_stream_only_trains(shards: dict[ShardFormat, Path]) -> None:
    for use in (lambda: config(shards).build(), lambda: configs_of(config(shards))):
        with pytest.raises(ConfigError, match=r"is a stream, which can be data\.train of vg train only"):
            use()


def test_messages_name_one_of_many_files() -> None:
    files = [f"https://host/{number}.tar" for number in range(5000)]
    assert str(StreamConfig(path="webdataset", data_files=files, samples=1)) == (
        "webdataset https://host/0.tar and 4999 more"
    )


def test_vg_check_leaves_out_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = "data.train={name: stream, path: parquet, data_files: x/*.parquet, samples: 9}"
    options = [stream, "data.expressions_per_image=1", "data.eval.size=3", f"--output={tmp_path}"]
    main(["check", str(Path(__file__).parents[2] / "configs/demo_rec.yaml"), *options])
    assert "train: parquet x/*.parquet is a stream, which is not checked" in capsys.readouterr().out
