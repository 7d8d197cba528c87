"""The command line ends without a traceback when it is interrupted, or when nobody reads its output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vg.checkpoint import write_model
from vg.cli import main, new_parser
from vg.cli.evaluate import name_of
from vg.config import RunConfig, recipe_path
from vg.errors import CheckpointError, ConfigError
from vg.evaluation.evaluator import DatasetEvaluator
from vg.inference.load import load_model
from vg.training.trainer import Trainer

ROOT = Path(__file__).parents[1]


def test_closed_output_is_not_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "vg", "config", "configs/demo_rec.yaml"],
        stdout=writing,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_broken_pipes_elsewhere_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise BrokenPipeError("a worker has ended")

    monkeypatch.setattr("vg.cli.ops.run", fail)
    with pytest.raises(SystemExit, match="error: a worker has ended"):
        main(["ops"])


def test_interruption_prints_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vg.cli.ops.run", interrupt)
    with pytest.raises(SystemExit, match="interrupted"):
        main(["ops"])


def test_check_names_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", str(ROOT / "configs/own_small.yaml"), f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    assert "cannot read mine/train.json (relative to" in printed
    assert "cannot read mine/val.json (relative to" in printed
    assert "2 errors, 0 warnings" in printed  # the cause alone, for each dataset


def test_empty_tokenizer_folder_is_named(tiny_config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    Trainer(config := tiny_config(train={"max_steps": 1})).fit()
    folder = Path(config.train.output, "best", "tokenizer")
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer \(the tokenizer of the checkpoint\) cannot be loaded"):
        load_model(config.train.output)


def test_detections_are_refused_before_the_evaluation(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    write_model(tmp_path, config.model.build(), config)
    monkeypatch.setattr(DatasetEvaluator, "predict", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(SystemExit, match=r"data\.eval has no detection dataset"):
        main(["eval", str(tmp_path), "--detections"])


def test_detections_are_written(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "1.png")
    image = {"id": 1, "file_name": "1.png", "width": 64, "height": 48}
    box = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 7, "name": "dog"}]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    config = tiny_config(data={"eval": {"name": "coco", "path": str(tmp_path / "coco.json")}})
    write_model(tmp_path, config.model.build(), config)
    main(["eval", str(tmp_path), "--detections"])
    rows = json.loads((tmp_path / "eval" / "detections.json").read_text())
    assert {(row["image_id"], row["category_id"]) for row in rows} == {(1, 7)}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], ""),
        (["data.eval.split=testA"], "split=testA"),
        (["data.eval.split=testB", "data.eval.size=9"], "split=testB,size=9"),
        (["data.eval.base.split=test", "train.precision=bf16"], "base.split=test,train.precision=bf16"),
        (["data.eval={name: coco, path: a.b/c=d}"], "data.eval=_name__coco,_path__a.b_c=d_-adb7ab5c"),
    ],
)
def test_evaluations_with_other_settings_have_folders_of_their_own(overrides: list[str], name: str) -> None:
    assert name_of(overrides) == name


def test_quick_demo_trains_for_ninety_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[RunConfig] = []

    def record(config: RunConfig, *_: bool) -> None:
        configs.append(config)
        raise ConfigError("recorded")

    monkeypatch.setattr("vg.training.trainer.Trainer", record)
    for arguments in (["demo"], ["demo", "--quick"], ["demo", "--quick", "train.minutes=0.5"]):
        with pytest.raises(SystemExit, match="recorded"):
            main(arguments)
    assert [config.train.minutes for config in configs] == [None, 1.5, 0.5]
    assert [config.train.epochs for config in configs] == [4, 4, 4]  # train.minutes takes precedence
    assert [config.train.output for config in configs] == ["runs/demo", "runs/demo_quick", "runs/demo_quick"]
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--quick", "--config", "configs/demo_rec.yaml"])


def test_the_demo_replaces_only_its_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "fit", lambda self: sys.exit("begins"))
    monkeypatch.setattr("vg.distributed.ignore_stop_signals", lambda: None)
    own, mine = ["demo"], ["demo", "train.output=mine"]
    (tmp_path / "base.yaml").write_text(f"base: {recipe_path('demo_rec.yaml')}\ntrain: {{output: mine}}\n")
    for folder in ("runs/demo", "mine"):
        (tmp_path / folder / "best").mkdir(parents=True)
        (tmp_path / folder / "best" / "model.safetensors").touch()
    for command in (mine, ["demo", "--quick", *mine[1:]], ["demo", "--config", "base.yaml"]):
        with pytest.raises(SystemExit, match=r"mine already contains a run .*--overwrite"):
            main(command)
    assert (tmp_path / "mine" / "best" / "model.safetensors").exists()
    for command, folder in ((own, "runs/demo"), ([*mine, "--overwrite"], "mine")):
        with pytest.raises(SystemExit, match="begins"):
            main(command)
        assert not (tmp_path / folder / "best").exists()
    with pytest.raises(SystemExit, match="nothing to resume"):
        main([*mine, "--resume"])


@pytest.mark.parametrize(
    "words",
    [
        "label MODEL DATA OUT -p dog a=b model.x=1",
        "label MODEL DATA OUT model.x=1 -p dog a=b",
        "label -p dog model.x=1 --nms 0.5 MODEL DATA OUT --phrases a=b",
        "predict MODEL IMAGE -p dog a=b model.x=1",
    ],
)
def test_overrides_after_phrases_are_not_phrases(words: str) -> None:
    options = new_parser().parse_args(words.split())
    assert (options.phrases, options.overrides) == (["dog", "a=b"], ["model.x=1"])


def test_overrides_on_both_sides_of_an_option_are_kept() -> None:
    parser = new_parser()
    for _ in range(2):
        options = parser.parse_args(
            ["label", "-p", "dog", "model.x=1", "--nms", "0.5", "MODEL", "DATA", "OUT", "model.y=2"]
        )
        assert options.overrides == ["model.x=1", "model.y=2"]
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["label", "MODEL", "DATA", "OUT", "-p", "model.x=1"])


def test_resume_and_overwrite_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "configs/demo_rec.yaml", "--resume", "--overwrite"])
    assert "--overwrite: not allowed with argument --resume" in capsys.readouterr().err


def test_a_wrong_option_prints_the_usage_of_its_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["shard", "data", "out", "--worker", "3", "--nonsense"])
    assert capsys.readouterr().err.startswith("usage: vg shard ")


def test_convert_names_the_folder_of_a_yaml_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(SystemExit, match=r"config\.yaml is a YAML file, not a model; give the folder of the run"):
        main(["convert", str(tmp_path / "config.yaml"), str(tmp_path / "out"), "--to", "vg"])


@pytest.mark.parametrize(
    "words",
    [
        "eval x.onnx",
        "eval x.onnx --suite refcoco",
        "export x.onnx y.pt2",
        "predict x.pt2 image.png dog",
        "convert x.onnx out --to vg",
    ],
)
def test_an_exported_model_is_refused_where_torch_needs_the_checkpoint(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.onnx", "x.pt2"):
        (tmp_path / name).touch()
    with pytest.raises(
        SystemExit, match=r"x\.\w+ is an exported model; give the run or checkpoint that it was exported"
    ):
        main(words.split())


@pytest.mark.parametrize("words", ["check configs/demo_rec.yaml --output", "interpolate a b --output", "export a"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"file/out\S* cannot be written \(.*\): choose another path"):
        main([*words.split(), str(tmp_path / "file/out.pt2")])
