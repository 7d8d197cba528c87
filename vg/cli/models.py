"""Models for the verbs: checkpoints of vg, and configurations with released weights."""

from __future__ import annotations

from pathlib import Path

from vg.checkpoint import read_model
from vg.config import RunConfig, SavedConfig, load_config
from vg.errors import ConfigError
from vg.models.base import GroundingModel


def load(path: Path, overrides: list[str]) -> tuple[GroundingModel, SavedConfig]:
    """Load the model of a checkpoint, or of a YAML file with `model.weights`, in evaluation mode.

    Raises:
        CheckpointError: see `vg.checkpoint.read_model`.
        ConfigError: the YAML file does not set `model.weights`.
    """
    if path.suffix not in (".yaml", ".yml"):
        return read_model(path, overrides)
    config = load_config(path, overrides)
    if config.model.weights is None:
        raise ConfigError(f"{path}: model.weights is not set; train first, then give the folder of the run")
    return config.model.build().eval(), config


def load_with_data(path: Path, overrides: list[str]) -> tuple[GroundingModel, RunConfig]:
    """Like load, but raise ConfigError if the configuration has no datasets to evaluate on."""
    model, config = load(path, overrides)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{path} is a converted checkpoint without a data config; "
            "add data.train.name=... and data.eval.name=... (both may be the same)"
        )
    return model, config
