"""What judges which data, several sets in one evaluation, and what a run tells about gains and losses."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import BertTokenizer

import vg
from tests.conftest import history
from vg.boxes import to_pixels
from vg.config import DataConfig, RunConfig, dump_config, load_config, parse_config
from vg.data.mixture import MixtureConfig
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import ConfigError
from vg.evaluation.evaluator import Evaluator
from vg.evaluation.table import table
from vg.metrics import CocoMetric, RecMetric
from vg.models.base import GroundingModel
from vg.training.trainer import Trainer
from vg.types import Batch, Prediction, StretchedImage, TextSpec

MakeConfig = Callable[..., RunConfig]
EXPRESSIONS = ShapesConfig(split="val", size=6, image_size=64)
DETECTION = ShapesConfig(split="val", size=5, image_size=64, view="detection")
RACCOONS = Path(__file__).resolve().parents[3] / "shared" / "data" / "raccoon120"


class Nothing(NamedTuple):
    zero: Tensor


class Oracle(GroundingModel):
    """Answers what is in the target, a little off, with any number of phrases."""

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

    def forward(self, batch: Batch) -> Nothing:
        assert not self.training
        return Nothing(self.weight)

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


def evaluator(**sets: Any) -> Evaluator:
    config = DataConfig(train=EXPRESSIONS, eval=sets.get("only", sets), eval_batch_size=4, workers=0)
    return Evaluator(config, Oracle(), Accelerator(cpu=True))


def test_the_data_decides_what_judges() -> None:
    both = evaluator(words=EXPRESSIONS, things=DETECTION)
    assert [type(each.metric) for each in both.sets] == [RecMetric, CocoMetric]
    assert both.resolve_best_metric(None) == "miou"
    assert evaluator(only=DETECTION).resolve_best_metric(None) == "ap"


def test_a_mixture_is_judged_if_its_parts_ask_for_the_same() -> None:
    assert len(evaluator(only=MixtureConfig(datasets=[DETECTION, DETECTION])).sets[0].data) == 10
    with pytest.raises(ConfigError, match=r"data\.eval\.both: a mixture of detection and expressions"):
        evaluator(both=MixtureConfig(datasets=[DETECTION, EXPRESSIONS]))


def test_results_of_one_set() -> None:
    model = Oracle().train()
    results = evaluator(only=DETECTION).run(model)
    assert model.training
    assert (results["ap"], results["num_images"]) == (pytest.approx(1), 5)
    assert (results["data"], results["split"]) == ("shapes (detection, seed 0)", "val")
    assert results["protocol"].startswith("COCO")
    assert "set" not in results


def test_results_of_several_sets() -> None:
    model = Oracle()
    model.shift = 1.0
    results = evaluator(things=DETECTION, words=EXPRESSIONS).run(model)
    assert {name: value for name, value in results.items() if name.startswith("words/")} == {
        f"words/{name}": value for name, value in evaluator(only=EXPRESSIONS).run(model).items()
    } | {"words/set": "words"}
    alone = evaluator(only=DETECTION).run(model)
    assert {name: results[name] for name in alone} == alone
    assert 0 < results["ap"] < 1
    json.dumps(results)


def test_a_set_called_like_a_category_is_an_error() -> None:
    named = next(key for key in evaluator(only=DETECTION).run(Oracle()) if key.endswith("/ap")).removesuffix("/ap")
    with pytest.raises(ConfigError, match=rf"data\.eval\.{named}: .*rename the set"):
        evaluator(things=DETECTION, **{named: DETECTION}).run(Oracle())


def test_the_deciding_number_is_checked_at_the_start(tiny_config: MakeConfig) -> None:
    both = evaluator(words=EXPRESSIONS, things=DETECTION)
    for name in ("acc@0.75", "recall@5", "things/ap", "relation/miou", "auc"):
        assert both.resolve_best_metric(name) == name
    for name in ("ap", "iou", "things/app", "num_expressions"):
        with pytest.raises(ConfigError, match=rf"train\.best_metric: '{name}' is none of miou, acc@0\.5"):
            both.resolve_best_metric(name)
    with pytest.raises(ConfigError, match=r"train\.best_metric: 'ap'"):
        Trainer(tiny_config(train={"best_metric": "ap"}))
    trainer = Trainer(tiny_config(train={"best_metric": "nothing/miou"}))
    with pytest.raises(ConfigError, match=r"train\.best_metric: 'nothing/miou' is none of .*relation/miou"):
        trainer.fit()


def test_gains_and_losses() -> None:
    both = evaluator(raccoon=DETECTION, base=EXPRESSIONS)
    rows = [
        {"step": 0, "loss": 1.0},
        {"step": 0, "ap": 0.101, "base/miou": 0.5},
        {"step": 5, "ap": 0.9, "base/miou": 0},
    ]
    assert both.change(rows, {"ap": 0.513, "base/miou": 0.487}) == "gained 41.2 AP on raccoon, lost 1.3 mIoU on base"
    assert both.change(rows[:1], {"ap": 0.5, "base/miou": 0.4}) == ""
    alone = evaluator(only=EXPRESSIONS)
    assert alone.change([{"miou": 0.25}], {"miou": 0.25}) == "gained 0.0 mIoU on shapes (expression, seed 0)"


def test_a_run_that_evaluates_first(tiny_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    new, base = ({"name": "shapes", "split": "val", "image_size": 64, "size": 3, "seed": seed} for seed in (1, 2))
    config = tiny_config(data={"eval": {"new": new, "base": base}}, train={"eval_first": True, "max_steps": 5})
    with caplog.at_level(logging.INFO, "vg.training.trainer"):
        Trainer(config).fit()
    rows = [row for row in history(config) if "miou" in row]
    assert [row["step"] for row in rows] == [0, 5]
    assert all("base/miou" in row for row in rows)
    said = [record.getMessage() for record in caplog.records if "since the first" in record.getMessage()]
    assert len(said) == 1, "the first one has nothing to be compared with"
    words = [f"{'lost' if rows[1][key] < rows[0][key] else 'gained'}" for key in ("miou", "base/miou")]
    points = [f"{100 * abs(rows[1][key] - rows[0][key]):.1f}" for key in ("miou", "base/miou")]
    expected = f"{words[0]} {points[0]} mIoU on new, {words[1]} {points[1]} mIoU on base"
    assert said == [f"since the first evaluation: {expected}"]
    best = json.loads(Path(config.train.output, "best", "validation.json").read_text())
    assert best["set"] == "new"
    assert best["base/set"] == "base"


def test_the_mapping_survives_a_file_and_overrides(tiny_config: MakeConfig, tmp_path: Path) -> None:
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
        ({"a": {}}, r"data\.eval\.a\.name: is missing"),
        ({"split": "val"}, r"data\.eval\.name: is missing"),
        ({"a/b": {"name": "shapes"}}, r"data\.eval\.a/b.*should match"),
        ({}, r"data\.eval: .*at least 1 item"),
        (None, r"data\.eval: Input should be"),
        ("shapes", r"data\.eval: Input should be"),
    ],
)
def test_mistakes_in_the_mapping(eval_config: Any, message: str) -> None:
    values = {"model": {"name": "rec"}, "data": {"train": {"name": "shapes"}, "eval": eval_config}}
    with pytest.raises(ConfigError, match=message):
        parse_config(values)


def test_found_boxes_as_rows_of_coco() -> None:
    with pytest.raises(ConfigError, match="no detection set"):
        evaluator(only=EXPRESSIONS).detections()
    with pytest.raises(ConfigError, match=r"shapes \(detection, seed 0\) has no numbers of its classes"):
        evaluator(only=DETECTION).detections()


@pytest.mark.skipif(not RACCOONS.exists(), reason="no shared/data beside the repository")
def test_a_coco_file_from_end_to_end() -> None:
    source = {"name": "coco", "path": str(RACCOONS / "instances_val.json"), "image_root": str(RACCOONS / "images")}
    model = {"model": {"name": "rec"}, "data": {"train": source, "eval": source, "workers": 0}}
    judge = Evaluator(parse_config(model).data, Oracle(), Accelerator(cpu=True))
    results = judge.run(Oracle())
    assert (results["ap"], results["num_images"]) == (pytest.approx(1), len(judge.sets[0].data))
    rows = judge.detections()[""]
    assert len(rows) == results["num_boxes"]
    truth = json.loads((RACCOONS / "instances_val.json").read_text())
    assert {row["image_id"] for row in rows} == {row["image_id"] for row in truth["annotations"]}
    assert sorted(row["bbox"][0] for row in rows) == pytest.approx(sorted(r["bbox"][0] for r in truth["annotations"]))


def test_tables() -> None:
    model = Oracle()
    model.shift = 1.0
    results = evaluator(things=DETECTION, words=EXPRESSIONS).run(model)
    shown = table({"checkpoint": "runs/x", **results}).split("\n\n")
    beside, things, words = (part.splitlines() for part in shown)
    assert beside[0].split() == ["things", "words"]
    assert beside[1].split() == ["ap", f"{results['ap']:.4f}", "-"]
    assert ["miou", "-", f"{results['words/miou']:.4f}"] in [line.split() for line in beside]
    assert things[0].startswith("things: shapes (detection, seed 0), val (COCO average precision")
    assert things[1].split() == ["ap", "ap50", "ap75", "boxes"]
    assert things[2].split()[:2] == ["all", f"{results['ap']:.4f}"]
    columns = [float(line.split()[-4]) for line in things[3:] if ", " not in line]
    assert columns == sorted(columns, reverse=True), "the best category first"
    assert len(columns) == results["num_categories"]
    assert f"ar@100 {results['ar@100']:.4f}" in " ".join(things)
    assert [line.split()[0] for line in words[2:]] == ["all", "attribute", "relation", "superlative"]
    assert table({name: value for name, value in results.items() if not name.startswith("words/")}) == "\n".join(things)
