"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) of any model, through the package peft."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat, PositiveInt

from vg.errors import ConfigError
from vg.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vg.models.base import GroundingModel

ADAPTER = "default"  # as peft calls the only one


@dataclass
class LoraConfig(Settings):
    """Which linear layers get adapters; all other weights stay as they are."""

    targets: list[str]
    """Names or parts of names of linear layers or of modules that hold some: text.network, attention.self.query."""
    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    """Adapters are multiplied by alpha / rank."""
    dropout: NonNegativeFloat = 0.0
    """Of what goes into an adapter."""
    train_also: list[str] = field(default_factory=list)
    """Modules that are trained as a whole, for example a head."""

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("targets: name at least one linear layer, or leave out lora")
        if self.dropout >= 1:
            raise ValueError(f"dropout ({self.dropout}) must be below 1")


def add_adapters(model: GroundingModel, config: LoraConfig) -> None:
    """Put adapters beside linear layers and freeze everything else but `train_also`.

    Raises:
        ConfigError: peft is not installed, a name fits nothing, or a layer is frozen by the model's own settings.
    """
    from torch import nn

    try:
        import peft
    except ImportError as error:
        raise ConfigError("optim.lora needs the package peft: pip install 'visual-grounding[lora]'") from error

    # Not of derived classes: their weights may be read without a call, past any adapter, as in nn.MultiheadAttention.
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = set()
    for target in config.targets:
        # What is frozen already has no gradient or is not saved; some of it, as BERT's pooler, has no influence at all.
        names = [name for name in _named(target, "targets", linear) if linear[name].weight.requires_grad]
        if not names:
            raise ConfigError(
                f"optim.lora.targets: {target} is frozen; set model.*.frozen=false and take it out of optim.freeze, "
                "for lora freezes what it adapts by itself"
            )
        chosen |= set(names)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    also = {name for part in config.train_also for name in _named(part, "train_also", trainable)}
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules="|".join(map(re.escape, sorted(chosen))),  # a string is matched with whole names
        ),
        model,
        ADAPTER,
    )
    for name, parameter in trainable.items():  # also those inside of layers that have got an adapter
        parameter.requires_grad_(name in also)


def merged_weights(model: GroundingModel) -> dict[str, Tensor]:
    """The model's own weights under their plain names, adapters added to the layers that have them."""
    weights = {}
    for key, value in model.own_state_dict().items():
        if ".lora_" in key:
            continue
        if ".base_layer." in key:
            owner, _, kind = key.rpartition(".base_layer.")
            layer = model.get_submodule(owner)
            if kind == "weight":
                value = value + layer.get_delta_weight(ADAPTER)  # type: ignore[operator]
            key = f"{owner}.{kind}"
        weights[key] = value
    return weights


def _named(part: str, setting: str, things: dict[str, nn.Linear] | dict[str, nn.Parameter]) -> list[str]:
    """The names of things that hold `part` as a whole, between dots."""
    found = [name for name in things if f".{part}." in f".{name}."]
    if not found:
        parts = {*things, *(word for name in things for word in name.split("."))}
        near = difflib.get_close_matches(part, parts, n=3) or sorted({name.split(".")[0] for name in things})
        what = "linear layer" if setting == "targets" else "trainable parameter"
        raise ConfigError(f"optim.lora.{setting}: no {what} is called {part}; near names: {', '.join(near)}")
    return found
