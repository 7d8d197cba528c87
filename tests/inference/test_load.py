"""Every command opens the same models in the same way."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vg
from tests.models.grounding_dino.published import TEXT, bert_tokenizer
from tests.models.grounding_dino.tiny import tiny_model
from vg.checkpoint import write_model
from vg.cli import main
from vg.config import ModelOnlyConfig, RunConfig, dump_config, parse_config
from vg.errors import CheckpointError, ConfigError
from vg.inference.load import open_model
from vg.models.grounding_dino.checkpoints import write_checkpoint

SCENES = "{name: shapes, view: detection, image_size: 64, size: 2}"
DATA = [f"data.train={SCENES}", f"data.eval={SCENES}", "data.workers=0"]
SMALL = ["model.image.shortest=64", "model.image.longest=96"]
COMMANDS = {  # verb -> arguments with paths in the folder of the test
    "eval": ["MODEL", *SMALL, *DATA, "--output", "FOLDER/out"],
    "interpolate": ["MODEL", "MODEL", *SMALL, *DATA, "--output", "FOLDER/out", "--weights", "0.5"],
    "export": ["MODEL", "FOLDER/out.pt2", *SMALL],
    "label": ["MODEL", "FOLDER/photos", "FOLDER/out", *SMALL, "-p", "cat"],
    "predict": ["MODEL", "FOLDER/photos/a.png", "cat", *SMALL, "--output", "FOLDER/out.png"],
    "web": ["MODEL", *SMALL],
    "convert": ["MODEL", "FOLDER/out", "--to", "vg"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in several formats, and the folder of its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    paths = {name: folder / name for name in ("vg", "official.pth", "transformers", "weights.yaml", "bert")}
    model = tiny_model(points=4, text=TEXT)
    model.use_tokenizer(bert_tokenizer(paths["bert"]))
    for name in ("vg", "transformers"):
        paths[name].mkdir()
    write_model(paths["vg"], model, ModelOnlyConfig(model.config))
    write_checkpoint(model.own_state_dict(), model.config, None, paths["official.pth"], "official")
    write_checkpoint(
        model.own_state_dict(), model.config, model.text_spec.tokenizer, paths["transformers"], "transformers"
    )
    scenes: Any = {"name": "shapes", "size": 2}
    config = parse_config({"model": {"name": "grounding_dino"}, "data": {"train": scenes, "eval": scenes}})
    config.model = replace(model.config, weights=str(paths["vg"]))
    paths["weights.yaml"].write_text(dump_config(config))
    return paths


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        (verb, name)
        for verb in COMMANDS
        for name in ("vg", "official.pth", "transformers", "weights.yaml", "some/dino")
        if (verb, name) != ("convert", "weights.yaml")  # which has no format
    ],
)
def test_every_command_opens_every_model(
    verb: str, name: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    if verb == "export":
        monkeypatch.setattr("vg.export.program.save_program", lambda model, *_: opened.append(model) or 0.0)
    if verb == "web":
        pytest.importorskip("gradio")
        monkeypatch.setattr("vg.web.page.serve", lambda grounder, *_: opened.append(grounder.model))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda id, **_: str(models["vg"]))
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    model = str(models.get(name, name))
    tokenizer = ["--tokenizer", str(models["bert"])] if name == "official.pth" else []
    words = [word.replace("MODEL", model).replace("FOLDER", str(tmp_path)) for word in COMMANDS[verb]]
    main([verb, *words, *tokenizer])
    assert opened or list(tmp_path.glob("out*"))


def test_the_configuration_of_a_published_model(models: dict[str, Path]) -> None:
    loaded = open_model(models["transformers"], overrides=["model.predict.score=max"])
    assert isinstance(loaded.config, ModelOnlyConfig)
    assert loaded.config.model is loaded.model.config
    assert loaded.model.config.predict.score == "max"  # type: ignore[union-attr]
    assert loaded.results is None
    assert not loaded.model.training
    with_data = open_model(models["transformers"], overrides=DATA)
    assert isinstance(with_data.config, RunConfig)
    assert isinstance(with_data.training, ModelOnlyConfig), "it was not trained on these data"


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("model.x=1", ConfigError, r"transformers:\s+model\.x: unknown key"),
        ("model={name: rec}", ConfigError, r"transformers is a grounding_dino, so model\.name=rec cannot be set"),
        ("model.num_queries=4", CheckpointError, r"(?s)transformers: .*queries"),
        ("data.eval.name=shapes", ConfigError, r"data\.train: Field required"),
    ],
)
def test_overrides_that_do_not_fit_a_published_model(
    override: str, error: type[Exception], message: str, models: dict[str, Path]
) -> None:
    with pytest.raises(error, match=message):
        vg.load_model(models["transformers"], overrides=[override])


@pytest.mark.parametrize("verb", ["eval", "interpolate"])
@pytest.mark.parametrize("name", ["vg", "transformers"])
def test_a_model_without_data(verb: str, name: str, models: dict[str, Path], tmp_path: Path) -> None:
    words = [str(models[name])] if verb == "eval" else [str(models[name])] * 2
    with pytest.raises(SystemExit, match=rf"{name} is a model without a data config; add data\.train\.name="):
        main([verb, *words, "--output", str(tmp_path / "out")])


def test_a_yaml_file_is_a_model_if_it_names_weights(models: dict[str, Path]) -> None:
    for options, message in (({"tokenizer": "bert"}, "tokenizer 'bert'"), ({"revision": "main"}, "revision 'main'")):
        with pytest.raises(ConfigError, match=rf"weights\.yaml is a YAML file, .* takes no {message}; leave it out"):
            vg.load_model(models["weights.yaml"], **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"weights\.yaml: model\.weights is not set; .* give the folder of the run"):
        vg.load_model(models["weights.yaml"], overrides=["model.weights=null"])
    with pytest.raises(CheckpointError, match=r"config\.yaml has only the configuration .*; give its folder, .*/vg"):
        vg.load_model(models["vg"] / "config.yaml")


def test_results_are_those_of_the_weights(models: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(models["vg"], run)
    (run / "best").mkdir()
    for folder, value in ((run, 0.25), (run / "best", 0.75)):
        (folder / "validation.json").write_text(json.dumps({"ap": value}))
    assert open_model(run).results == {"ap": 0.25}
    for name in ("model.safetensors", "config.yaml", "tokenizer"):
        shutil.move(run / name, run / "best" / name)
    assert open_model(run).results == {"ap": 0.75}
    (run / "best" / "validation.json").unlink()
    assert open_model(run).results is None


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; .* contains run"):
        vg.load_model(tmp_path / "nowhere")
