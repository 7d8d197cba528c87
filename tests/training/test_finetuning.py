"""Frozen modules, and adapters whose checkpoints load like any other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import NO_DROPOUT, scripted
from tests.models.grounding_dino.tiny import tiny_config as tiny_grounding_dino
from tests.training.test_resume import assert_same_runs, interrupt, stop_in_step
from vg.checkpoint import read_model
from vg.config import RunConfig, load_config
from vg.errors import CheckpointError, ConfigError
from vg.models.grounding_dino.config import DenoisingConfig
from vg.training.lora import LoraConfig, merged_weights
from vg.training.trainer import Trainer
from vg.types import Batch

MakeConfig = Callable[..., RunConfig]

pytest.importorskip("peft")


def configured(make: MakeConfig, family: str = "rec", optim: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    view = "detection" if family == "grounding_dino" else "expression"
    scenes = {"name": "shapes", "image_size": 64, "view": view}
    data = {"train": scenes | {"split": "train", "size": 12}, "eval": scenes | {"split": "val", "size": 2}}
    config = make(model=NO_DROPOUT, data=data, optim={"lr": 1e-2} | (optim or {}), train=train)
    if family == "grounding_dino":
        config.model = tiny_grounding_dino(denoising=DenoisingConfig(num_queries=5))
    return config


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.unwrapped_model.state_dict().items()}


def output_of(model: Any, batch: Batch) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return [value for value in model(batch) if isinstance(value, Tensor)]


def test_frozen_modules_do_not_change_and_have_no_optimizer_state(tiny_config: MakeConfig) -> None:
    config = configured(
        tiny_config, "grounding_dino", {"freeze": ["text.network", "backbone"], "weight_decay": 0.5}, max_steps=2
    )
    trainer = Trainer(config)
    before = weights_of(trainer)
    trainer.fit()
    changed = {name for name, value in trainer.unwrapped_model.state_dict().items() if not value.equal(before[name])}
    frozen = {name for name in before if name.startswith(("text.network.", "backbone."))}
    assert changed
    assert not changed & frozen
    assert {name.split(".")[0] for name in changed} >= {"text", "encoder", "decoder", "neck"}
    optimized = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert (
        optimized
        == trainer.unwrapped_model.num_parameters(trainable_only=True)
        < trainer.unwrapped_model.num_parameters()
    )
    assert trainer.unwrapped_model.text.network.training, "dropout stays active, as documented"
    assert load_file(trainer.folder.path / "best" / "model.safetensors").keys() == before.keys()


def test_unknown_names_to_freeze(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"optim\.freeze\.vison: no trainable parameter there; near names: vision"):
        Trainer(configured(tiny_config, optim={"freeze": ["vison"]}))
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        Trainer(configured(tiny_config, optim={"freeze": ["vision", "text", "head"]}))


TARGETS = {"rec": ["text.network", "head.layers"], "grounding_dino": ["attention", "encoder.layers.0", "text"]}


@pytest.mark.parametrize("family", list(TARGETS))
def test_exactly_the_adapters_are_trained(tiny_config: MakeConfig, family: str) -> None:
    config = configured(tiny_config, family, {"lora": {"targets": TARGETS[family], "rank": 2}}, max_steps=3)
    trainer = Trainer(config)
    assert not any("fusion.image" in name and ".lora_" in name for name in weights_of(trainer)), "never called"
    before = weights_of(trainer)
    trainer.fit()
    adapters = {name for name in before if ".lora_" in name}
    changed = {name for name, value in trainer.unwrapped_model.state_dict().items() if not value.equal(before[name])}
    assert len(adapters) > 8
    assert changed == adapters, sorted(changed ^ adapters)
    assert not any("pooler" in name for name in adapters)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_checkpoints_are_merged(tiny_config: MakeConfig, ema: float | None) -> None:
    """They have the names of the plain model, and the outputs of the adapted one."""
    lora = {"targets": ["text.network", "query"], "rank": 3, "train_also": ["head.score"]}
    config = configured(tiny_config, optim={"lora": lora}, max_steps=3, ema=ema)
    plain = config.model.build().own_state_dict()
    trainer = scripted(Trainer(config), [0.5])
    merged = merged_weights(trainer.unwrapped_model, config.optim.lora)
    untrained = {name: value.clone() for name, value in merged.items()}
    assert untrained.keys() == plain.keys()
    assert all(
        untrained[name].equal(value)
        for name, value in trainer.unwrapped_model.state_dict().items()
        if name in untrained
    )
    trainer.fit()
    batch = next(trainer.data.steps(0, 0))[0]
    loaded, loaded_config = read_model(trainer.folder.path)
    assert loaded_config == config
    assert loaded.own_state_dict().keys() == plain.keys()
    assert not any("lora" in name for name in load_file(trainer.folder.checkpoints()[-1] / "model.safetensors"))
    with trainer.state.evaluated_weights():
        for found, expected in zip(output_of(loaded, batch), output_of(trainer.unwrapped_model, batch), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    changed = {name for name, value in loaded.own_state_dict().items() if not value.equal(untrained[name])}
    assert {"head.score.weight", "head.score.bias"} <= changed
    assert "text.network.encoder.layer.0.attention.self.query.weight" in changed
    assert not any(name.endswith("bias") for name in changed - {"head.score.bias"})


def test_adapters_of_every_layer_are_merged(tiny_config: MakeConfig) -> None:
    """Also those of the backbone, whose weights have other names in files than in memory."""
    lora = asdict(load_config("configs/grounding_dino/finetune_lora.yaml").optim)["lora"] | {
        "rank": 2,
        "train_also": [],
    }
    config = configured(tiny_config, "grounding_dino", {"lora": lora}, max_steps=2)
    plain = config.model.build().own_state_dict()
    trainer = Trainer(config)
    assert any("backbone" in name for name in weights_of(trainer) if ".lora_" in name)
    trainer.fit()
    loaded = read_model(trainer.folder.path)[0]
    merged = merged_weights(trainer.unwrapped_model, config.optim.lora)
    assert merged.keys() == loaded.own_state_dict().keys() == plain.keys()
    batch = next(trainer.data.steps(0, 0))[0]
    for found, expected in zip(output_of(loaded, batch), output_of(trainer.unwrapped_model, batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    Trainer(replace(config, train=replace(config.train, max_steps=3)), resume=True).fit()


def test_resuming_with_adapters_equals_an_uninterrupted_run(tiny_config: MakeConfig, tmp_path: Path) -> None:
    lora = {"targets": ["text.network"], "dropout": 0.3, "train_also": ["head"]}
    runs = []
    for name in ("uninterrupted", "stopped"):
        config = configured(tiny_config, optim={"lora": lora}, output=str(tmp_path / name), accumulate=2, epochs=4)
        runs.append(Path(config.train.output))
        trainer = Trainer(config)
        if name == "stopped":
            stop_in_step(trainer, 3, interrupt)
            with pytest.raises(SystemExit):
                trainer.fit()
            trainer = Trainer(config, resume=True)
        trainer.fit()
    assert_same_runs(*runs)
    config.optim.lora = None
    with pytest.raises(
        CheckpointError,
        match=r"(?s)training\.pt does not match the configuration \(model, optim\.algorithm, optim\.lora",
    ):
        Trainer(config, resume=True)


def test_adapted_layers_can_also_be_trained(tiny_config: MakeConfig) -> None:
    trainer = Trainer(configured(tiny_config, optim={"lora": {"targets": ["head.layers"], "train_also": ["head"]}}))
    names = {name for name, p in trainer.unwrapped_model.named_parameters() if p.requires_grad}
    assert any(name.endswith("base_layer.weight") for name in names)
    assert any(name.endswith("lora_B.default.weight") for name in names)
    assert all(name.startswith("head.") for name in names)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"lora": {"targets": ["queri"]}}, r"optim\.lora\.targets: no linear layer is called queri; near names: query"),
        (
            {"lora": {"targets": ["query"], "train_also": ["haed"]}},
            r"optim\.lora\.train_also: no trainable parameter is called haed; near names: head",
        ),
        ({"lora": {"targets": ["image_query"]}}, "no linear layer is called image_query"),
        ({"lora": {"targets": ["text.network"]}, "freeze": ["text"]}, r"text\.network is frozen; .*optim\.freeze"),
    ],
)
def test_targets_that_cannot_be_adapted(tiny_config: MakeConfig, optim: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(configured(tiny_config, optim=optim))


def test_invalid_settings(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="name at least one linear layer"):
        configured(tiny_config, optim={"lora": {"targets": []}})
    with pytest.raises(ConfigError, match=r"optim\.lora\.rnak: unknown key; did you mean `rank`"):
        configured(tiny_config, optim={"lora": {"targets": ["query"], "rnak": 3}})


def test_without_peft_the_error_names_the_extra(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install peft"):
        Trainer(configured(tiny_config, optim={"lora": LoraConfig(targets=["query"])}))
