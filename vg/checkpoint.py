"""A checkpoint is a folder: model.safetensors, config.yaml, tokenizer/, classes.json if it was trained on classes, and
training.pt if it can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vg.config import SavedConfig, dump_config, load_saved_config
from vg.errors import CheckpointError, ConfigError, DamagedCheckpointError, UserError, unpickling_problem
from vg.files import read_json, replacing, write_json
from vg.models.base import GroundingModel
from vg.models.saved import CLASSES, CONFIG, ENCODERS, WEIGHTS, best_of, check_encoders, read_weights
from vg.types import TextSpec

TOKENIZER, TRAINING = "tokenizer", "training.pt"
VALIDATION = "validation.json"  # results of the evaluation of a checkpoint, if there was one
SHARDS = "shards"  # beside TRAINING, the tensors of each process of FSDP2
STATE = {  # keys of TRAINING
    *("weights", "optimizer", "scaler", "ema", "shards", "schedule", "progress", "unlogged", "data"),
}
TORCH_WRITER = "inline_container"  # the source file that torch names in errors of writing


@contextmanager
def new_checkpoint(path: Path, is_file: bool = False) -> Iterator[Path]:
    """Write a checkpoint atomically, see `vg.files.replacing`; an existing one stays unchanged if writing fails.

    Raises:
        CheckpointError: the disk is full or cannot be written to.
        RuntimeError: an error that is not about writing, such as that of a data worker that died.
    """
    try:
        with replacing(path, is_file) as partial:
            yield partial
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:  # torch, safetensors: other types for a full disk
        if isinstance(error, RuntimeError) and TORCH_WRITER not in str(error):
            raise
        raise CheckpointError(f"could not write the checkpoint {path}: {error}") from error


def write_model(folder: Path, model: GroundingModel, config: SavedConfig) -> None:
    """Write weights, resolved configuration, tokenizer and classes into an existing folder (see `new_checkpoint`)."""
    write_weights(folder, model.own_state_dict(), config, model.text_spec, model.classes)


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], config: SavedConfig, spec: TextSpec, classes: Sequence[str] = ()
) -> None:
    """Like write_model, for weights that are not in a model."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    if encoders := config.model.frozen_weights():
        (folder / ENCODERS).write_text(json.dumps(encoders, indent=2) + "\n", encoding="utf-8")
    (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors ignores the umask: only the owner could read it
    if classes:
        write_json(folder / CLASSES, classes)
    spec.tokenizer.save_pretrained(str(folder / TOKENIZER))
    if spec.extra is not None:
        spec.extra.tokenizer.save_pretrained(str(folder / TOKENIZER / "extra"))


def read_model(folder: str | Path, overrides: Sequence[str] = ()) -> tuple[GroundingModel, SavedConfig]:
    """Load a model in evaluation mode, and the configuration it was saved with, changed by the overrides.

    Args:
        folder: a checkpoint, or a run, of which the best checkpoint is loaded.

    Raises:
        CheckpointError: not a checkpoint, a damaged file, or weights that do not match the configuration.
    """
    folder = best_of(Path(folder))
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).exists():
            raise CheckpointError(f"{folder} is not a checkpoint of vg: {name} is missing")
    config = load_saved_config(folder / CONFIG, overrides)
    model = config.model.rebuild()
    try:
        model.load_tokenizer(str(folder / TOKENIZER))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    load_weights(model, folder, config)
    model.classes = read_classes(folder)
    return model.eval(), config


def read_classes(folder: Path) -> tuple[str, ...]:
    """Return the classes of a checkpoint, if it has any; raises DamagedCheckpointError if they are not phrases."""
    file = folder / CLASSES
    if not file.exists():
        return ()
    try:
        classes = read_json(file, list)
    except OSError as error:
        raise DamagedCheckpointError(f"{file} is damaged ({error.strerror}); use an older checkpoint") from error
    if not all(isinstance(name, str) and name.strip() for name in classes):
        raise DamagedCheckpointError(f"{file} is damaged: not a list of phrases; use an older checkpoint")
    return tuple(classes)


def load_weights(model: GroundingModel, folder: Path, config: SavedConfig) -> None:
    """Load model.safetensors of a checkpoint; raises CheckpointError that lists every weight that does not match.

    Warns if a frozen encoder of `config` is not the one that the checkpoint was trained with, see `check_encoders`.
    """
    weights = read_weights(folder)
    try:
        model.load_own_state_dict(weights)
    except ValueError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {error}") from error
    check_encoders(folder, config.model)


def write_training_state(folder: Path, state: dict[str, Any]) -> None:
    torch.save(state, folder / TRAINING)


def read_training_state(folder: Path) -> dict[str, Any]:
    """Load what write_training_state wrote.

    Raises:
        DamagedCheckpointError: the file is missing or damaged.
        CheckpointError: it cannot be read for another reason, such as its permissions.
    """
    try:
        state = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:
        intact = isinstance(error, (OSError, MemoryError)) and not isinstance(error, FileNotFoundError)
        raise (CheckpointError if intact else DamagedCheckpointError)(
            f"cannot resume from {folder / TRAINING}: {unpickling_problem(error)}"
        ) from error
    entries = state if isinstance(state, dict) else {}
    if lacking := sorted(STATE - entries.keys()):
        raise DamagedCheckpointError(f"cannot resume from {folder / TRAINING}: it lacks {', '.join(lacking)}")
    return entries
