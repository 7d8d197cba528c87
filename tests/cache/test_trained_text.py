"""A text encoder that is trained, with or without adapters, while the features of images come from a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from tests.cache.feature_data import cached_config
from tests.cache.test_resident import assert_resident_equals_loader, mixture, training_data
from tests.conftest import HEAD, history
from vg.cache.build import build_cache
from vg.config import RunConfig
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset
from vg.datasets import evaluation_dataset, training_dataset
from vg.errors import BadSampleError, CacheError
from vg.inference.grounder import Grounder
from vg.models.encoders import SMALL_VOCABULARY
from vg.models.settings import TINY_BERT
from vg.training.memory import MemoryEstimate
from vg.training.trainer import Trainer
from vg.types import EncodedBatch, Text

LORA = {"lora": {"targets": ["text"], "rank": 2, "train_also": ["head"]}}


def configured(folder: Path, cache: dict[str, Any] | None, frozen: bool = False, **sections: Any) -> RunConfig:
    """Return a run whose text encoder has no dropout."""
    if not (folder / "words").exists():
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.for_model(**TINY_BERT)).save_pretrained(folder / "words")
    text = {"id": str(folder / "words"), "tokenizer": str(SMALL_VOCABULARY), "frozen": frozen}
    model = {"text": text, "head": HEAD | {"dropout": 0.0}} | sections.pop("model", {})
    return cached_config(folder, cache, model=model, **sections)


def train(folder: Path, name: str) -> dict[str, Any]:
    return {"epochs": 2, "output": str(folder / name), "log_every": 1, "trackers": []}


def files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted((folder / "cache").rglob("*")) if file.is_file()}


def trained_cache(folder: Path) -> Path:
    (cache,) = (folder / "cache").glob("*train*")
    return cache


def test_batches_have_the_images_of_the_cache_and_the_tokens_of_the_collator(folder: Path) -> None:
    config = configured(folder, {})
    build_cache(config)
    model = config.model.build().eval()
    cached, pixels = training_dataset(config, model, []), GroundingDataset(config.data.train.build())
    stored = cached.collate([cached[index] for index in range(15)])  # type: ignore[misc]
    live = Collator(model.image_spec, model.text_spec)([pixels[index] for index in range(15)])
    assert isinstance(stored, EncodedBatch)
    text = stored.features.text
    assert isinstance(text, Text)
    for name in ("token_ids", "mask", "phrase_tokens"):
        assert getattr(text, name).equal(getattr(live.text, name)), name
    with torch.no_grad():
        output = model(stored)
        assert not model.vision.is_loaded  # type: ignore[union-attr]
        for one, other in zip(model(live), output, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("optim", [{}, LORA], ids=["all weights", "adapters"])
def test_training_from_the_cache_equals_that_on_images(folder: Path, optim: dict[str, Any]) -> None:
    if optim:
        pytest.importorskip("peft")
    losses = []
    for number, cache in enumerate((None, {"resident": False}, {"resident": True})):
        config = configured(folder, cache, optim={"lr": 1e-3} | optim, train=train(folder, f"run{number}"))
        if cache:
            build_cache(config)
        trainer = Trainer(config)
        before = {name: weights.clone() for name, weights in trainer.unwrapped_model.named_parameters()}
        trainer.fit()
        losses.append([row["loss"] for row in history(config) if "loss" in row])
        after = dict(trainer.unwrapped_model.named_parameters())
        changed = {name for name in before if not before[name].equal(after[name])}
        assert any(name.startswith("text.") and (not optim or ".lora_" in name) for name in changed)
        assert not any(name.startswith("text.") and ".lora_" not in name for name in changed if optim)
    assert losses[1] == losses[2]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-2)


@pytest.mark.parametrize("weights", [None, [1, 2, 0.4]])
def test_batches_in_memory_equal_those_of_the_loader(folder: Path, weights: list[float] | None) -> None:
    data = {"expressions_per_image": 3} | ({"train": mixture(folder, weights)} if weights else {})
    config = configured(folder, {"views": ["plain", "flip", "crop"]}, data=data)
    build_cache(config)
    assert_resident_equals_loader(config)


def test_the_cache_has_images_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(folder, {})
    build_cache(config)
    assert "text at most" not in capsys.readouterr().out
    cache = trained_cache(folder)
    assert not (cache / "texts").exists()
    assert "text" not in json.loads((cache / "key.json").read_text())
    before = files(folder)
    build_cache(config)
    assert files(folder) == before
    other = configured(folder, {}, model={"text": {"id": str(folder / "text"), "frozen": False}, "max_tokens": 8})
    assert len(training_dataset(other, other.model.build(), [])) == 15  # the tokenizer of another encoder is its own


@pytest.mark.parametrize("head", ["pooled", "dense"])
def test_a_cache_of_both_serves_without_reading_its_text(folder: Path, head: str) -> None:
    build_cache(configured(folder, {}, frozen=True))
    before = files(folder)
    config = configured(folder, {}, train=train(folder, "run"))
    build_cache(config)
    assert files(folder) == before
    for file in trained_cache(folder).glob("texts/*"):
        file.write_bytes(b"never read")
    Trainer(config).fit()
    frozen = configured(folder, {}, frozen=True)
    with pytest.raises(CacheError, match=r"texts/00000\.npy cannot be read"):
        training_dataset(frozen, frozen.model.build(), [])


def test_text_is_added_to_a_cache_of_images(folder: Path) -> None:
    build_cache(configured(folder, {}))
    before = files(folder)
    frozen = configured(folder, {}, frozen=True)
    with pytest.raises(CacheError, match=r"has no features of text, only of images; `vg cache CONFIG` adds them"):
        training_dataset(frozen, frozen.model.build(), [])
    build_cache(frozen)
    after = files(folder)
    assert {file for file in before if before[file] != after[file]} == {
        cache / name for cache in (folder / "cache").iterdir() for name in ("key.json", "index.npz")
    }
    assert {file.parent.name for file in after.keys() - before.keys()} == {"texts"}
    separate = configured(folder, {"folder": str(folder / "separate")}, frozen=True)
    build_cache(separate)
    one, other = (training_dataset(config, config.model.build(), []) for config in (frozen, separate))
    for index in range(15):
        assert np.array_equal(one[index].text, other[index].text)
    trained = configured(folder, {})
    build_cache(trained)
    assert files(folder).items() >= after.items()
    assert len(training_dataset(trained, trained.model.build(), [])) == 15


def test_another_frozen_encoder_has_a_cache_of_its_own(folder: Path) -> None:
    build_cache(configured(folder, {}, frozen=True))
    other = {"text": {"id": str(folder / "text"), "tokenizer": str(SMALL_VOCABULARY)}}
    build_cache(configured(folder, {}, model=other))
    assert len(list((folder / "cache").glob("*train*"))) == 2
    texts = {}
    for name, config in (("one", configured(folder, {}, frozen=True)), ("other", configured(folder, {}, model=other))):
        texts[name] = evaluation_dataset(config.data.eval, config.data, config.model.build())[0].text  # type: ignore[arg-type]
    assert not np.array_equal(texts["one"], texts["other"])


def test_repaired_images_keep_the_text(folder: Path) -> None:
    """The index is written without text; `vg cache` with the frozen encoder adds it without encoding again."""
    frozen, trained = configured(folder, {}, frozen=True), configured(folder, {})
    build_cache(frozen)
    cache = trained_cache(folder)
    before = files(folder)
    (cache / "images" / "00001.npy").write_bytes(b"damaged")
    build_cache(trained)
    assert {file for file, content in files(folder).items() if before[file] != content} == {cache / "index.npz"}
    build_cache(frozen)
    assert files(folder) == before


def test_too_long_an_expression_is_named(folder: Path) -> None:
    build_cache(configured(folder, {}))
    config = configured(folder, {"resident": False}, model={"max_tokens": 4})
    cached = training_dataset(config, config.model.build(), [])
    with pytest.raises(BadSampleError, match=r"the expression has \d+ tokens, the model takes 4 .raise model.max_tok"):
        cached.collate([cached[index] for index in range(15)])  # type: ignore[misc]
    with pytest.raises(BadSampleError, match=r"data \(train\): the expression has"):
        training_data(config, True)


def test_a_checkpoint_has_the_merged_text_encoder_and_predicts(folder: Path) -> None:
    pytest.importorskip("peft")
    config = configured(folder, {}, optim={"lr": 1e-2} | LORA, train=train(folder, "run"))
    build_cache(config)
    trainer = Trainer(config)
    trainer.fit()
    model = trainer.unwrapped_model.eval()
    checkpoint = trainer.folder.checkpoints()[-1]
    weights = load_file(checkpoint / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"text", "head"}
    assert not any("lora" in name for name in weights)
    initial = load_file(folder / "words" / "model.safetensors")
    query = "encoder.layer.0.attention.self.query.weight"
    assert not weights[f"text.network.{query}"].equal(initial[query])
    pixels = GroundingDataset(config.data.eval.build())  # type: ignore[union-attr]
    batch = Collator(model.image_spec, model.text_spec)([pixels[0]])
    phrase = batch.targets[0].phrases[0]
    found = Grounder(str(checkpoint)).predict(str(folder / "data" / "val0.png"), phrase, threshold=0.0)
    with torch.no_grad():
        expected = model.predict(model(batch), batch)[0]
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_of_a_step_on_cached_features(folder: Path, frozen: bool) -> None:
    """The cache need not exist; a text encoder that is trained keeps its activations."""
    sizes = {}
    for name, cache in (("cached", {}), ("pixels", None)):
        estimate = MemoryEstimate(configured(folder, cache, frozen=frozen))
        sizes[name] = estimate.step(64, estimate.sizes[-1]) - estimate.weights
    assert 0 < sizes["cached"] < sizes["pixels"]
