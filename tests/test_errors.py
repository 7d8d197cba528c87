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
from vg.cli import main
from vg.cli.messages import PrintableFormatter
from vg.config import load_config
from vg.data.check import diagnose, to_text
from vg.data.check.formats import detect_format
from vg.data.detection.coco import CocoConfig
from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.voc import VocConfig
from vg.data.detection.yolo import YoloConfig
from vg.data.prompt import Expressions, Prompts
from vg.data.refcoco.source import RefcocoConfig
from vg.errors import BadSampleError, CheckpointError, UserError, printable
from vg.evaluation.table import aligned
from vg.files import read_text
from vg.inference.load import load_model
from vg.models.encoders import load_tokenizer
from vg.models.grounding_dino.checkpoints import bert_settings
from vg.models.grounding_dino.config import BertConfig
from vg.models.settings import TINY_BERT
from vg.types import TextSpec

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


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    config = write_coco(tmp_path, lambda row: row.update(name="cat \ud800"), "categories")
    assert r"not valid Unicode" in to_text(diagnose({"train": config}, 100, lambda phrases: [len(phrases)], None))
    tokenizer = load_tokenizer(BertConfig(architecture=TINY_BERT))
    for texts in (Prompts(TextSpec(tokenizer, 64, (".",)), one_prompt=True), Expressions(TextSpec(tokenizer, 64))):
        (problem,) = texts.problems([("a", ("cat",)), ("b", ("cat \ud800",))]).items()
        assert problem == (1, r"b: the phrase 'cat \ud800' is not valid Unicode; correct it")
    with pytest.raises(BadSampleError, match="not valid Unicode"):
        texts.arrays(["cat \ud800"], ["b"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes need POSIX")
def test_devices_and_named_pipes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "Annotations").mkdir()
    for name in ("a.json", "a.jsonl", "Annotations/a.xml"):
        os.mkfifo(tmp_path / name)
    for config in (
        CocoConfig(path=str(tmp_path / "a.json")),
        OdvgConfig(path=str(tmp_path / "a.jsonl")),
        VocConfig(path=str(tmp_path)),
        CocoConfig(path="/dev/zero"),
    ):
        with pytest.raises((UserError, OSError), match="Not a regular file"):
            config.build()


@pytest.mark.parametrize("content", ["a\n".encode("utf-16"), "é\n".encode("latin1")])
def test_text_in_other_encodings(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(OSError, match=r"Not encoded in UTF-8 .*a\.txt"):
        read_text(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("a\n".encode("utf-8-sig"))
    assert read_text(tmp_path / "a.txt") == "a\n"


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
