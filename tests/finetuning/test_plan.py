"""From a folder to a plan: formats, splits, classes, models, and what cannot be planned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.models.grounding_dino.published import TEXT, bert_tokenizer
from vg.checkpoint import write_model
from vg.cli import main
from vg.config import ModelOnlyConfig, SavedConfig, load_config, parse_config
from vg.data import CocoConfig, CsvConfig, OdvgConfig, VocConfig, YoloConfig
from vg.data.subset import SplitConfig
from vg.errors import ConfigError, DataError
from vg.finetuning import sizes
from vg.finetuning.plan import FinetuneSettings, Plan, make_plan, refuse_other_run
from vg.models.grounding_dino.checkpoints import write_checkpoint
from vg.models.grounding_dino.config import GroundingDinoConfig
from vg.models.rec.config import RecConfig

FORMATS: dict[str, Any] = {
    "coco": CocoConfig,
    "voc": VocConfig,
    "yolo": YoloConfig,
    "odvg": OdvgConfig,
    "csv": CsvConfig,
}


def planned(folder: str | Path, model: str | Path | None = None, **options: Any) -> Plan:
    return make_plan(FinetuneSettings(folder, model, **options))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_split_and_planned(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / name
    folder.mkdir()
    FORMATS[name].miniature(folder)
    plan = planned(folder, "small")
    train, val = plan.config.data.train, plan.config.data.eval
    assert isinstance(train, SplitConfig)
    assert isinstance(val, SplitConfig)
    assert (train.dataset.name, train.part, val.part) == (name, "train", "val")
    images = [set(part.build().image_keys()) for part in (train, val)]
    assert all(images)
    assert sum(map(len, images)) == len(images[0] | images[1]) == 4
    assert "no validation split: about 20% of the images are set aside" in plan.to_yaml()
    assert plan.config.train.output == str(Path("runs", name))
    assert plan.config.train.eval_first


def test_the_dry_run_is_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed is accepted by vg train, and equals the plan."""
    CocoConfig.miniature(tmp_path)
    main(["finetune", str(tmp_path), "--model", "small", "--dry-run", "train.max_steps=7", "optim.lr=3e-4"])
    printed = capsys.readouterr().out
    (tmp_path / "plan.yaml").write_text(printed)
    config = load_config(tmp_path / "plan.yaml")
    expected = planned(tmp_path / "instances_val.json", "small", overrides=["train.max_steps=7", "optim.lr=3e-4"])
    assert config.data == parse_config(yaml.safe_load(printed)).data
    assert (config.train.max_steps, config.optim.lr) == (7, 3e-4)
    assert config.model == expected.config.model
    assert config.optim == expected.config.optim
    assert not Path("runs", tmp_path.name).exists()


def test_splits_of_the_folder_are_used(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / split).mkdir()
        CocoConfig.miniature(tmp_path / split)
        (tmp_path / split / "instances_val.json").rename(tmp_path / split / "_annotations.coco.json")
    plan = planned(tmp_path, "small")
    train, val = plan.config.data.train, plan.config.data.eval
    assert isinstance(train, CocoConfig)
    assert isinstance(val, CocoConfig)
    assert (Path(train.path).parent.name, Path(val.path).parent.name) == ("train", "valid")
    assert any("not used: the splits test" in note for note in plan.notes)


def classes(folder: Path) -> list[str]:
    return [row["name"] for row in json.loads((folder / "instances_val.json").read_text())["categories"]]


def test_phrases_select_and_rename_classes(tmp_path: Path) -> None:
    CocoConfig.miniature(tmp_path)
    first, second, *rest = classes(tmp_path)
    plan = planned(tmp_path, "small", phrases=[first.upper(), f"{second}=the other one"])
    source = plan.config.data.train.build()
    assert set(source.load(0, 0).phrases) == {first.upper(), "the other one"}
    assert any(note == f"classes left out, with their boxes: {', '.join(rest)}" for note in plan.notes)
    for renamed in ({second: "the other one"}, [f"{second}=the other one"]):
        plan = planned(tmp_path, "small", phrases=renamed)
        phrases = plan.config.data.train.build().load(0, 0).phrases
        assert phrases == (first, "the other one", *rest), "only renamed"
        assert "all classes are used" in plan.notes
    with pytest.raises(ConfigError, match=f"--phrases: 'zebra' is not one of {first}"):
        planned(tmp_path, "small", phrases=["zebra"])
    (tmp_path / "csv").mkdir()
    CsvConfig.miniature(tmp_path / "csv")
    with pytest.raises(ConfigError, match="its phrases are free text"):
        planned(tmp_path / "csv", "small", phrases=["zebra"])


def test_classes_without_any_box_are_named(tmp_path: Path) -> None:
    """Exports of Roboflow have such a class, with the name of the dataset."""
    CocoConfig.miniature(tmp_path)
    names = classes(tmp_path)
    file = tmp_path / "instances_val.json"
    document = json.loads(file.read_text())
    document["categories"].insert(0, {"id": -1, "name": "my objects", "supercategory": "none"})
    file.write_text(json.dumps(document))
    (note,) = [note for note in planned(tmp_path, "small").notes if "without any box" in note]
    assert note == (
        "classes without any box: my objects; --phrases with the names of the other classes leaves them out"
    )
    plan = planned(tmp_path, "small", phrases=names)
    assert "classes left out, with their boxes: my objects" in plan.notes
    assert not any("without any box" in note for note in plan.notes)


def saved(folder: Path, config: SavedConfig) -> Path:
    folder.mkdir()
    write_model(folder, config.model.build(), config)
    return folder


def test_models(tmp_path: Path, tiny_config: Callable[..., Any]) -> None:
    """Published weights, other formats, runs of both families: settings come from the recipes or from the run."""
    expressions, detection = tmp_path / "expressions", tmp_path / "detection"
    for folder, member in ((expressions, CsvConfig), (detection, CocoConfig)):
        folder.mkdir()
        member.miniature(folder)
    own = load_config("configs/grounding_dino/finetune_own.yaml")
    config = planned(detection).config
    assert config.model.weights == "IDEA-Research/grounding-dino-tiny"
    assert (config.optim.lr, config.optim.freeze) == (own.optim.lr, own.optim.freeze)
    assert config.data.batch_size * config.train.accumulate == 16
    config = planned(expressions).config
    assert isinstance(config.model, GroundingDinoConfig)
    assert (config.optim.lr, config.model.predict.score, config.train.best_metric) == (2e-4, "max", "acc@0.5")
    assert config.data.batch_size * config.train.accumulate == 32
    config = planned(detection, lora=True).config
    assert config.optim.lora
    tiny = replace(GroundingDinoConfig.tiny(), text=TEXT)
    network = tiny.build()
    tokenizer = bert_tokenizer(tmp_path / "bert")
    (tmp_path / "transformers").mkdir()
    write_checkpoint(network.own_state_dict(), tiny, tokenizer, tmp_path / "transformers", "transformers")
    for model in (tmp_path / "transformers", saved(tmp_path / "vg", ModelOnlyConfig(tiny))):
        config = planned(detection, model).config
        assert config.model.weights == str(model)
        assert config.optim.lr == own.optim.lr
        assert config.model.build().num_parameters() > 0
    rec = saved(tmp_path / "rec", tiny_config(optim={"lr": 0.123}))
    config = planned(expressions, rec).config
    assert isinstance(config.model, RecConfig)
    assert (config.model.weights, config.optim.lr) == (str(rec), 0.123)
    (rec / "best").mkdir()
    assert planned(expressions, rec).config.optim.lr == 0.123, "a folder without weights is not the best checkpoint"
    with pytest.raises(ConfigError, match="is a rec model, which finds one box for one expression"):
        planned(detection, rec)
    with pytest.raises(ConfigError, match="leave out --lora"):
        planned(detection, "small", lora=True)


def test_errors_name_the_problem(tmp_path: Path) -> None:
    empty, mixed, data = tmp_path / "empty", tmp_path / "mixed", tmp_path / "data"
    for folder in (empty, mixed, data):
        folder.mkdir()
    with pytest.raises(DataError, match=r"neither data\.yaml.*no \.json, \.jsonl or \.csv file"):
        planned(empty, "small")
    odd = tmp_path / "odd name"
    odd.mkdir()
    (odd / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"vg check '.*/odd name' also draws images"):
        planned(odd, "small")
    CocoConfig.miniature(mixed)
    CsvConfig.miniature(mixed)
    with pytest.raises(DataError, match=r"several formats, instances_val\.json \(COCO\) and mini\.csv \(expressions\)"):
        planned(mixed, "small")
    VocConfig.miniature(mixed)
    with pytest.raises(DataError, match=r"xml files \(Pascal VOC\) and instances_val\.json"):
        planned(mixed, "small")
    config = CsvConfig.miniature(data)
    text = Path(config.path).read_text()
    Path(config.path).write_text(text.replace("right", "xmax"))
    with pytest.raises(DataError, match="no column for the box"):
        planned(data, "small")
    Path(config.path).write_text(text + "1.png,the blue one,10,10,500,20\n")
    with pytest.raises(DataError, match=r"(?s)has errors; correct.*boxes that extend beyond their image \(1"):
        planned(data, "small")
    with pytest.raises(DataError, match="is the configuration of a run, not data"):
        planned("configs/demo_rec.yaml")


def test_a_table_of_classes_is_a_detection_dataset(tmp_path: Path) -> None:
    path = Path(CsvConfig.miniature(tmp_path).path)
    path.write_text(path.read_text().replace("phrase,left,top,right,bottom", "class,xmin,ymin,xmax,ymax"))
    plan = planned(tmp_path, "small", phrases=["green star"])
    assert plan.config.data.train.build().provenance.task == "detection"
    assert plan.config.model == planned(detection(tmp_path), "small").config.model
    assert plan.config.data.train.build().load(0, 0).phrases == ("green star",)


def detection(folder: Path) -> Path:
    (folder / "coco").mkdir()
    return Path(CocoConfig.miniature(folder / "coco").path)


def test_the_run_is_named_after_the_folder(tmp_path: Path) -> None:
    (tmp_path / "pets.v1").mkdir()
    assert FinetuneSettings(tmp_path / "pets.v1").run_folder == Path("runs", "pets.v1")
    assert FinetuneSettings(tmp_path / "pets" / "data.yaml").run_folder == Path("runs", "pets")
    assert FinetuneSettings(tmp_path / "pets.v1.json").run_folder == Path("runs", "pets.v1")


def test_a_cpu_gets_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = detection(tmp_path)
    monkeypatch.setattr(sizes, "available_memory", lambda: ("cpu", 10**11))
    assert any("WARNING: no GPU" in note and "--model small" in note for note in planned(data).notes)
    assert not any("WARNING" in note for note in planned(data, "small").notes)


def test_images_in_another_folder(tmp_path: Path) -> None:
    CsvConfig.miniature(tmp_path)
    (tmp_path / "photos").mkdir()
    for image in tmp_path.glob("*.png"):
        shutil.move(image, tmp_path / "photos" / image.name)
    (tmp_path / "elsewhere").mkdir()
    table = shutil.move(tmp_path / "mini.csv", tmp_path / "elsewhere" / "mini.csv")
    with pytest.raises(DataError, match="missing images"):
        planned(table, "small")
    assert planned(table, "small", images=tmp_path / "photos").config.train.output == str(Path("runs", "mini"))
    (tmp_path / "voc").mkdir()
    VocConfig.miniature(tmp_path / "voc")
    with pytest.raises(ConfigError, match="names its images"):
        planned(tmp_path / "voc", "small", images=tmp_path)


HUB_FOLDER = "/cache/hub/models--someone--pets/snapshots/0a1b"


@pytest.mark.parametrize(
    ("weights", "same", "other"),
    [
        ("runs/demo", ["runs/demo", "runs/demo/", "./runs/demo", "{here}/runs/demo", "link"], ["runs/demo2", "small"]),
        ("{here}/runs/demo", ["runs/demo"], ["runs"]),
        ("someone/pets", ["someone/pets", HUB_FOLDER], ["someone/cars", HUB_FOLDER.replace("pets", "cars")]),
        (HUB_FOLDER, ["someone/pets", HUB_FOLDER], ["someone/cars", "runs/demo"]),
        (None, ["small"], ["./small", "someone/pets"]),
    ],
)
def test_a_run_continues_with_its_model_in_other_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str | None, same: list[str], other: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "small").mkdir()
    (tmp_path / "link").symlink_to("runs/demo")
    (tmp_path / "data").mkdir()
    CocoConfig.miniature(tmp_path / "data")
    config = planned("data", "small").config
    model = replace(config.model, weights=weights and weights.format(here=tmp_path))
    config = replace(config, model=model)
    for name in same:
        refuse_other_run(config, FinetuneSettings("data", name.format(here=tmp_path)))
    for name in other:
        with pytest.raises(ConfigError, match=f"--model: .* in the run, {name} given"):
            refuse_other_run(config, FinetuneSettings("data", name))
