"""Two text encoders and a cache: the features of both, or their tokens if one of them is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.cache.feature_data import cached_config
from tests.cache.test_resident import assert_resident_equals_loader, batch_without_values, mixture
from tests.cache.test_trained_text import configured, files, train, trained_cache
from tests.conftest import HEAD, history
from tests.models.rec.test_two_texts import write_tower
from vg.cache.build import build_cache
from vg.config import RunConfig
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset
from vg.datasets import training_dataset
from vg.errors import CacheError, ConfigError
from vg.inference.grounder import Grounder
from vg.models.rec.model import RecModel
from vg.training.trainer import Trainer
from vg.types import EncodedBatch

POOLED = {"name": "pooled", "width": 32, "layers": 1, "heads": 2, "feedforward": 64, "dropout": 0.0}
LORA = {"lora": {"targets": ["extra_text"], "rank": 2, "train_also": ["head"]}}


def with_two(
    folder: Path,
    cache: dict[str, Any] | None,
    tower: str = "clip",
    trained: str = "",
    head: Any = None,
    **sections: Any,
) -> RunConfig:
    """Return a run with a second text encoder; `trained` is "text", "extra_text" or neither."""
    if not (folder / tower).exists():
        write_tower(folder / tower, tower)
    extra = {"id": str(folder / tower), "frozen": trained != "extra_text"}
    model = {"extra_text": extra, "max_tokens": 24, "head": head or HEAD | {"dropout": 0.0}}
    return configured(folder, cache, frozen=trained != "text", model=model, **sections)


@pytest.mark.parametrize("head", [None, POOLED], ids=["dense", "pooled"])
@pytest.mark.parametrize("trained", ["", "text", "extra_text"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_cached_batches_equal_live_ones(folder: Path, tower: str, trained: str, head: Any) -> None:
    config = with_two(folder, {}, tower, trained, head)
    build_cache(config)
    model = config.model.build().eval()
    assert isinstance(model, RecModel)
    cached, pixels = training_dataset(config, model, []), GroundingDataset(config.data.train.build())
    stored = cached.collate([cached[index] for index in range(15)])  # type: ignore[misc]
    live = Collator(model.image_spec, model.text_spec)([pixels[index] for index in range(15)])
    assert isinstance(stored, EncodedBatch)
    with torch.no_grad():
        output = model(stored)
        assert model.extra_text is not None
        assert model.vision.is_loaded is False
        assert model.text.is_loaded == model.extra_text.is_loaded == bool(trained)
        for one, other in zip(model(live), output, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("trained", ["", "extra_text"])
def test_training_from_the_cache_equals_that_on_images(folder: Path, trained: str) -> None:
    if trained:
        pytest.importorskip("peft")
    losses = []
    for number, cache in enumerate((None, {"resident": False}, {"resident": True})):
        optim = {"lr": 1e-3} | (LORA if trained else {})
        config = with_two(folder, cache, "clip", trained, optim=optim, train=train(folder, f"run{number}"))
        if cache:
            build_cache(config)
        trainer = Trainer(config)
        trainer.fit()
        losses.append([row["loss"] for row in history(config) if "loss" in row])
    assert losses[1] == losses[2]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-2)
    names = {name for name, weights in trainer.unwrapped_model.named_parameters() if weights.requires_grad}
    assert {name.split(".")[0] for name in names} == {"head", *([trained] if trained else [])}
    grounder = Grounder(str(trainer.folder.checkpoints()[-1]))
    assert len(grounder.predict(str(folder / "data" / "val0.png"), "the red star", threshold=0.0).boxes)


@pytest.mark.parametrize("weights", [None, [1, 2, 0.4]])
@pytest.mark.parametrize("trained", ["", "text"])
def test_batches_in_memory_equal_those_of_the_loader(folder: Path, trained: str, weights: list[float] | None) -> None:
    data = {"expressions_per_image": 3} | ({"train": mixture(folder, weights)} if weights else {})
    config = with_two(folder, {"views": ["plain", "flip", "crop"]}, trained=trained, data=data)
    build_cache(config)
    assert_resident_equals_loader(config)


def test_a_batch_of_tokens_is_made_without_waiting_for_the_device(folder: Path) -> None:
    config = with_two(folder, {}, trained="text")
    build_cache(config)
    assert len(batch_without_values(config).tensors()) == 3 + 2 * 4 + 2 * 6


def test_the_key_has_both_encoders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_two(folder, {})
    build_cache(config)
    cache = trained_cache(folder)
    text = json.loads((cache / "key.json").read_text())["text"]
    assert text.keys() == {"id", "revision", "weights", "tokenizer", "extra"}
    assert text["extra"].keys() == {"id", "revision", "weights", "tokenizer"}
    size = sum(np.load(file).nbytes for file in (cache / "texts").glob("*.npy"))
    announced = re.search(r"text at most about ([\d.]+) MB", capsys.readouterr().out)
    assert announced
    assert size / 1e6 <= float(announced[1]) + 0.005
    before = files(folder)
    (folder / "clip").rename(folder / "moved")
    config.model.extra_text.id = str(folder / "moved")  # type: ignore[union-attr]
    build_cache(config)
    assert files(folder) == before, "found by its weights"
    single = configured(folder, {}, frozen=True)
    with pytest.raises(CacheError, match=r"text\.extra is None, the cache has"):
        training_dataset(single, single.model.build(), [])
    torch.manual_seed(3)
    AutoModel.from_config(AutoConfig.from_pretrained(folder / "moved")).save_pretrained(folder / "moved")
    with pytest.raises(CacheError, match=r"the text\.extra\.weights changed since the cache was written"):
        training_dataset(config, config.model.build(), [])


def test_random_weights_of_the_second_encoder_cannot_be_cached(folder: Path) -> None:
    architecture = {"model_type": "bert", "vocab_size": 400, "hidden_size": 32, "num_attention_heads": 2}
    architecture |= {"num_hidden_layers": 1, "intermediate_size": 64}
    text = {"id": str(folder / "text"), "tokenizer": str(folder / "text")}
    config = cached_config(folder, {}, model={"text": text, "extra_text": {"architecture": architecture}})
    with pytest.raises(ConfigError, match=r"model\.extra_text has no id: its random weights differ"):
        build_cache(config)
