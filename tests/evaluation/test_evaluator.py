"""Metrics by task, several evaluation datasets in one run, and the reported change since the first evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import BertTokenizer

import vg
from tests.conftest import history, scripted_result
from vg.boxes import to_pixels
from vg.config import DataConfig, RunConfig, dump_config, load_config, parse_config
from vg.data.mixture import MixtureConfig
from vg.data.source import Provenance
from vg.data.synthetic.shapes import ShapesConfig
from vg.distributed import new_accelerator
from vg.errors import ConfigError, PredictionError
from vg.evaluation.evaluator import Evaluator
from vg.evaluation.results import DatasetResult, EvaluationResult
from vg.evaluation.table import table
from vg.metrics import CocoMetric, RecMetric
from vg.models.base import GroundingModel
from vg.training.trainer import Trainer
from vg.types import Batch, Prediction, StretchedImage, TextSpec

MakeConfig = Callable[..., RunConfig]
EXPRESSIONS = ShapesConfig(split="val", size=6, image_size=64)
DETECTION = ShapesConfig(split="val", size=5, image_size=64, view="detection")
RACCOONS = Path(__file__).resolve().parents[3] / "shared" / "data" / "raccoon120"


class OracleOutput(NamedTuple):
    zero: Tensor


class Oracle(GroundingModel):
    """Predicts the ground-truth boxes, shifted, for any number of phrases."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shift = 0.0  # pixels

    @property
    def image_spec(self) -> StretchedImage:
        return StretchedImage(height=32, width=32)

    @property
    def text_spec(self) -> TextSpec:
        vocabulary = Path(vg.__file__).parent / "models" / "small_vocabulary.txt"
        return TextSpec(BertTokenizer(vocab=str(vocabulary)), max_tokens=64, delimiters=(".",))

    def load_tokenizer(self, folder: str) -> None:
        raise NotImplementedError

    def forward(self, batch: Batch) -> OracleOutput:
        assert not self.training
        return OracleOutput(self.weight)

    def loss(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def batch_weight(self, batch: Batch) -> int:
        raise NotImplementedError

    def predict(self, output: Any, batch: Batch) -> list[Prediction]:
        return [
            Prediction(
                target.id,
                to_pixels(target.boxes, target.size) + self.shift,
                torch.linspace(0.9, 0.6, len(target.boxes)),
                target.phrase_ids,
                target.phrases,
            )
            for target in batch.targets
        ]


def evaluator(best_metric: str | None = None, **datasets: Any) -> Evaluator:
    config = DataConfig(train=EXPRESSIONS, eval=datasets.get("only", datasets), eval_batch_size=4, workers=0)
    return Evaluator(config, Oracle(), Accelerator(cpu=True), best_metric)


def shifted_oracle() -> Oracle:
    model = Oracle()
    model.shift = 1.0
    return model


def test_the_data_selects_the_metric() -> None:
    both = evaluator(words=EXPRESSIONS, objects=DETECTION)
    assert [type(dataset.metric) for dataset in both.datasets] == [RecMetric, CocoMetric]
    assert both.best_metric == "miou"
    assert evaluator(only=DETECTION).best_metric == "ap"


def test_a_mixture_is_evaluated_if_its_datasets_have_one_metric() -> None:
    assert len(evaluator(only=MixtureConfig(datasets=[DETECTION, DETECTION])).datasets[0].data) == 10
    with pytest.raises(ConfigError, match=r"data\.eval\.both: a mixture of detection and expressions"):
        evaluator(both=MixtureConfig(datasets=[DETECTION, EXPRESSIONS]))


def test_result_of_one_dataset() -> None:
    model = Oracle().train()
    results = evaluator(only=DETECTION).run(model)
    assert model.training
    (dataset,) = results.datasets
    assert (dataset.metrics["ap"], dataset.metrics["num_images"]) == (pytest.approx(1), 5)
    assert (dataset.provenance.data, dataset.provenance.split) == ("shapes (detection, seed 0)", "val")
    assert dataset.protocol.startswith("COCO")
    assert results.score == dataset.metrics["ap"]
    assert "set" not in results.flat()


def test_results_of_several_datasets() -> None:
    results = evaluator(objects=DETECTION, words=EXPRESSIONS).run(shifted_oracle())
    objects, words = results.datasets
    (alone,) = evaluator(only=EXPRESSIONS).run(shifted_oracle()).datasets
    assert words == replace(alone, name="words", prefix="words")
    (alone,) = evaluator(only=DETECTION).run(shifted_oracle()).datasets
    assert objects == replace(alone, name="objects")
    assert 0 < objects.metrics["ap"] < 1
    prefixed = {f"words/{key}": value for key, value in words.flat().items()}
    assert json.loads(json.dumps(results.flat())) == objects.flat() | prefixed


def test_a_dataset_with_the_name_of_a_class_is_an_error() -> None:
    name = next(iter(evaluator(only=DETECTION).run(Oracle()).datasets[0].groups))
    with pytest.raises(ConfigError, match=rf"data\.eval\.{name}: .*rename the dataset"):
        evaluator(objects=DETECTION, **{name: DETECTION}).run(Oracle())


def test_boxes_that_are_not_finite_stop_the_evaluation(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    model = config.model.build()
    with torch.no_grad():
        next(model.head.parameters()).fill_(torch.nan)
    with pytest.raises(PredictionError, match=r"boxes or scores .* are not finite"):
        Evaluator(config.data, model, new_accelerator()).run(model)


def test_the_best_metric_is_checked_at_the_start(tiny_config: MakeConfig) -> None:
    for name in ("acc@0.75", "recall@5", "objects/ap", "relation/miou", "auc"):
        assert evaluator(name, words=EXPRESSIONS, objects=DETECTION).best_metric == name
    for name in ("ap", "iou", "objects/app", "num_expressions"):
        with pytest.raises(ConfigError, match=rf"train\.best_metric: '{name}' is not one of miou, acc@0\.5"):
            evaluator(name, words=EXPRESSIONS, objects=DETECTION)
    with pytest.raises(ConfigError, match=r"train\.best_metric: 'ap'"):
        Trainer(tiny_config(train={"best_metric": "ap"}))
    trainer = Trainer(tiny_config(train={"best_metric": "nothing/miou"}))
    with pytest.raises(ConfigError, match=r"train\.best_metric: 'nothing/miou' is not one of .*relation/miou"):
        trainer.fit()


def test_change_since_the_first_evaluation() -> None:
    both = evaluator(raccoon=DETECTION, base=EXPRESSIONS)
    rows = [
        {"step": 0, "loss": 1.0},
        {"step": 0, "ap": 0.101, "base/miou": 0.5},
        {"step": 5, "ap": 0.9, "base/miou": 0},
    ]
    result = result_of(raccoon={"ap": 0.513}, base={"miou": 0.487})
    assert both.change_since_first(rows, result) == "gained 41.2 AP on raccoon, lost 1.3 mIoU on base"
    assert both.change_since_first(rows[:1], result_of(raccoon={"ap": 0.5}, base={"miou": 0.4})) == ""
    alone = evaluator(only=EXPRESSIONS)
    expected = "gained 0.0 mIoU on shapes (expression, seed 0)"
    assert alone.change_since_first([{"miou": 0.25}], scripted_result(miou=0.25)) == expected


def result_of(**datasets: dict[str, float]) -> EvaluationResult:
    """A result with these metrics of each dataset."""
    (scripted,) = scripted_result(miou=0.0).datasets
    results = tuple(
        replace(scripted, name=name, prefix=name if index else "", metrics=metrics)
        for index, (name, metrics) in enumerate(datasets.items())
    )
    return EvaluationResult(results, "ap")


def test_run_that_evaluates_before_the_first_step(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    new, base = ({"name": "shapes", "split": "val", "image_size": 64, "size": 3, "seed": seed} for seed in (1, 2))
    config = tiny_config(data={"eval": {"new": new, "base": base}}, train={"eval_first": True, "max_steps": 5})
    Trainer(config).fit()
    rows = [row for row in history(config) if "miou" in row]
    assert [row["step"] for row in rows] == [0, 5]
    assert all("base/miou" in row for row in rows)
    messages = [line for line in capsys.readouterr().out.splitlines() if "since the first" in line]
    assert len(messages) == 1, "the first evaluation is not compared with anything"
    words = [f"{'lost' if rows[1][key] < rows[0][key] else 'gained'}" for key in ("miou", "base/miou")]
    points = [f"{100 * abs(rows[1][key] - rows[0][key]):.1f}" for key in ("miou", "base/miou")]
    expected = f"{words[0]} {points[0]} mIoU on new, {words[1]} {points[1]} mIoU on base"
    assert messages[0].endswith(f"; since the first evaluation: {expected}")
    best = json.loads(Path(config.train.output, "best", "validation.json").read_text())
    assert best["set"] == "new"
    assert best["base/set"] == "base"


def test_named_datasets_are_saved_and_overridden(tiny_config: MakeConfig, tmp_path: Path) -> None:
    one = {"name": "shapes", "split": "val", "size": 3}
    config = tiny_config(data={"eval": {"new": one, "base": one | {"seed": 2}}})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    changed = load_config(tmp_path / "config.yaml", ["data.eval.base.size=9"])
    assert {name: source.size for name, source in changed.data.eval_datasets().items()} == {"new": 3, "base": 9}
    assert list(changed.data.eval_datasets()) == ["new", "base"]
    assert tiny_config().data.eval_datasets().keys() == {""}


@pytest.mark.parametrize(
    ("eval_config", "message"),
    [
        ({"a": {"name": "shapes", "sed": 1}}, r"data\.eval\.a\.sed: unknown key; did you mean `seed`"),
        ({"a": {"name": "shaps"}}, r"data\.eval\.a\.name: 'shaps' is unknown; did you mean `shapes`"),
        ({"a": {"name": "shapes", "size": "many"}}, r"data\.eval\.a\.size: Input should be a valid integer"),
        ({"a": {}}, r"data\.eval\.a\.name: missing; expected one of coco"),
        ({"split": "val"}, r"data\.eval\.name: missing; expected one of coco"),
        ({"a/b": {"name": "shapes"}}, r"data\.eval\.a/b.*should match"),
        ({}, r"data\.eval: .*at least 1 item"),
        (None, r"data\.eval: Input should be"),
        ("shapes", r"data\.eval: Input should be"),
    ],
)
def test_errors_in_named_datasets(eval_config: Any, message: str) -> None:
    values = {"model": {"name": "rec"}, "data": {"train": {"name": "shapes"}, "eval": eval_config}}
    with pytest.raises(ConfigError, match=message):
        parse_config(values)


def test_detections_need_a_detection_dataset_with_category_ids() -> None:
    with pytest.raises(ConfigError, match="no detection dataset"):
        evaluator(only=EXPRESSIONS).detections()
    with pytest.raises(ConfigError, match=r"shapes \(detection, seed 0\) has no category ids"):
        evaluator(only=DETECTION).detections()


@pytest.mark.skipif(not RACCOONS.exists(), reason="no shared/data beside the repository")
def test_evaluation_of_a_coco_file_end_to_end() -> None:
    source = {"name": "coco", "path": str(RACCOONS / "instances_val.json"), "image_root": str(RACCOONS / "images")}
    model = {"model": {"name": "rec"}, "data": {"train": source, "eval": source, "workers": 0}}
    coco = Evaluator(parse_config(model).data, Oracle(), Accelerator(cpu=True))
    metrics = coco.run(Oracle()).datasets[0].metrics
    assert (metrics["ap"], metrics["num_images"]) == (pytest.approx(1), len(coco.datasets[0].data))
    rows = coco.detections()[""]
    assert len(rows) == metrics["num_boxes"]
    truth = json.loads((RACCOONS / "instances_val.json").read_text())
    assert {row["image_id"] for row in rows} == {row["image_id"] for row in truth["annotations"]}
    assert sorted(row["bbox"][0] for row in rows) == pytest.approx(sorted(r["bbox"][0] for r in truth["annotations"]))


def test_tables() -> None:
    result = evaluator(objects=DETECTION, words=EXPRESSIONS).run(shifted_oracle())
    objects_result, words_result = result.datasets
    ap, miou = objects_result.metrics["ap"], words_result.metrics["miou"]
    beside, objects, words = (section.splitlines() for section in table(result).split("\n\n"))
    assert beside[0].split() == ["objects", "words"]
    assert beside[1].split() == ["ap", f"{ap:.4f}", "-"]
    assert ["miou", "-", f"{miou:.4f}"] in [line.split() for line in beside]
    assert objects[0].startswith("objects: shapes (detection, seed 0), val split (COCO average precision")
    assert objects[1].split() == ["ap", "ap50", "ap75", "boxes"]
    assert objects[2].split()[:2] == ["all", f"{ap:.4f}"]
    columns = [float(line.split()[-4]) for line in objects[3:] if ", " not in line]
    assert columns == sorted(columns, reverse=True), "the best category first"
    assert len(columns) == objects_result.metrics["num_categories"]
    assert f"ar@100 {objects_result.metrics['ar@100']:.4f}" in " ".join(objects)
    assert [line.split()[0] for line in words[2:]] == ["all", "attribute", "relation", "superlative"]
    assert table(EvaluationResult((objects_result,), "ap")) == "\n".join(objects)


def test_table_of_a_class_called_all() -> None:
    metrics, groups = {"ap": 0.25}, {"all": {"ap": 0.5}}
    dataset = DatasetResult("", Provenance("data", "val"), "protocol", metrics, groups)
    assert [line.split() for line in table(EvaluationResult((dataset,), "ap")).splitlines()[2:]] == [
        ["all", "0.2500"],
        ["all", "0.5000"],
    ]
