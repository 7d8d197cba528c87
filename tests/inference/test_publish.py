"""Models that are written with a card, uploaded, and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import vg
from tests.models.grounding_dino.published import TEXT, bert_tokenizer
from tests.models.grounding_dino.tiny import tiny_model
from vg.checkpoint import write_model
from vg.config import RunConfig
from vg.errors import CheckpointError
from vg.models.grounding_dino.checkpoints import write_checkpoint

IMAGE = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
RESULTS = {
    "step": 20,
    "data": "refcoco (unc)",
    "split": "val",
    "protocol": "highest-scored box",
    "miou": 0.51234,
    "ap_small": -1.0,  # undefined
    "n": 5,
}


@pytest.fixture
def run(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """The best checkpoint of a run of rec."""
    config = tiny_config()
    best = tmp_path / "run" / "best"
    best.mkdir(parents=True)
    write_model(best, config.model.build(), config)
    (best / "validation.json").write_text(json.dumps(RESULTS))
    return tmp_path / "run"


def test_damaged_results_are_named(run: Path) -> None:
    (run / "best" / "validation.json").write_text('{"a": ')
    with pytest.raises(OSError, match=r"Not JSON .*validation\.json"):
        vg.Grounder(run)


def test_a_run_is_saved_with_its_card(run: Path, tmp_path: Path) -> None:
    grounder = vg.Grounder.from_pretrained(run, device="cpu")
    grounder.save_pretrained(tmp_path / "saved")
    again = vg.Grounder.from_pretrained(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(again.predict(IMAGE, "red star").boxes, grounder.predict(IMAGE, "red star").boxes)
    assert again.results == RESULTS
    _, front, text = (tmp_path / "saved/README.md").read_text().split("---\n", maxsplit=2)
    assert yaml.safe_load(front)["tags"] == ["visual-grounding", "rec"]
    for line in (
        "- data: refcoco (unc)",
        "- split: val",
        "- protocol: highest-scored box",
        "| miou | 0.5123 |",
        "| ap_small | - |",
        "| n | 5 |",
    ):
        assert line in text
    assert "vg train config.yaml" in text
    assert "vg predict" in text


def test_only_a_model_is_replaced(run: Path, tmp_path: Path) -> None:
    grounder = vg.Grounder.from_pretrained(run, device="cpu")
    for _ in range(2):
        grounder.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"run contains best, which saving a model there would remove"):
        grounder.save_pretrained(run)
    assert (run / "best" / "model.safetensors").exists()
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"saved contains notes\.txt"):
        grounder.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "notes.txt").exists()


def test_a_model_of_another_library_is_saved(tmp_path: Path) -> None:
    model = tiny_model(points=4, logit_eps=(1e-5, 1e-5), text=TEXT)
    folder = tmp_path / "transformers"
    folder.mkdir()
    tokenizer = bert_tokenizer(tmp_path / "bert")
    write_checkpoint(model.own_state_dict(), model.config, tokenizer, folder, "transformers")
    grounder = vg.Grounder.from_pretrained(folder, device="cpu")
    grounder.save_pretrained(tmp_path / "saved")
    again = vg.Grounder.from_pretrained(tmp_path / "saved", device="cpu")
    found, expected = (x.predict(IMAGE, ["dog", "cat"]) for x in (again, grounder))
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    text = (tmp_path / "saved/README.md").read_text()
    assert "Not evaluated." in text
    assert "its training is not known" in text


def test_upload_and_download(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the network calls of the Hub client replaced."""
    hub = tmp_path / "hub"

    def upload(self: object, repo_id: str, folder_path: Path, commit_message: str) -> str:
        assert repo_id == "somebody/found"
        Path(folder_path).rename(hub)
        return "https://hub/somebody/found/commit/1"

    def download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repo_id, revision) == ("somebody/found", "v1")
        assert all(
            any(Path(file.name).match(x) for x in allow_patterns) for file in hub.rglob("*.*") if file.suffix != ".md"
        )
        return str(hub)

    def create(self: object, *arguments: object, **options: object) -> None:
        created.append((arguments, options))

    created: list[object] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("vg.hub._check_network", lambda: None)
    grounder = vg.Grounder(run, "cpu")
    assert grounder.push_to_hub("somebody/found", private=True) == "https://hub/somebody/found/commit/1"
    assert created == [(("somebody/found",), {"private": True, "exist_ok": True})]
    again = vg.Grounder.from_pretrained("somebody/found", revision="v1", device="cpu")
    np.testing.assert_array_equal(again.predict(IMAGE, "red star").boxes, grounder.predict(IMAGE, "red star").boxes)
    assert 'from_pretrained("somebody/found")' in (hub / "README.md").read_text()


def test_a_failed_upload_is_explained(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    with pytest.raises(
        CheckpointError, match=r"the upload to a/b failed: 401 Unauthorized; log in with `hf auth login`"
    ):
        vg.Grounder(run, "cpu").push_to_hub("a/b")
