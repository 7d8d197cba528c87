"""Runs of vg finetune from a folder to a model, with both kinds of data and both families."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vg
from tests.training.test_distributed import launch
from vg.checkpoint import write_model
from vg.cli import main
from vg.config import load_config
from vg.data import CsvConfig, YoloConfig
from vg.errors import ConfigError
from vg.finetuning.run import comparison
from vg.inference import load

QUICK = ["train.max_steps=2", "train.trackers=[]", "data.workers=0", "data.batch_size=2", "train.eval_every=2"]


def add_unused_class(folder: Path) -> None:
    """Add a class without boxes before all others of a YOLO folder."""
    file = folder / "data.yaml"
    file.write_text(file.read_text().replace("names:\n", "names:\n- unused\n"))
    for labels in (folder / "labels").iterdir():
        lines = [line.split(maxsplit=1) for line in labels.read_text().splitlines()]
        labels.write_text("".join(f"{int(label) + 1} {box}\n" for label, box in lines))


def test_detection_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    YoloConfig.miniature(tmp_path / "shapes")
    add_unused_class(tmp_path / "shapes")
    command = ["finetune", "shapes", "--model", "small", *QUICK]
    main(command)
    printed = capsys.readouterr().out
    run = tmp_path / "runs" / "shapes"
    assert "no validation split" in printed
    assert "before and after 2 steps" in printed or "did not improve on the initial weights" in printed
    assert f"predictions on it: {Path('runs', 'shapes', 'predictions.png')}" in printed
    assert (run / "comparison.txt").read_text().splitlines()[0].split() == ["before", "after"]
    assert Image.open(run / "predictions.png").width > 400
    assert load_config(run / "config.yaml").train.max_steps == 2
    words = printed.splitlines()[-1].removeprefix("next: vg ")
    assert printed.count("vg predict") == 1
    assert words == "predict runs/shapes runs/shapes/example.png"
    main([*shlex.split(words), "--threshold", "0"])
    assert (tmp_path / "prediction.png").exists()
    classes = json.loads((run / "best" / "classes.json").read_text())
    assert "unused" in classes
    assert vg.Grounder(run).classes == tuple(classes)
    [checkpoint] = (run / "checkpoints").iterdir()
    assert json.loads((checkpoint / "classes.json").read_text()) == classes
    for own in ([], ["--output", "other", "train.output=runs/shapes"]):
        with pytest.raises(SystemExit, match="already contains a run"):
            main([*command, *own])
    assert capsys.readouterr().out.count("#") == 0, "before the data is checked and the plan is printed"
    main(["finetune", str(tmp_path / "shapes"), "--model", "small", "--resume", "train.max_steps=3"])
    assert "continues after step 2" in capsys.readouterr().out
    (tmp_path / "runs" / "shapes").rename(tmp_path / "moved")
    main(["finetune", "shapes", "--resume", "train.output=moved", "train.max_steps=4"])
    assert "continues after step 3" in capsys.readouterr().out
    (tmp_path / "moved").rename(tmp_path / "runs" / "shapes")
    with pytest.raises(SystemExit):
        main(["finetune", "shapes", "--resume", "--overwrite"])
    assert "not allowed with argument" in capsys.readouterr().err
    monkeypatch.setattr("vg.distributed.gather_object", lambda _: pytest.fail("the processes are not joined yet"))
    with pytest.raises(SystemExit, match="already contains a run"):
        main(command)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "others").mkdir()
    YoloConfig.miniature(tmp_path / "others")
    names = [
        ["others", "--output", "runs/shapes"],
        ["shapes", "--model", "runs/shapes"],
        ["shapes", "--phrases", "green star"],
    ]
    for arguments, changed in zip(names, (r"the data: .*shapes.*others", "--model: small", "--phrases"), strict=True):
        with pytest.raises(SystemExit, match=rf"is a run with other options \({changed}.*leave out --resume"):
            main(["finetune", *arguments, "--resume"])
    with pytest.raises(SystemExit, match="runs/others contains no run to continue; leave out --resume"):
        main(["finetune", "others", "--resume"])


def test_expressions_in_python(
    tmp_path: Path,
    tiny_config: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rec model is fine-tuned on a table; its weights are where it starts."""
    (tmp_path / "data").mkdir()
    CsvConfig.miniature(tmp_path / "data")
    config = tiny_config()
    start = config.model.build()
    (tmp_path / "start").mkdir()
    write_model(tmp_path / "start", start, config)
    overrides = [*QUICK, "optim.lr=0", "data.augment={}"]
    loaded: list[Any] = []
    open_model = load.open_model
    monkeypatch.setattr(load, "open_model", lambda path, *rest: loaded.append(path) or open_model(path, *rest))
    grounder = vg.finetune(tmp_path / "data", tmp_path / "start", output=tmp_path / "run", overrides=overrides)
    assert loaded == [tmp_path / "run"], "once, for the report and for the caller"
    assert (tmp_path / "run" / "curves.png").exists()
    trained = grounder.model.own_state_dict()
    assert all(tensor.equal(trained[name]) for name, tensor in start.own_state_dict().items())
    result = grounder(np.zeros((40, 60, 3), np.uint8), "the red one")
    assert len(result) == 1
    best = tmp_path / "run" / "best"
    assert f"training did not improve on the initial weights; {best} holds them:" in capsys.readouterr().out
    assert "miou" in (tmp_path / "run" / "comparison.txt").read_text()
    more = [*overrides, "train.max_steps=3"]
    same = {"output": tmp_path / "run", "resume": True}
    vg.finetune(tmp_path / "data", tmp_path / "start", overrides=more, **same)
    with pytest.raises(ConfigError, match="--images"):
        vg.finetune(tmp_path / "data", images=tmp_path, **same)
    (tmp_path / "start" / "model.safetensors").unlink()
    assert vg.Grounder(tmp_path / "run").model.config.weights is None, "a checkpoint has all weights itself"


TWO_PROCESSES = """
import os
from vg.cli import main
from vg.finetuning import sizes

first = os.environ["RANK"] == "0"
sizes.available_memory = lambda: ("cpu", (2 if first else 1) * {memory})
try:
    main(["finetune", "data", "--model", "small", "--output", "run", "train.max_steps=1", "data.workers=0"])
except SystemExit as stop:
    print(stop)
    raise
"""


def test_two_processes_share_a_plan(tmp_path: Path) -> None:
    """The batch size is that of the process with the least memory, which the machine's processes share."""
    (tmp_path / "train.py").write_text(TWO_PROCESSES.format(memory=2 * (16 * 2_546_760 + 100_000_000)))
    assert launch(tmp_path, status=1, forked=False).count("error: data does not exist") == 2
    (tmp_path / "data").mkdir()
    YoloConfig.miniature(tmp_path / "data")
    printed = launch(tmp_path)
    assert printed.count("# memory: ") == printed.count("next: vg predict") == 1
    assert "by each of 2 processes; a batch of 2 needs" in printed
    assert "2 batches per optimizer step (8 samples in all)" in printed
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.data.batch_size, config.train.accumulate) == (2, 2)


def test_comparison() -> None:
    before = {"step": 0, "ap": 0.1, "ap50": 0.2, "cat/ap": 0.1}
    after = {"step": 9, "ap": 0.5, "ap50": 0.75, "cat/ap": 0.5, "cat/ap50": 0.75, "num_images": 4, "data": "x"}
    assert comparison(before, after).splitlines() == [
        "        before   after",
        "ap      0.1000  0.5000",
        "ap50    0.2000  0.7500",
        "cat/ap  0.1000  0.5000",
    ]
    assert "     -  0.5000" in comparison({}, after)
