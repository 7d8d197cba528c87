"""One run as data: defaults live in dataclasses, YAML states what differs, the command line has the last word."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
    TypeAdapter,
    ValidationError,
)

from vg.data.augment import AugmentConfig
from vg.data.mixture import SourceConfig
from vg.errors import ConfigError
from vg.models import ModelConfig
from vg.settings import Settings
from vg.training.optim import OptimConfig


def _is_several(value: Any) -> bool:
    """Whether this is a mapping of names to settings, and not settings."""
    return isinstance(value, Mapping) and all(
        isinstance(item, Mapping) or dataclasses.is_dataclass(item) for item in value.values()
    )


EvalConfig = Annotated[
    Union[  # noqa: UP007 - pydantic on Python 3.10
        Annotated[SourceConfig, Tag("<one>")],
        Annotated[dict[Annotated[str, Field(pattern="^[^/]+$")], SourceConfig], Tag("<several>"), Field(min_length=1)],
    ],
    Discriminator(lambda value: "<several>" if _is_several(value) else "<one>"),
]


@dataclass
class CacheConfig(Settings):
    """Features of frozen encoders on disk, which `vg cache` writes: training and evaluation read them, not pictures."""

    folder: str
    views: list[Literal["plain", "flip", "crop", "flip_crop"]] = field(default_factory=lambda: ["plain"])
    """What is kept of each training picture, one of which is drawn for each epoch: as it is, mirrored with "left" and
    "right" swapped in the words, cropped without loss of a box, or both; every entry costs the same space on disk."""
    expressions_per_image: PositiveInt = 1
    """Largest number of expressions of one image that are batched together, so that the head can share its keys."""

    def __post_init__(self) -> None:
        if not self.views:
            raise ValueError("views needs at least one entry, such as plain")


@dataclass
class DataConfig(Settings):
    """What is read, and how it gets into batches."""

    train: SourceConfig
    eval: EvalConfig
    """One data set or several, {raccoon: {name: coco, ...}, base: {...}}: the first one decides which checkpoint is the
    best, numbers of the others carry their name ("base/ap"), and training tells what is gained or lost on each."""
    batch_size: PositiveInt = 32
    """Samples of one process in one forward pass."""
    eval_batch_size: PositiveInt = 64
    workers: NonNegativeInt = 2
    """Processes that read, draw and augment beside each training process; 0 reads in the training process itself."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    bad_samples: Literal["error", "skip"] = "error"
    """What happens to a sample that cannot be used: stop and name it, or warn, count and go on without it."""
    drop_overlap: bool = False
    """Leave out of training what shows a picture of the evaluation data; by default there is only a warning."""
    similar_shapes: bool = False
    """Training batches hold pictures of similar aspect, so that less of a batch is padding."""
    cache: CacheConfig | None = None
    """null runs the encoders in every step; {folder: cache} reads their features from there."""

    def __post_init__(self) -> None:
        if self.cache and self.augment != AugmentConfig():
            raise ValueError("augment changes pixels, a cache has none; choose cache.views in its place")

    def eval_datasets(self) -> dict[str, SourceConfig]:
        """Name -> evaluation data; the only one has no name."""
        return self.eval if isinstance(self.eval, dict) else {"": self.eval}


@dataclass
class TrainConfig(Settings):
    """How long, how precisely, and what is kept."""

    output: str = "runs/default"
    """Folder of the run: configuration, checkpoints, history, curves."""
    seed: NonNegativeInt = 0
    epochs: PositiveInt = 10
    max_steps: PositiveInt | None = None
    """Optimiser steps; ends the run before the epochs do."""
    accumulate: PositiveInt = 1
    """Batches whose gradients make one optimiser step."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What happens where loss or gradient is not finite: stop at the next log entry, or do not take such steps, until
    ten in a row are none; weights that are no numbers come back from the newest checkpoint. Looking at every step makes
    a GPU wait."""
    precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda v: "no" if v is False else v)] = "no"
    """Mixed precision; bf16 wherever the GPU has it. (To YAML, a bare `no` is false, which is understood.)"""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights; if given, the average is what is evaluated and published."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; by default after every epoch."""
    eval_first: bool = False
    """Evaluate before the first step as well: what a pretrained model can do before it is trained further."""
    save_every: PositiveInt | None = None
    """Steps between checkpoints; by default with every evaluation."""
    keep: PositiveInt = 2
    """How many checkpoints to resume from stay on disk; the best one stays beside them."""
    best_metric: str | None = None
    """Number of an evaluation that decides which checkpoint is the best; by default miou where the evaluated data has
    expressions, ap where it is a detection set."""
    patience: PositiveInt | None = None
    """Stop after so many evaluations without a better `best_metric`; by default never."""
    interpolate: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)] | None = None
    """At the end, judge mixtures with these shares of the best weights, the rest being those that training began with,
    and keep the best mixture in the folder `interpolated`: fine-tuning may forget less so. [0.0, 0.25, 0.5, 0.75, 1.0]
    is a good choice."""
    log_every: PositiveInt = 10
    """Steps between log entries."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Names that Accelerate knows: tensorboard, wandb, mlflow, comet_ml, ..."""


@dataclass
class CheckpointConfig(Settings):
    """All that is known of a checkpoint that no run of vg made."""

    model: ModelConfig


@dataclass
class RunConfig(CheckpointConfig):
    """Everything that decides a run."""

    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


Config = TypeVar("Config", bound=CheckpointConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply overrides such as "optim.lr=1e-4" or "model.head=dense".

    Raises:
        ConfigError: no such file, no YAML, an unknown key (with the nearest one that exists), or a wrong type.
    """
    return parse_config(_load_values(path, overrides), str(path))


def load_checkpoint_config(path: str | Path, overrides: Sequence[str] = ()) -> CheckpointConfig:
    """The configuration of a checkpoint: that of the run which made it, or of the model alone where it was converted.

    Raises:
        ConfigError: see load_config.
    """
    values = _load_values(path, overrides)
    return _parse(values, str(path), CheckpointConfig if values.keys() == {"model"} else RunConfig)


def _load_values(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys such as `model:` and `data:`, not a {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return values


def parse_config(values: Mapping[str, Any], origin: str = "the configuration") -> RunConfig:
    """Turn nested dictionaries into a checked RunConfig; raises ConfigError that speaks of `origin`."""
    return _parse(values, origin, RunConfig)


def _parse(values: Mapping[str, Any], origin: str, kind: type[Config]) -> Config:
    trouble = _unknown_keys(values, kind, "")
    if trouble:
        raise ConfigError("\n  ".join([f"{origin}:", *trouble]))
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        lines = [f"{_path(item['loc'], values)}: {item['msg']}" for item in error.errors(include_url=False)]
        raise ConfigError("\n  ".join([f"{origin}:", *lines])) from error


def dump_config(config: CheckpointConfig) -> str:
    """The resolved configuration as YAML; reading it gives the same configuration again."""
    return yaml.safe_dump(TypeAdapter(type(config)).dump_python(config, mode="json"), sort_keys=False)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override reads key.subkey=value, for example optim.lr=1e-4; got {override!r}")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if isinstance(child, str):  # `head: dense` is short for `head: {name: dense}`
            child = values[parent] = {"name": child}
        if not isinstance(child, dict):
            raise ConfigError(f"{override}: {parent} is {child!r}, it has no keys below it")
        values = child
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override}: the value is not valid YAML ({error})") from error


def _unknown_keys(values: Mapping[str, Any], config_type: type, path: str) -> list[str]:
    """Keys that the dataclass does not have, each with its path and the nearest one that exists."""
    hints = typing.get_type_hints(config_type)
    trouble = []
    for key, value in values.items():
        if key not in hints or key.startswith("_"):
            names = [f.name for f in dataclasses.fields(config_type)]
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.4)
            advice = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(names)}"
            trouble.append(f"{path}{key}: unknown key; {advice}")
            continue
        trouble += _unknown_below(value, hints[key], f"{path}{key}")
    return trouble


def _unknown_below(value: Any, hint: Any, path: str) -> list[str]:
    """The same for what one key holds: settings, or a mapping or list of settings."""
    for member in _members(hint):
        if typing.get_origin(member) is dict and _is_several(value):
            item = typing.get_args(member)[1]
            return [line for name in value for line in _unknown_below(value[name], item, f"{path}.{name}")]
        if typing.get_origin(member) is list and isinstance(value, list):
            item = typing.get_args(member)[0]
            return [line for place, each in enumerate(value) for line in _unknown_below(each, item, f"{path}.{place}")]
    below, choices = _settings_type(hint, value)
    if choices:
        name = value if isinstance(value, str) else value.get("name")
        near = difflib.get_close_matches(str(name or ""), choices, n=1, cutoff=0.4)
        advice = f"did you mean `{near[0]}`? " if near else ""
        what = "is missing" if name is None else f"{name!r} is unknown"
        return [f"{path}.name: {what}; {advice}there are {', '.join(choices)}"]
    return _unknown_keys(value, below, f"{path}.") if below is not None and isinstance(value, Mapping) else []


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _settings_type(hint: Any, value: Any) -> tuple[type | None, list[str]]:
    """The dataclass that a value is meant for; or, where its `name` fits none, the names there are."""
    members = [member for member in _members(hint) if isinstance(member, type) and dataclasses.is_dataclass(member)]
    named = {f.default: member for member in members for f in dataclasses.fields(member) if f.name == "name"}
    if not named or not isinstance(value, (str, Mapping)):
        return (members[0] if members else None), []
    name = value if isinstance(value, str) else value.get("name", next(iter(named)) if len(named) == 1 else None)
    return (named[name], []) if name in named else (None, sorted(map(str, named)))


def _path(location: Sequence[str | int], values: Any) -> str:
    """Dotted path of a pydantic error, without the names of types that pydantic puts in between."""
    parts = []
    for place, part in enumerate(location):
        between = isinstance(values, Mapping) and part not in values and place < len(location) - 1
        if between or str(part).startswith("<"):  # as in "<one>"
            continue
        parts.append(str(part))
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):  # it is this key that is missing
            values = None
    return ".".join(parts)
