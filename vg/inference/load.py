"""Open a model: a run or checkpoint of vg, a published Grounding DINO, a Hub id, or a configuration with weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vg.checkpoint import VALIDATION, read_model
from vg.config import ModelOnlyConfig, SavedConfig, load_saved_config, parse_saved_config
from vg.errors import CheckpointError, ConfigError
from vg.files import read_json
from vg.models.base import GroundingModel
from vg.models.grounding_dino.checkpoints import bert_settings, open_tokenizer, read_checkpoint
from vg.models.saved import CONFIG, WEIGHTS, YAML, best_of, is_checkpoint, local_path
from vg.settings import all_attributes


class Loaded(NamedTuple):
    """A model in evaluation mode on the CPU, its configuration and its results."""

    model: GroundingModel
    config: SavedConfig
    results: dict[str, Any] | None  # of its evaluation, if it is a checkpoint of vg that was evaluated
    is_checkpoint: bool = False  # of vg; else `config` may have data, but the weights were not trained on them

    @property
    def training(self) -> SavedConfig:
        """The configuration with which the weights were trained, that of the model alone if that is unknown."""
        return self.config if self.is_checkpoint else ModelOnlyConfig(self.config.model)


def load_model(
    path: str | Path, tokenizer: str | None = None, overrides: Sequence[str] = (), revision: str | None = None
) -> GroundingModel:
    """Load a trained model in evaluation mode on the CPU.

    Args:
        path: folder of a run or checkpoint of vg, or a published Grounding DINO: an official or mmdetection .pth, a
            transformers folder; or the Hub id of any of these folders; or a YAML file that sets `model.weights`.
        tokenizer: folder, vocab.txt, tokenizer.json or Hub id for a .pth, which contains no tokenizer; by default that
            of BERT.
        overrides: of the configuration, such as "model.vision.id=/new/folder".
        revision: branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: not a checkpoint, damaged, or weights that do not fit the model.
        ConfigError: unknown overrides; a tokenizer for a checkpoint that contains it; a YAML file without weights.
    """
    return open_model(path, tokenizer, overrides, revision).model


def open_model(
    path: str | Path, tokenizer: str | None = None, overrides: Sequence[str] = (), revision: str | None = None
) -> Loaded:
    """Like `load_model`; also return the configuration, and the results of a checkpoint of vg.

    The configuration is that of the run, or of the model alone if vg did not train it; overrides may add data to that.
    """
    if Path(path).suffix in YAML:
        return _open_config(path, tokenizer, overrides, revision)
    folder = local_path(path, revision)
    if not is_checkpoint(folder):
        return _open_published(folder, path, tokenizer, overrides)
    if tokenizer is not None:
        raise ConfigError(f"{path} is a checkpoint of vg, which contains its tokenizer; leave {tokenizer!r} out")
    model, config = read_model(folder, overrides)
    file = best_of(folder) / VALIDATION
    return Loaded(model, config, read_json(file, dict) if file.exists() else None, True)


def _open_config(path: str | Path, tokenizer: str | None, overrides: Sequence[str], revision: str | None) -> Loaded:
    folder = Path(path).parent
    if Path(path).name == CONFIG and (best_of(folder) / WEIGHTS).exists():  # model.weights are those before training
        raise CheckpointError(f"{path} has only the configuration of a checkpoint; give its folder, {folder}")
    if tokenizer is not None or revision is not None:
        given = f"tokenizer {tokenizer!r}" if revision is None else f"revision {revision!r}"
        raise ConfigError(f"{path} is a YAML file, not a checkpoint, and takes no {given}; leave it out")
    config = load_saved_config(path, overrides)
    if config.model.weights is None:
        raise ConfigError(f"{path}: model.weights is not set; train first, then give the folder of the run")
    return Loaded(config.model.build().eval(), config, None)


def _open_published(folder: Path, path: str | Path, tokenizer: str | None, overrides: Sequence[str]) -> Loaded:
    checkpoint = read_checkpoint(folder, bert_settings(tokenizer))
    vocabulary = open_tokenizer(checkpoint, tokenizer)
    config = parse_saved_config(all_attributes(ModelOnlyConfig(checkpoint.config)), str(path), overrides)
    if config.model.name != checkpoint.config.name:
        raise ConfigError(f"{path} is a {checkpoint.config.name}, so model.name={config.model.name} cannot be set")
    model = config.model.build(pretrained=False)
    try:
        model.load_own_state_dict(checkpoint.weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model.use_tokenizer(vocabulary)
    return Loaded(model.eval(), config, None)
