"""Files from somebody else: one-line errors, no code that runs, no control characters in the terminal."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from vg.checkpoint import read_training_state
from vg.cli import PrintableFormatter, main
from vg.config import load_config
from vg.data.check import diagnose, to_text
from vg.data.check.formats import detect_format
from vg.data.detection.coco import CocoConfig
from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.yolo import YoloConfig
from vg.data.refcoco.source import RefcocoConfig
from vg.errors import BadSampleError, CheckpointError, UserError, printable
from vg.evaluation.table import aligned
from vg.inference.grounder import load_model
from vg.models.grounding_dino.checkpoints import bert_settings

RED = "\x1b[31mred\x1b[0m"


def test_printable() -> None:
    assert printable("le café 図\u00a0px") == "le café 図\\xa0px"
    assert printable("\x1b[2J\x07\r\n\x9b\u202e\udc80") == r"\x1b[2J\x07\r\n\x9b\u202e\udc80"
    assert printable("in " + "a" * 5000 + " is wrong") == "in " + "a" * 150 + " [...] " + "a" * 100 + " is wrong"
    assert len(printable("word " * 1000)) < 2000


def test_names_cannot_control_the_terminal(tmp_path: Path) -> None:
    coco = write_coco(tmp_path, lambda row: row.update(name=RED + row["name"]), "categories")
    assert r"\x1b[31mred" in to_text(diagnose({"train": coco}, 100, None, None))
    assert "\x1b" not in to_text(diagnose({"train": coco}, 100, None, None))
    assert aligned([["", "ap"], [RED, "1"]]).splitlines()[1] == r"\x1b[31mred\x1b[0m   1"
    record = logging.LogRecord("vg", logging.WARNING, "", 0, "%s is unused\nsecond line", (RED,), None)
    assert PrintableFormatter("%(message)s").format(record) == "\\x1b[31mred\\x1b[0m is unused\nsecond line"
    with pytest.raises(SystemExit) as stopped:
        main(["eval", f"nowhere/{RED}"])
    assert "\x1b" not in str(stopped.value)
    assert r"\x1b[31m" in str(stopped.value)


def write_coco(folder: Path, change: Callable[[dict[str, Any]], Any], table: str) -> CocoConfig:
    """A tiny dataset in which the first row of a table is changed."""
    config = CocoConfig.miniature(folder)
    document = json.loads(Path(config.path).read_text())
    change(document[table][0])
    Path(config.path).write_text(json.dumps(document))
    return config


@pytest.mark.parametrize(
    ("table", "key"),
    [("images", key) for key in ("id", "height", "width", "file_name", "coco_url")]
    + [("categories", "id"), ("categories", "name")]
    + [("annotations", key) for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")],
)
@pytest.mark.parametrize(
    "value", [None, [1], [[1]], {"a": 1}, "x", float("nan"), -1, 10**30, True, RED, "a" * 300, "\0"]
)
def test_odd_coco_values_are_errors_or_answered(tmp_path: Path, table: str, key: str, value: Any) -> None:
    config = write_coco(tmp_path, lambda row: row.update({key: value}), table)
    with suppress(UserError):
        source = config.build()
        for index in range(len(source)):
            source.load(index, 0)
    to_text(diagnose({"train": config}, 100, None, None))


def test_long_names_of_images_are_bad_samples(tmp_path: Path) -> None:
    source = write_coco(tmp_path, lambda row: row.update(file_name="a" * 300 + ".png"), "images").build()
    with pytest.raises(BadSampleError, match=r"image a+ cannot be opened \(File name too long\)"):
        source.load(0, 0)


def deep(opening: str, closing: str) -> str:
    return opening * 100_000 + "1" + closing * 100_000


@pytest.mark.parametrize("content", [deep("[", "]"), deep('{"a": ', "}")], ids=["lists", "objects"])
def test_deeply_nested_files_are_errors(tmp_path: Path, content: str) -> None:
    def write(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    row = write("row.jsonl", '{"filename": "a.jpg", "detection": {"instances": []}}')
    plain = write("config.yaml", "model: {name: rec}")
    (tmp_path / "vg" / "tokenizer").mkdir(parents=True)
    for attempt in (
        lambda: load_config(write("deep.yaml", f"model: {content}")),
        lambda: load_config(plain, [f"train.seed={content}"]),
        lambda: CocoConfig(path=write("coco.json", f'{{"images": {content}}}')).build(),
        lambda: OdvgConfig(path=write("odvg.jsonl", content)).build(),
        lambda: OdvgConfig(path=row, label_map=write("label_map.json", content)).build(),
        lambda: YoloConfig(path=write("data.yaml", f"names: {content}")).build(),
        lambda: RefcocoConfig(path=write("refcoco.json", content), split="val").build(),
        lambda: load_model(Path(write("transformers/config.json", content)).parent),
        lambda: load_model(Path(write("vg/config.yaml", content)).parent),
        lambda: bert_settings(str(Path(write("bert/config.json", content)).parent)),
    ):
        with pytest.raises(UserError) as error:
            attempt()
        assert len(str(error.value)) < 1000
    assert detect_format(Path(row)), "the label map beside it is ignored"


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("echo > ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_are_refused_without_advice_to_run_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model.pth", "training.pt"):
        if zipped:
            torch.save({"model": Hostile()}, name)
        else:
            Path(name).write_bytes(pickle.dumps(Hostile(), protocol=2))
    for attempt in (lambda: load_model("model.pth"), lambda: read_training_state(tmp_path)):
        with pytest.raises(CheckpointError) as error:
            attempt()
        assert "weights_only" not in str(error.value)
    assert not Path("ran").exists()
