"""What a run prints: its plan, the remaining time, one line per evaluation, and where the results are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NO_DROPOUT, history, scripted
from vg.config import RunConfig
from vg.data import CocoConfig
from vg.models.grounding_dino.config import GroundingDinoConfig
from vg.training import report
from vg.training.data import example_phrases
from vg.training.report import epoch_table, last_gain, print_above_bar
from vg.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
DETECTION = {"name": "shapes", "split": "val", "image_size": 64, "size": 3, "view": "detection"}


def test_plan_names_data_model_and_steps(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(tiny_config(train={"max_steps": 3, "epochs": 2}))
    trainer.fit()
    printed = capsys.readouterr().out
    assert f"rec, {trainer.unwrapped_model.num_parameters(trainable_only=True):,} trainable parameters" in printed
    assert "train: 20 expressions of shapes (expression, seed 0) (train), such as " in printed
    assert "eval: 5 expressions of shapes (expression, seed 0) (val), such as " in printed
    assert repr(trainer.data.dataset.source.load(0, 0).phrases[0]) in printed
    assert "3 steps of 4 samples (0.6 epochs of 5 steps) on cpu (1 process), float32" in printed


def test_examples_begin_with_phrases_that_have_boxes(tmp_path: Path) -> None:
    config = CocoConfig.miniature(tmp_path)
    file = Path(config.path)
    file.write_text(file.read_text().replace('"categories": [', '"categories": [{"id": -1, "name": "unused"}, '))
    assert config.build().load(0, 0).phrases[0] == "unused"
    assert example_phrases(config.build())[0] != "unused"


def test_evaluations_and_the_end_have_absolute_values(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    trainer = scripted(Trainer(config), [0.25, 0.125])
    trainer.fit()
    trainer.report.print_next_command()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("step ")] == [
        "step 5 (epoch 1): miou 0.2500 (best so far)",
        "step 10 (epoch 2): miou 0.1250; since the first evaluation: lost 12.5 mIoU on shapes (expression, seed 0)",
    ]
    assert "best: step 5, miou 0.2500" in lines
    folder = Path(config.train.output)
    assert f"results in {folder}: best, checkpoints, config.yaml, curves.png, history.jsonl" in "\n".join(lines)
    assert re.fullmatch(rf"next: vg predict {folder} IMAGE '.+'", lines[-1])


@pytest.mark.parametrize(
    ("scores", "gain"),
    [
        ([0.2, 0.3, 0.38], 0.08),
        ([0.5, 0.4, 0.55], 0.15),  # after a setback
        ([0.688, 0.767, 0.829, 0.843, 0.869, 0.865], None),  # of the demo
        ([0.6, 0.8, 0.88, 0.92], 0.04),
        ([0.6, 0.8, 0.89, 0.925], None),  # slows down
        ([0.60, 0.61, 0.63], None),  # little
        ([0.6, 0.3, 0.5], None),  # not the best
        ([0.1, 0.5], None),  # two evaluations show no trend
        ([], None),
    ],
)
def test_a_run_that_still_learned_at_its_end(scores: list[float], gain: float | None) -> None:
    assert last_gain(scores) == (None if gain is None else pytest.approx(gain))


@pytest.mark.parametrize(("scores", "hint"), [([0.2, 0.3, 0.4], True), ([0.2, 0.6, 0.7], False)])
def test_the_end_says_if_a_longer_run_would_gain(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str], scores: list[float], hint: bool
) -> None:
    scripted(Trainer(tiny_config(train={"epochs": 3})), scores).fit()
    line = "the last evaluation still gained 10.0 points of miou: a longer run (train.minutes, "
    assert (line in capsys.readouterr().out) == hint


def test_several_datasets_in_one_line(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"name": "shapes", "split": "val", "image_size": 64, "size": 2, "seed": 2}
    Trainer(tiny_config(data={"eval": {"new": other, "base": other | {"seed": 3}}}, train={"max_steps": 1})).fit()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    number = r"\d\.\d{4}"
    assert re.match(rf"step 1 \(epoch 0\.2\): new: miou {number}, acc@0\.5 {number}, .*; base: miou {number}", line)


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_above_bar("next: vg predict '\x1b[31mred'\nsecond line")
    assert capsys.readouterr().out == "next: vg predict '\\x1b[31mred'\nsecond line\n"


def test_epoch_table_of_the_published_card(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(model=NO_DROPOUT)
    Trainer(config).fit()
    rows = history(config)
    losses, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "miou" in row]
    assert all(0 <= row["train_iou"] <= 1 for row in losses)
    assert all(row["eval_loss"] > 0 for row in evaluations)
    table = Path(config.train.output, "epochs.md").read_text()
    header, _, *lines = table.splitlines()
    assert header == "| epoch | train loss | train IoU | val loss | val IoU |"
    # Rows of history are the means over 2, 2 and 1 steps.
    first = [sum(n * row[key] for n, row in zip((2, 2, 1), losses, strict=False)) / 5 for key in ("loss", "train_iou")]
    first += [evaluations[0][key] for key in ("eval_loss", "miou")]
    assert lines[0] == "| 1 | " + " | ".join(f"{value:.4f}" for value in first) + " |"
    assert len(lines) == 2
    assert table in capsys.readouterr().out


def test_any_number_of_objects_logs_the_same_terms_at_every_step(tiny_config: MakeConfig) -> None:
    """Expressions with one object and with none alternate; in batches of one, only the first would have an IoU."""
    scenes = {"name": "shapes", "image_size": 64, "size": 4, "kinds": ["attribute", "absent"]}
    config = tiny_config(
        model={"head": NO_DROPOUT["head"] | {"objects": "any"}},
        data={"train": scenes, "eval": scenes, "batch_size": 1},
        train={"max_steps": 4, "log_every": 4},
    )
    Trainer(config).fit()
    assert all("train_iou" not in row for row in history(config))


def test_losses_of_an_evaluation_are_those_of_its_samples(tiny_config: MakeConfig) -> None:
    """The loss on the evaluation data does not depend on how its samples are batched."""
    values = []
    for size in (5, 2):
        config = tiny_config(data={"eval_batch_size": size}, train={"max_steps": 1})
        trainer = Trainer(config)
        values.append(trainer.evaluator.run(trainer.unwrapped_model).losses()["eval_loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_detection_has_no_epoch_table(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(data={"train": DETECTION, "eval": DETECTION, "batch_size": 1}, train={"max_steps": 1})
    config.model = GroundingDinoConfig.tiny()
    Trainer(config).fit()
    printed = capsys.readouterr().out
    assert not Path(config.train.output, "epochs.md").exists()
    assert "train: 3 images of shapes (detection, seed 0) (val), such as " in printed
    assert re.search(r"step 1 \(epoch 0\.333\): ap \d\.\d{4}, ap50 .* \(best so far\)", printed)
    assert not {"train_iou", "eval_loss"} & {key for row in history(config) for key in row}


def test_remaining_time_after_the_first_steps(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 160.0])
    monkeypatch.setattr(report, "WARM_UP", 2)
    monkeypatch.setattr(report, "TIMED", 2)
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(clock))
    Trainer(tiny_config()).fit()
    assert "remaining: about 3 min for 6 steps, without evaluations" in capsys.readouterr().out


def test_table_of_rows_from_a_resumed_run() -> None:
    """Means are weighted with the steps of each row; evaluations within an epoch have fractions of it."""
    rows: list[dict[str, Any]] = [
        {"step": 0, "miou": 0.1, "eval_loss": 3.0},
        {"step": 1, "loss": 4.0, "train_iou": 0.0},
        {"step": 4, "loss": 2.0, "train_iou": 0.4},
        {"step": 4, "miou": 0.5, "eval_loss": 2.0},
        {"step": 8, "loss": 1.0, "train_iou": 0.5},
    ]
    assert epoch_table(rows, 8).splitlines()[2:] == ["| 0.5 | 2.5000 | 0.3000 | 2.0000 | 0.5000 |"]
    assert epoch_table([{"step": 1, "loss": 1.0}, {"step": 1, "miou": 0.1}], 8) == "", "a model with several boxes"


def test_best_results_are_stored(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"max_steps": 1})
    results = Trainer(config).fit()
    stored = json.loads((Path(config.train.output) / "best" / "validation.json").read_text())
    assert stored == results
    assert {"miou", "acc@0.5", "data", "split", "protocol", "step"} <= stored.keys()
