"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) for any model, with the package peft."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt

from vg.errors import ConfigError, closest
from vg.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vg.models.base import GroundingModel

ADAPTER = "default"  # the name that peft gives a single adapter


@dataclass
class LoraConfig(Settings):
    """Linear layers that get adapters; all other weights are frozen, except `train_also`."""

    targets: list[str]
    """Linear layers, or modules that contain some, by full or partial name: text.network, attention.self.query."""
    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    """The output of an adapter is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of an adapter."""
    train_also: list[str] = field(default_factory=list)
    """Modules whose own weights are trained, for example a head."""

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("targets: name at least one linear layer, or remove lora")


def add_adapters(model: GroundingModel, config: LoraConfig) -> None:
    """Add adapters to linear layers and freeze all other parameters except those of `train_also`.

    Raises:
        ConfigError: peft is not installed, a name matches nothing, or a target is already frozen.
    """
    from torch import nn

    try:
        import peft
    except ImportError as error:
        raise ConfigError("optim.lora needs the package peft: pip install peft") from error

    # Not subclasses: nn.MultiheadAttention, for example, uses the weight of one without calling it, past any adapter.
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = set()
    for target in config.targets:
        # Frozen layers have no gradient or are not saved, and some, such as BERT's pooler, do not affect the output.
        names = [name for name in _matching(target, "targets", linear) if linear[name].weight.requires_grad]
        if not names:
            raise ConfigError(
                f"optim.lora.targets: {target} is frozen; set model.*.frozen=false and remove it from optim.freeze "
                "(lora itself freezes the weights that it adapts)"
            )
        chosen |= set(names)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    also = {name for module in config.train_also for name in _matching(module, "train_also", trainable)}
    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="|".join(map(re.escape, sorted(chosen))),  # peft matches a string against full names
    )
    peft.inject_adapter_in_model(adapters, model, ADAPTER)
    for name, parameter in trainable.items():  # includes the weights of adapted layers
        parameter.requires_grad_(name in also)


def merged_weights(model: GroundingModel, config: LoraConfig | None) -> dict[str, Tensor]:
    """The model's own weights under their names without adapters; adapters are merged into their layers."""
    own, weights = model.own_state_dict(), {}
    for key, value in own.items():
        layer, is_adapted, name = key.rpartition(".base_layer.")
        if config and is_adapted and name == "weight":
            # By name: FSDP2 replaces parameters when it gathers or divides them.
            down, up = (own[f"{layer}.lora_{matrix}.{ADAPTER}.weight"] for matrix in "AB")
            value = value + (up @ down) * (config.alpha / config.rank)
        if ".lora_" not in key:
            weights[f"{layer}.{name}" if is_adapted else key] = value
    return weights


def _matching(target: str, setting: str, known: dict[str, nn.Linear] | dict[str, nn.Parameter]) -> list[str]:
    """The known names that contain `target` as a sequence of whole words between dots."""
    found = [name for name in known if f".{target}." in f".{name}."]
    if not found:
        words = {*known, *(word for name in known for word in name.split("."))}
        near = closest(target, words, limit=3, cutoff=0.6) or sorted({name.split(".")[0] for name in known})
        what = "linear layer" if setting == "targets" else "trainable parameter"
        raise ConfigError(f"optim.lora.{setting}: no {what} is called {target}; near names: {', '.join(near)}")
    return found
