"""`vg shard`: interruptions, workers, bad samples, refused folders and settings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from vg.cli import main
from vg.data.detection.coco import CocoConfig
from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.voc import VocConfig
from vg.data.detection.yolo import YoloConfig
from vg.data.expressions import CsvConfig
from vg.data.shards import job
from vg.data.shards.index import INDEX
from vg.data.shards.job import ShardJob
from vg.data.shards.source import ShardsConfig
from vg.data.shards.storage import UNFINISHED
from vg.data.shards.write import write_shards
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import BadSampleError, DataError

ROOT = Path(__file__).parents[3]
SHAPES = ShapesConfig(split="val", size=11, image_size=64)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_continues_without_reading_finished_samples(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(SHAPES, tmp_path / "straight", samples_per_shard=3)
    original, loaded = ShardJob.write, []

    def interrupted(self: ShardJob, number: int) -> int:
        if number == 2:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(ShardJob, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shards(SHAPES, tmp_path / "out", samples_per_shard=3)
    monkeypatch.undo()
    (tmp_path / "out" / "000002.tar.partial").write_bytes(b"of a killed process")
    with pytest.raises(DataError, match="are incomplete; run the same vg shard command again"):
        ShardsConfig(path=str(tmp_path / "out")).build()
    monkeypatch.setattr(job, "checked", lambda sample: loaded.append(sample.id))
    write_shards(SHAPES, tmp_path / "out", samples_per_shard=3, workers=workers)
    if not workers:
        assert len(loaded) == 11 - 6
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    write_shards(SHAPES, tmp_path / "out", samples_per_shard=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight"), "a finished folder stays as it is"


def test_a_damaged_folder_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, loaded = tmp_path / "out", []
    write_shards(SHAPES, out, samples_per_shard=3)
    straight = contents(out)
    (out / "000000.tar").write_bytes(straight["000000.tar"][:-1])
    (out / "000002.tar").unlink()
    monkeypatch.setattr(job, "checked", lambda sample: loaded.append(sample.id))
    write_shards(SHAPES, out, samples_per_shard=3)
    assert contents(out) == straight
    assert len(loaded) == 3 + 3, "other shards stay as they are"
    (out / "000000.tar").unlink()
    monkeypatch.setattr(job, "line_of", lambda sample, name, classes: b"{}")
    for _ in range(2):
        with pytest.raises(DataError, match=r"shard 0 in .*out, which was damaged, has become another one"):
            write_shards(SHAPES, out, samples_per_shard=3)
    (out / "samples.npy").unlink()
    with pytest.raises(DataError, match=r"samples\.npy is missing or truncated; copy it again, or give a new folder"):
        write_shards(SHAPES, out, samples_per_shard=3)


def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    write_shards(SHAPES, Path("."), samples_per_shard=3)
    assert len(ShardsConfig(path=".").build()) == 11


def test_killed_processes(tmp_path: Path) -> None:
    """SIGKILL, several times: workers end with the main process, and the result is that of a straight run."""
    command = [sys.executable, "-m", "vg", "shard", "configs/demo_rec.yaml", str(tmp_path / "out"), "--split=eval"]
    command += ["data.eval.size=300", "--samples-per-shard=20", "--workers=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for kills in range(3):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        while len(list((tmp_path / "out").glob("*.tar"))) < 2 + 2 * kills and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    command[5] = str(tmp_path / "straight")
    subprocess.run([*command, "--workers=0"], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_second_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    import vg.data.shards.write as module

    monkeypatch.setattr(module, "_WAIT", 0.1)
    tmp_path.joinpath("out").mkdir()
    with (
        FileLock(tmp_path / "out.lock"),
        pytest.raises(DataError, match=r"another process is writing the shards .*; wait for it"),
    ):
        write_shards(SHAPES, tmp_path / "out")


@pytest.mark.parametrize("folder", ["/proc/out", "/proc/new/out", "file/out"])
def test_a_folder_that_cannot_be_written(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(DataError, match=rf"{folder} cannot be written \(.*\); give another folder"):
        write_shards(SHAPES, Path(folder))


def test_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ShardJob, number: int) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardJob, "write", refuse)
        with pytest.raises(KeyboardInterrupt):
            write_shards(SHAPES, tmp_path, samples_per_shard=3)
    assert (tmp_path / UNFINISHED).exists()
    for _ in range(2):  # unfinished, then finished
        with pytest.raises(
            DataError, match=r"begun with other settings: samples_per_shard \(3, now 4\); give a new fold"
        ):
            write_shards(SHAPES, tmp_path, samples_per_shard=4)
        with pytest.raises(DataError, match=r"begun with other settings: dataset .*, samples \(11, now 12\)"):
            write_shards(replace(SHAPES, size=12), tmp_path, samples_per_shard=3)
        write_shards(SHAPES, tmp_path, samples_per_shard=3)


COCO, ODVG, VOC, YOLO = (member.miniature for member in (CocoConfig, OdvgConfig, VocConfig, YoloConfig))


@pytest.mark.parametrize(
    ("miniature", "file", "old", "new"),
    [
        (COCO, "instances_val.json", '"bbox": [36.0, ', '"bbox": [37.0, '),
        (COCO, "instances_val.json", '"name": "', '"name": "big '),
        (ODVG, "val.jsonl", '"bbox": [36.0, ', '"bbox": [37.0, '),
        (VOC, "0.xml", "<xmin>37<", "<xmin>36<"),
        (YOLO, "labels/0.txt", " 0.", " 0.0"),
    ],
)
def test_changed_annotations_are_refused(
    miniature: Any, file: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = miniature(tmp_path)
    for run in ("complete", "interrupted"):
        text = (tmp_path / file).read_text()
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            if run == "interrupted":
                patch.setattr(ShardJob, "write", Mock(side_effect=KeyboardInterrupt))
            write_shards(config, tmp_path / run)
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match=f"annotations have changed since the shards in .*{run} were begun; give a"):
            write_shards(config, tmp_path / run)
        (tmp_path / file).write_text(text)
        write_shards(config, tmp_path / run)


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("important")
    with pytest.raises(DataError, match="is not empty, and has no shards; give a new folder"):
        write_shards(SHAPES, tmp_path)
    with pytest.raises(DataError, match="is not empty, and has no shards; give a new folder"):
        write_shards(SHAPES, tmp_path / "mine.txt")


@pytest.mark.parametrize("number", [0, -1])
def test_a_shard_has_a_sample(number: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{number} samples per shard: write at least 1"):
        write_shards(SHAPES, tmp_path / "out", samples_per_shard=number)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def damaged(tmp_path: Path) -> CsvConfig:
    """A table of 12 expressions of 4 images, of which one is damaged."""
    rows = ["image,phrase,x1,y1,x2,y2"]
    for index in range(4):
        Image.fromarray(np.full((40, 50, 3), 9 * index, np.uint8)).save(tmp_path / f"{index}.png")
        rows += [f"{index}.png,thing {number},1,2,9,9" for number in range(3)]
    (tmp_path / "2.png").write_bytes(b"not an image")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    return CsvConfig(path=str(tmp_path / "table.csv"))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_named_or_skipped(workers: int, damaged: CsvConfig, tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match=r"table.csv, line 8: image .*2.png cannot be read"):
        write_shards(damaged, tmp_path / "error", samples_per_shard=3, workers=workers)
    index = write_shards(damaged, tmp_path / "error", samples_per_shard=3, workers=workers, bad_samples="skip")
    assert index == write_shards(damaged, tmp_path / "skip", samples_per_shard=3, workers=workers, bad_samples="skip")
    assert contents(tmp_path / "error") == contents(tmp_path / "skip")
    assert (index.skipped, [shard.samples for shard in index.shards]) == (3, [3, 3, 3])
    shards = ShardsConfig(path=str(tmp_path / "skip")).build()
    assert len(shards) == 9
    assert shards.image_groups(0).tolist() == [0, 0, 0, 1, 1, 1, 3, 3, 3]
    assert not shards.provenance.official
    with pytest.raises(DataError, match=r"begun with other settings: bad_samples \(skip, now error\)"):
        write_shards(damaged, tmp_path / "skip", samples_per_shard=3)


def test_bad_samples_cannot_become_errors_later(
    damaged: CsvConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because finished shards may lack bad samples; a refused call changes nothing."""
    with pytest.raises(BadSampleError):
        write_shards(damaged, tmp_path / "out", samples_per_shard=3)
    with pytest.raises(DataError, match=r"begun with other settings: samples_per_shard \(3, now 4\)"):
        write_shards(damaged, tmp_path / "out", samples_per_shard=4, bad_samples="skip")
    with pytest.raises(BadSampleError):
        write_shards(damaged, tmp_path / "out", samples_per_shard=3)
    with monkeypatch.context() as patch:
        patch.setattr("vg.data.shards.write._finish", lambda *_: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception, match="interrupted"):
            write_shards(damaged, tmp_path / "out", samples_per_shard=3, bad_samples="skip")
    with pytest.raises(DataError, match=r"begun with other settings: bad_samples \(skip, now error\)"):
        write_shards(damaged, tmp_path / "out", samples_per_shard=3)


def test_only_bad_samples(damaged: CsvConfig, tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(b"")
    with pytest.raises(DataError, match="every sample is bad"):
        write_shards(damaged, tmp_path / "out", bad_samples="skip")
    assert not (tmp_path / "out" / INDEX).exists()


@pytest.mark.parametrize(("limit", "ends"), [(1, [3, 6, 9, 12]), (4, [3, 6, 9, 12]), (7, [6, 12]), (99, [12])])
def test_images_are_not_divided(limit: int, ends: list[int], damaged: CsvConfig, tmp_path: Path) -> None:
    plan = ShardJob.of(damaged.build(), tmp_path, "tar", limit, skip=False)
    assert plan.ends.tolist() == ends


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the shard, and no partial file stays."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vg.data.shards.containers._add_member", full)
    with pytest.raises(OSError, match=r"No space left on device.*000000.tar"):
        write_shards(SHAPES, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = CocoConfig.miniature(tmp_path)
    main(["shard", dataset.path, str(tmp_path / "out"), "--workers=1", "--samples-per-shard=3", "--format=parquet"])
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: 4 samples of" in printed
    assert "in 2 shards" in printed
    assert not list(tmp_path.glob("*.lock"))
    assert f"data.train={{name: shards, path: {tmp_path / 'out'}}}" in printed
    assert json.loads((tmp_path / "out" / INDEX).read_bytes())["format"] == "parquet"
    main(["check", str(tmp_path / "out"), f"--output={tmp_path / 'report'}"])
    file = tmp_path / "out" / "000001.parquet"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path / "out"), f"--output={tmp_path / 'report'}"])
    printed = capsys.readouterr().out
    assert "damaged or missing files" in printed
    assert "000001.parquet: its SHA-256 is not that of index.json" in printed


@pytest.mark.parametrize("captions", ["phrases", "whole"])
def test_captions_that_are_left_out_are_announced(
    captions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    OdvgConfig.miniature(tmp_path)
    region = {"phrase": "star", "bbox": [1, 2, 30, 30], "tokens_positive": [[2, 6]]}
    line = {"filename": "0.png", "height": 64, "width": 64, "grounding": {"caption": "a star", "regions": [region]}}
    (tmp_path / "captions.jsonl").write_text(json.dumps(line))
    main(["shard", str(tmp_path / "captions.jsonl"), str(tmp_path / "out"), f"captions={captions}", "--workers=0"])
    announced = "captions are left out, only the phrases of their regions are written; captions=whole keeps them"
    assert (announced in capsys.readouterr().out) == (captions == "phrases")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split=test"], "--split test: choose one of train, eval"),
        (["--workers=-1"], "--workers -1: use 0 or more processes"),
        (["--samples-per-shard=0"], "0 samples per shard"),
        (["data.train={name: mixture, datasets: [{name: shapes}]}"], "data.train is a mixture; write each of its"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["shard", str(ROOT / "configs/demo_rec.yaml"), str(tmp_path / "out"), *arguments])
    shutil.rmtree(tmp_path, ignore_errors=True)
