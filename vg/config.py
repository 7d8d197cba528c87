"""Configuration of a run: defaults in dataclasses, differences in YAML, overrides on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union

import yaml
from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag, TypeAdapter, ValidationError

from vg.cache.settings import CacheConfig
from vg.data.augment import AugmentConfig
from vg.data.mixture import SourceConfig
from vg.data.stream import StreamConfig
from vg.errors import ConfigError
from vg.models import ModelConfig
from vg.settings import (
    Settings,
    all_attributes,
    as_overrides,
    by_name,
    differences,
    is_mapping_of_settings,
    key_path,
    parse_yaml,
    problem,
    read_yaml,
    unknown_keys,
    with_home,
)
from vg.training.optim import OptimConfig
from vg.training.settings import TrainConfig

MOST_PROBLEMS = 50  # in one message

EvalConfig = Annotated[
    Union[  # noqa: UP007 - pydantic on Python 3.10
        Annotated[SourceConfig, Tag("<one>")],
        Annotated[dict[Annotated[str, Field(pattern="^[^/]+$")], SourceConfig], Tag("<several>"), Field(min_length=1)],
    ],
    Discriminator(lambda value: "<several>" if is_mapping_of_settings(value) else "<one>"),
]


@dataclass
class DataConfig(Settings):
    """Datasets, and how their samples are loaded and batched."""

    train: SourceConfig
    eval: EvalConfig
    """One dataset, or several by name: {raccoon: {name: coco, ...}, base: {...}}. The first one selects the best
    checkpoint; metrics of the others carry their name ("base/ap"). The change since the first evaluation is logged for
    each of them."""
    batch_size: PositiveInt = 32
    """Samples per process and forward pass."""
    eval_batch_size: PositiveInt = 64
    workers: NonNegativeInt = 2
    """Data-loading processes per training process; 0 loads in the training process itself."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    bad_samples: Literal["error", "skip"] = "error"
    """What to do with an unusable sample, such as a damaged image or a faulty line of ODVG: raise, or log, count and
    skip. Faulty annotations of COCO, Pascal VOC, YOLO and CSV are errors in any case, before the run begins."""
    drop_overlap: bool = False
    """Drop training samples whose image is in the evaluation data; by default there is only a warning."""
    group_by_aspect_ratio: bool = False
    """Batch training images of similar aspect ratio, which reduces padding."""
    one_size: bool = False
    """Resize the training images of a batch to one size, that of the median aspect ratio with sides of multiples of 32
    px, instead of padding them: one pass of the backbone, and few sizes in all. Needs `group_by_aspect_ratio`."""
    expressions_per_image: PositiveInt = 1
    """Largest number of expressions of one training image that are batched together; it is augmented once for them, and
    rec encodes it once. The batch size still counts expressions."""
    cache: CacheConfig | None = None
    """null runs the encoders in every step; {folder: cache} reads their features from that folder."""

    def __post_init__(self) -> None:
        if self.cache and self.augment != AugmentConfig():
            raise ValueError("augment changes pixels, but a cache holds features; use cache.views instead")
        if self.cache and self.one_size:
            raise ValueError("one_size resizes images, but a cache holds their features; set one of the two only")
        if self.expressions_per_image > 1 and self.group_by_aspect_ratio:
            raise ValueError("a batch is grouped by image (expressions_per_image) or by aspect ratio, not by both")
        if isinstance(self.train, StreamConfig):
            for name in ("cache", "drop_overlap", "group_by_aspect_ratio"):
                if getattr(self, name):
                    raise ValueError(f"a stream cannot be used with {name}, which needs to know all samples")
            if self.expressions_per_image > 1:
                raise ValueError("a stream cannot be used with expressions_per_image above 1: it is not in that order")
        if self.one_size and not self.group_by_aspect_ratio:
            raise ValueError("one_size would distort images of different shapes; set group_by_aspect_ratio=true, too")

    def eval_datasets(self) -> dict[str, SourceConfig]:
        """Evaluation datasets by name; a single one has the empty name."""
        return self.eval if isinstance(self.eval, dict) else {"": self.eval}

    def datasets(self) -> dict[str, SourceConfig]:
        """Return all datasets by key: "train", then those of `eval_key`."""
        return {"train": self.train} | {eval_key(name): dataset for name, dataset in self.eval_datasets().items()}


def eval_key(name: str) -> str:
    """Return the key of an evaluation dataset below `data`: "eval", or "eval.NAME" of several."""
    return f"eval.{name}" if name else "eval"


@dataclass
class ModelOnlyConfig(Settings):
    """Configuration of a model without a training run of vg, such as a converted checkpoint."""

    model: ModelConfig


@dataclass
class RunConfig(Settings):
    """Everything that determines a run."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.train.minutes and self.optim.milestones:
            raise ValueError(
                "optim.milestones are epochs, which train.minutes replaces: use optim.schedule=cosine and "
                "optim.milestones=[]"
            )


SavedConfig: TypeAlias = ModelOnlyConfig | RunConfig  # of a checkpoint
Config = TypeVar("Config", bound=SavedConfig)
Files = Sequence[tuple[Path, Mapping[str, Any]]]  # a YAML file and its values, then those of its `base`, and so on


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, merge it over its `base`, and apply overrides such as "optim.lr=1e-4" or "model.head=dense".

    A path among the values may begin with ~/, the home folder.
    `base: other.yaml` (relative to the file; a base may have a base) is merged key by key. Lists, null, `{}`, and
    mappings that select another `name`, such as another dataset or head, replace the value of the base.

    Raises:
        ConfigError: a missing file, invalid YAML, a cycle of bases, a wrong type, or an unknown key.
    """
    values, files = _load_values(path, overrides)
    return _parse(values, str(path), RunConfig, files)


def load_saved_config(path: str | Path, overrides: Sequence[str] = ()) -> SavedConfig:
    """As load_config, for a checkpoint, whose configuration may have the model only."""
    values, files = _load_values(path, overrides)
    return parse_saved_config(values, str(path), files=files)


def parse_saved_config(
    values: Mapping[str, Any], origin: str, overrides: Sequence[str] = (), files: Files = ()
) -> SavedConfig:
    """As parse_config, for the values of a checkpoint, see `load_saved_config`."""
    values = _overridden(values, overrides)
    return _parse(values, origin, ModelOnlyConfig if values.keys() == {"model"} else RunConfig, files)


def parse_config(
    values: Mapping[str, Any], origin: str = "the configuration", overrides: Sequence[str] = ()
) -> RunConfig:
    """Validate nested dictionaries and overrides of them; raises ConfigError, whose message begins with `origin`."""
    return _parse(_overridden(values, overrides), origin, RunConfig, [])


def checked_config(config: Any) -> RunConfig:
    """Return a configuration that may have been changed in Python; a new one if a value lacks the type of its field.

    Raises:
        ConfigError: not a RunConfig, a wrong type, or an unknown attribute.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(f"expected the configuration that vg.load_config returns, got {config!r:.80}")
    found = _parse(all_attributes(config), "the configuration", RunConfig, [])
    return config if repr(found) == repr(config) else found  # 8.0 == 8


def dump_config(config: SavedConfig, defaults: bool = True) -> str:
    """Return a configuration as YAML, optionally without defaults; loading it gives an equal configuration."""
    if not defaults:
        return yaml.safe_dump(differences(config), sort_keys=False, default_flow_style=None, width=120)
    return yaml.safe_dump(TypeAdapter(type(config)).dump_python(config, mode="json"), sort_keys=False)


def recipe_path(name: str) -> Path:
    """Return the path of a YAML file of configs/, which is in the package if that is installed from a wheel."""
    package = Path(__file__).parent
    folder = package / "configs"
    return (folder if folder.exists() else package.parent / "configs") / name


def _parse(values: Mapping[str, Any], origin: str, config_type: type[Config], files: Files) -> Config:
    values = with_home(values)
    problems, cause = unknown_keys(values, config_type), None
    if not problems:
        try:
            return TypeAdapter(config_type).validate_python(values)
        except ValidationError as error:
            cause = error
            problems = [(key_path(item["loc"], values), problem(item)) for item in error.errors(include_url=False)]
    lines = [
        ": ".join(filter(None, (".".join(map(str, path)), message))) + _source(path, values, files)
        for path, message in problems
    ]
    more = [f"and {len(lines) - MOST_PROBLEMS} more"] if len(lines) > MOST_PROBLEMS else []
    raise ConfigError("\n  ".join([f"{origin}:", *lines[:MOST_PROBLEMS], *more])) from cause


def _source(path: Sequence[Any], values: Any, files: Files) -> str:
    """Name the base file that a value comes from; empty if it is in the first file or on the command line."""
    value = _lookup(values, path)
    sources = [file for file, own in files if value is not None and _lookup(own, path) == value]
    return f" (in {sources[0]})" if sources and sources[0] != files[0][0] else ""


def _lookup(values: Any, path: Sequence[Any]) -> Any:
    for key in path:
        try:
            values = by_name(values)[key]
        except (KeyError, IndexError, TypeError):
            return None
    return values


def _load_values(path: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Files]:
    files = _read_files(Path(path))
    values: dict[str, Any] = {}
    for _, own in reversed(files):
        if own:  # an empty mapping would replace the base
            values = _merge(values, own)
    return _overridden(values, overrides), files


def _read_files(path: Path, chain: tuple[Path, ...] = ()) -> Files:
    if path.resolve() in [file.resolve() for file in chain]:
        raise ConfigError(f"`base` forms a cycle: {' -> '.join(map(str, [*chain, path]))}")
    values = _read_yaml(path, f", the base of {chain[-1]}" if chain else "")
    base = values.pop("base", None)
    if base is None:
        return [(path, values)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must be the path of one YAML file, got a {type(base).__name__}")
    return [(path, values), *_read_files(path.parent / Path(base).expanduser(), (*chain, path))]


def _read_yaml(path: Path, role: str) -> dict[str, Any]:
    try:
        values = read_yaml(path) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}{role}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must contain keys such as `model:` and `data:`, not a {type(values).__name__}")
    return values


def _merge(base: Any, values: Any, path: str = "") -> Any:
    """Merge values over those of a base, see load_config."""
    if isinstance(base, Mapping) and "name" in base:
        values = by_name(values)
    if not values or not isinstance(values, Mapping) or not isinstance(base := by_name(base), Mapping):
        return values
    if "name" in values and values["name"] != base.get("name"):
        return values
    if path == "data.eval." and "name" in base and all(isinstance(x, Mapping) and "name" in x for x in values.values()):
        return values  # several evaluation datasets by name replace a single one
    merged = {key: _merge(base[key], value, f"{path}{key}.") for key, value in values.items() if key in base}
    return {**base, **values, **merged}


def _overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a changed copy."""
    changed = dict(values)
    for override in as_overrides(overrides):
        _apply(changed, override)
    return changed


def _apply(values: dict[str, Any], override: str) -> None:
    """Set the value of one override, such as "optim.lr=1e-4"; mappings below `values` are replaced by copies."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override must read key.subkey=value, for example optim.lr=1e-4; got {override!r}")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.get(parent)
        child = {} if child is None else by_name(child)
        if not isinstance(child, Mapping):
            raise ConfigError(f"{override}: {parent} is {child!r}, which has no keys")
        values[parent] = dict(child)  # a YAML anchor may refer to the same mapping
        values = values[parent]
    try:
        values[last] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override[:80]}: the value is not valid YAML ({error})") from error
