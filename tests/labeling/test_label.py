"""`vg label` on folders and tables: lines, thresholds, formats, settings and unreadable images."""

from __future__ import annotations

import csv
import errno
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import vg
from tests.labeling.conftest import NUM_IMAGES
from vg.boxes import pairwise_iou
from vg.cli import main
from vg.data.detection.coco import CocoConfig
from vg.data.detection.odvg import OdvgConfig
from vg.data.image_files import list_images
from vg.data.images import read_image
from vg.errors import BadSampleError, ConfigError, DataError
from vg.files import write_shared
from vg.labeling.output import LabelFolder
from vg.labeling.plan import open_plan
from vg.labeling.run import worker_of
from vg.labeling.worker import local_device, read_threads

CLASSES = ("-p", "dog", "hot dog")
LOW = ("--threshold", "0.4")


def label(*arguments: object) -> None:
    main(["label", *map(str, arguments), "--device", "cpu"])


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_a_line_for_every_image_in_order(
    detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The boxes are those of vg predict, where batches are the same."""
    out = tmp_path / "labels"
    label(detector, photos, out, *CLASSES, *LOW, "--shard-size", 8, "--nms", 0.7)
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{shard:06d}.jsonl" for shard in range(3)),
        *("label_map.json", "labels.json"),
    ]
    lines = lines_of(out)
    assert [line["filename"] for line in lines] == list_images(photos)
    found = [instance for line in lines for instance in line["detection"]["instances"]]
    assert {(instance["label"], instance["category"]) for instance in found} == {(0, "dog"), (1, "hot dog")}
    results = vg.Grounder(detector, "cpu").stream(photos, CLASSES[1:], 0.4, nms=0.7)
    for line, result in zip(lines[:16], results, strict=False):
        assert (line["height"], line["width"]) == result.size
        wide = [tuple(entry["box"]) for entry in result.to_dict()["boxes"] if is_large(entry["box"])]
        assert [tuple(instance["bbox"]) for instance in line["detection"]["instances"]] == wide
    printed = capsys.readouterr().out
    assert f"{NUM_IMAGES} images, {len(found)} boxes" in printed
    assert f"{sum(instance['label'] == 0 for instance in found)} dog" in printed
    assert "in forward passes" in printed


def is_large(box: list[float]) -> bool:
    return box[2] - box[0] >= 1 and box[3] - box[1] >= 1


def test_labels_are_a_dataset(detector: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    label(detector, photos, out, *CLASSES, *LOW, "--shard-size", 8)
    source = OdvgConfig(path=str(out), image_root=str(photos)).build()
    assert len(source) == NUM_IMAGES
    lines = lines_of(out)
    for index in (0, 9, NUM_IMAGES - 1):
        sample = source.load(index, 0)
        assert sample.phrases == CLASSES[1:]
        assert len(sample.boxes) == len(lines[index]["detection"]["instances"])
        np.testing.assert_array_equal(sample.image, read_image(photos / lines[index]["filename"], "it"))
    (out / "000001.jsonl").unlink()
    with pytest.raises(DataError, match=r"labels has 2 of 3 shards of labels; repeat the vg label command"):
        OdvgConfig(path=str(out), image_root=str(photos)).build()
    (out / "000000.jsonl").write_text('{"filename": "x.png"}\n')
    label(detector, photos, out, *CLASSES, *LOW, "--shard-size", 8)
    assert lines_of(out)[1:] == lines[8:], "what is there is not labeled again"
    with pytest.raises(DataError, match=r"labels: lines that are not valid ODVG: 000000\.jsonl, line 1"):
        OdvgConfig(path=str(out), image_root=str(photos)).build()


def test_phrases_that_exclude_each_other(detector: Path, photos: Path, tmp_path: Path) -> None:
    label(detector, photos, tmp_path / "out", "-p", "dog", "cat", "--threshold", 0, "--nms", 0.5, "--exclusive")
    for line in lines_of(tmp_path / "out"):
        boxes = torch.tensor([found["bbox"] for found in line["detection"]["instances"]])
        assert (pairwise_iou(boxes).fill_diagonal_(0) <= 0.5 + 1e-3).all()
    with pytest.raises(SystemExit, match="--exclusive is about --nms"):
        label(detector, photos, tmp_path / "out", "-p", "dog", "--exclusive")


def test_thresholds_of_phrases(detector: Path, photos: Path, tmp_path: Path) -> None:
    every = tmp_path / "every"
    label(detector, photos, every, *CLASSES, "--threshold", 0.3)
    scores = [found["score"] for line in lines_of(every) for found in line["detection"]["instances"]]
    limit = float(np.median(scores))
    (tmp_path / "phrases.json").write_text(json.dumps({"dog": None, "hot dog": limit}))
    label(detector, photos, tmp_path / "some", "--phrases-file", tmp_path / "phrases.json", "--threshold", 0.3)
    for all_of_it, part in zip(lines_of(every), lines_of(tmp_path / "some"), strict=True):
        kept = [i for i in all_of_it["detection"]["instances"] if i["label"] == 0 or i["score"] >= limit]
        assert part["detection"]["instances"] == kept
    assert sum(len(line["detection"]["instances"]) for line in lines_of(tmp_path / "some")) < len(scores)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"dog": 2}', "a.json: dog: 2: expected a score or IoU from 0 to 1"),
        ("a.json", '{"dog": "x"}', "a.json: dog: x; expected phrases, as"),
        ("a.json", "[3]", "a.json: 3; expected phrases, as"),
        ("a.json", '[{"dog": 0.4}]', r"a.json: \(\('dog', 0.4\),\); expected phrases, as"),
        ("a.json", '"dog"', "a.json: dog; expected phrases, as"),
        ("a.json", '{"dog": 0.2, "dog": 0.6}', "a.json: a phrase is there twice"),
        ("a.json", "{", "a.json: Expecting"),
        ("a.txt", "dog\n\n dog \n", "a.txt: a phrase is there twice"),
        ("a.txt", "dog\nDog\n", "the phrases 'dog' and 'Dog' are the same"),
        ("a.txt", "\n", "no phrases; give them with -p, --phrases-file or --captions"),
    ],
)
def test_faulty_files_of_phrases(
    name: str, content: str, message: str, detector: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=message):
        label(detector, photos, tmp_path / "out", "--phrases-file", tmp_path / name)


def test_a_folder_has_labels_of_one_command(
    detector: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    label(detector, photos, out, *CLASSES, "--shard-size", 8)
    with pytest.raises(SystemExit, match=r"labels with other settings \(threshold, phrases\): use another folder"):
        label(detector, photos, out, "-p", "hot dog", "dog", "--shard-size", 8, "--threshold", 0.2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved").symlink_to(detector)
    label("moved", "photos", "out", *CLASSES, "--shard-size", 8)
    (photos / "00.png").rename(photos / "new.png")
    with pytest.raises(SystemExit, match=r"labels with other settings \(names\)"):
        label(detector, photos, out, *CLASSES, "--shard-size", 8)


def test_unreadable_images(detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "05x.png").write_text("broken")
    options = (*CLASSES, "--shard-size", 8)
    with pytest.raises(SystemExit, match=r"05x\.png cannot be read .*; --bad-images skip leaves out images"):
        label(detector, photos, tmp_path / "strict", *options)
    with pytest.raises(SystemExit, match=r"labels with other settings \(nms\): use another folder"):
        label(detector, photos, tmp_path / "strict", *options, "--nms", 0.5, "--bad-images", "skip")
    with pytest.raises(SystemExit, match=r"05x\.png cannot be read"):  # a refused command changes nothing
        label(detector, photos, tmp_path / "strict", *options)
    label(detector, photos, tmp_path / "strict", *options, "--bad-images", "skip")
    assert lines_of(tmp_path / "strict")
    with pytest.raises(SystemExit, match=r"labels with other settings \(bad_images\): use another folder"):
        label(detector, photos, tmp_path / "strict", *options)
    capsys.readouterr()
    label(detector, photos, tmp_path / "out", *options, "--bad-images", "skip")
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "strict")
    assert "1 images skipped" in capsys.readouterr().out.replace("image skipped", "images skipped")
    (report,) = (tmp_path / "out").glob("*.skipped.json")
    (entry,) = json.loads(report.read_text())
    assert entry["filename"] == "05x.png"
    assert "cannot be read" in entry["error"]
    assert [line["filename"] for line in lines_of(tmp_path / "out")] == [
        name for name in list_images(photos) if name != "05x.png"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes")
def test_names_that_are_not_unicode(
    detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are bad images: an error names all of them, and each shard lists those that are left out."""
    names = [os.fsdecode(b"0%d\xe9.png" % number) for number in range(10)]
    good = list_images(photos)
    for name in names:
        (photos / name).write_bytes((photos / "00.png").read_bytes())
    options = (*CLASSES, "--shard-size", 8)
    listed = ", ".join(rf"0{number}\\udce9\.png" for number in range(8))
    with pytest.raises(SystemExit, match=rf"Unicode: {listed}, \.\.\. \(10 in all\); .* --bad-images skip") as stopped:
        label(detector, photos, tmp_path / "out", *options)
    assert str(stopped.value).isascii()
    label(detector, photos, tmp_path / "out", *options, "--bad-images", "skip")
    assert [line["filename"] for line in lines_of(tmp_path / "out")] == good
    assert "10 images skipped" in capsys.readouterr().out
    entries = [x for file in sorted((tmp_path / "out").glob("*.skipped.json")) for x in json.loads(file.read_bytes())]
    assert [entry["filename"] for entry in entries] == names
    assert entries[0]["error"].endswith(r"image 00\udce9.png: its name is not valid Unicode; rename it")


def test_captions_that_are_not_unicode(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text(
        '{"image": "00.png", "text": "a"}\n{"image": "03.png", "text": "\\ud800"}\n{"image": "06.png", "text": null}\n'
    )
    arguments = (str(table), "text", str(photos), 10)
    with pytest.raises(DataError, match=r"caption is not valid Unicode: 03\.png \(1 in all\)"):
        open_plan(*arguments)
    first, second, third = open_plan(*arguments, "skip").images(0)
    assert (first.caption, third.caption) == ("a", None)
    assert first.read().shape == (640, 640, 3)
    with pytest.raises(BadSampleError, match=r"image 03\.png: its caption is not valid Unicode; correct it"):
        second.read()


def test_coco(detector: Path, photos: Path, tmp_path: Path) -> None:
    """The file is written by the worker that finds all shards."""
    out = tmp_path / "out"
    for worker in (1, 0):
        label(detector, photos, out, *CLASSES, *LOW, "--format", "coco", "--shard-size", 8, "--shard", f"{worker}/2")
        assert (out / "labels.coco.json").exists() == (worker == 0)
    source = CocoConfig(path=str(out / "labels.coco.json"), image_root=str(photos)).build()
    assert len(source) == NUM_IMAGES
    first = lines_of(out)[0]["detection"]["instances"]
    np.testing.assert_allclose(source.load(0, 0).boxes, [found["bbox"] for found in first], atol=0.02)
    assert not list(out.glob("*.partial*"))


def test_categories_of_coco_have_the_order_of_the_phrases(tmp_path: Path) -> None:
    """Whatever is found first or not at all, as in vg predict --format coco: archives labeled alike have equal ids."""
    found = [
        {"bbox": [1, 1, 5, 5], "label": label, "category": name, "score": 0.5} for label, name in ((2, "c"), (0, "a"))
    ]
    lines = [
        {"filename": f"{number}.jpg", "height": 9, "width": 9, "detection": {"instances": instances}}
        for number, instances in enumerate(([], found[:1], found))
    ]
    folder = LabelFolder(tmp_path, {"shards": 1, "format": "coco"}, {"0": "a", "1": "b", "2": "c"})
    folder.write(0, lines, [])
    assert folder.finish()
    document = json.loads((tmp_path / "labels.coco.json").read_text())
    assert document["categories"] == [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}]
    assert [(x["image_id"], x["category_id"]) for x in document["annotations"]] == [(2, 3), (3, 3), (3, 1)]


def test_two_processes_finish_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one writes a shard and the COCO file again; the first one has removed its unfinished copies."""
    settings = {"shards": 1, "format": "coco"}
    first, second = (LabelFolder(tmp_path / "out", settings, None) for _ in range(2))
    lines = [{"filename": "a.jpg", "height": 9, "width": 9, "detection": {"instances": []}}]
    write = write_shared

    def interrupted(path: Path, content: bytes, replace: bool = True) -> None:
        monkeypatch.undo()
        first.write(0, lines, [])
        assert first.finish()
        raise FileNotFoundError(path)

    monkeypatch.setattr("vg.labeling.output.write_shared", interrupted)
    second.write(0, lines, [])
    (tmp_path / "out/labels.coco.json").unlink()

    def slow(records: Any, path: Path, format: str) -> None:
        monkeypatch.undo()
        assert first.finish()
        raise FileNotFoundError(path)

    monkeypatch.setattr("vg.labeling.output.write_results", slow)
    write(tmp_path / "out/000000.jsonl.x.partial", b"")
    assert second.finish()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"labels.json", "labels.coco.json", "000000.jsonl"}
    (tmp_path / "out/000000.jsonl").unlink()
    monkeypatch.setattr("vg.labeling.output.write_shared", lambda path, content: (tmp_path / "x").read_bytes())
    with pytest.raises(FileNotFoundError):
        second.write(0, lines, [])


def test_parquet(detector: Path, photos: Path, tmp_path: Path) -> None:
    label(detector, photos, tmp_path / "lines", *CLASSES, *LOW, "--shard-size", 8)
    label(detector, photos, tmp_path / "rows", *CLASSES, *LOW, "--shard-size", 8, "--format", "parquet")
    rows = [row for file in sorted((tmp_path / "rows").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    for row, line in zip(rows, lines_of(tmp_path / "lines"), strict=True):
        assert (row["image"], row["height"], row["caption"]) == (line["filename"], line["height"], None)
        assert [(found["phrase"], found["box"]) for found in row["boxes"]] == [
            (found["category"], found["bbox"]) for found in line["detection"]["instances"]
        ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables(kind: str, detector: Path, photos: Path, tmp_path: Path) -> None:
    """An image of several rows, such as one with several expressions, is labeled once, with captions every row."""
    names = ["more/01.png", "00.png", "more/01.png"]
    table = tmp_path / f"table.{kind}"
    if kind == "jsonl":
        table.write_text("".join(json.dumps({"file_name": name, "n": 1}) + "\n" for name in names))
    elif kind == "csv":
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([["file_name", "n"], *([name, 1] for name in names)])
    else:
        datasets.Dataset.from_dict({"file_name": names, "n": [1] * 3}).to_parquet(table)
    label(detector, table, tmp_path / "out", *CLASSES, "--image-root", photos)
    assert [line["filename"] for line in lines_of(tmp_path / "out")] == names[:2]
    captioned = open_plan(str(table), "file_name", str(photos), 10)
    assert [image.caption for image in captioned.images(0)] == names
    with pytest.raises(DataError, match=rf"table\.{kind}, .* 1: no column n.*|no column"):
        open_plan(str(table), "text", str(photos), 10)
    with pytest.raises(DataError, match=r"--image-root nowhere is not a folder"):
        open_plan(str(table), None, "nowhere", 10)


def test_data_that_cannot_be_labeled(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "odd.jsonl").write_text('{"image": 3}\n')
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        (("none", None, None, 10), DataError, "none contains no images"),
        (("nowhere", None, None, 10), DataError, "nowhere does not exist; expected a folder of images, a pattern"),
        (("photos/00.png", None, None, 10), DataError, r"00\.png is a single file; expected a folder of images"),
        (("photos/*.jpg", None, None, 10), DataError, r"photos/\*\.jpg contains no images"),
        (("empty.jsonl", None, None, 10), DataError, "no images to label"),
        (("odd.jsonl", None, None, 10), DataError, r"odd\.jsonl, line 1: image is '3', expected the name of an image"),
        (("photos", "text", None, 10), ConfigError, "--captions text: photos is not a table"),
        (("photos", None, "x", 10), ConfigError, "--image-root x: photos is not a table"),
        (("photos", None, None, 0), ConfigError, "--shard-size 0: expected at least 1"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            open_plan(*arguments)
    plan = open_plan("photos/more/*.png", None, None, 5)
    assert [image.name for shard in range(len(plan)) for image in plan.images(shard)] == sorted(
        os.listdir(photos / "more")
    )


def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_of(None) == (0, 1)
    assert worker_of("3/8") == (3, 8)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert worker_of(None) == (2, 4)
    assert worker_of("1/8") == (6, 32), "torchrun in a job of an array"
    for wrong in ("8/8", "1", "-1/2", "a/b"):
        with pytest.raises(ConfigError, match="expected i/n with i from 0 to n - 1"):
            worker_of(wrong)


def test_captions_are_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.jpg"], "caption": [["a dog", "a cat"]]}), tmp_path / "some.parquet")
    with pytest.raises(DataError, match=r"some.parquet, row 1: caption is .*, expected one caption, as text"):
        open_plan(str(tmp_path / "some.parquet"), "caption", None, 5)


def test_a_complete_folder_is_completed_again_by_many(detector: Path, photos: Path, tmp_path: Path) -> None:
    """Unfinished files of a process may be deleted by another one that has found the folder complete."""
    out = tmp_path / "out"
    label(detector, photos, out, *CLASSES, *LOW)
    settings, label_map = (json.loads((out / name).read_text()) for name in ("labels.json", "label_map.json"))

    def complete(_: int) -> bool:
        return LabelFolder(out, settings, label_map).finish()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(complete, range(400)))


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert local_device(None, "runs/demo") is None
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert local_device(None, "runs/demo") == local_device("cuda", "runs/demo") == "cuda:1"
    assert local_device("cpu", "runs/demo") == "cpu"
    assert local_device("cuda", "demo.onnx") == "cuda:5"
    assert local_device(None, "demo.onnx") is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert read_threads("cuda:0") == read_threads("cpu") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", 2), "--workers is for --engine ray"),
        (("--engine", "ray", "--shard", "0/2"), "--shard is for array jobs"),
        (("--batch-size", 0), "--batch-size 0: expected at least 1"),
        (("--threshold", 2), "--threshold 2: expected a score"),
    ],
)
def test_wrong_options(options: tuple[object, ...], message: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        label("nowhere", photos, tmp_path / "out", *CLASSES, *options)


@pytest.mark.parametrize("has_links", [True, False], ids=["hard links", "no hard links"])
def test_files_of_several_writers(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "not permitted")))
    file = tmp_path / "a.json"
    write_shared(file, b"1", replace=False)
    write_shared(file, b"2", replace=False)
    assert file.read_bytes() == b"1"
    write_shared(file, b"3")
    assert file.read_bytes() == b"3"
    assert list(tmp_path.iterdir()) == [file]
