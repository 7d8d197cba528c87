"""A checkpoint is a folder: model.safetensors, config.yaml, tokenizer/, and training.pt where training can go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vg.config import CheckpointConfig, dump_config, load_checkpoint_config
from vg.errors import CheckpointError, UserError
from vg.files import replacing
from vg.models.base import GroundingModel

WEIGHTS, CONFIG, TOKENIZER, TRAINING = "model.safetensors", "config.yaml", "tokenizer", "training.pt"


@contextmanager
def new_checkpoint(path: Path, is_file: bool = False) -> Iterator[Path]:
    """Write a checkpoint atomically, see `vg.files.replacing`; an existing one stays unchanged if writing fails.

    Raises:
        CheckpointError: the disk is full or cannot be written to.
    """
    try:
        with replacing(path, is_file) as partial:
            yield partial
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors report a full disk in their ways
        raise CheckpointError(
            f"could not write the checkpoint {path}: {error}\n"
            "Is the disk full? Earlier checkpoints are untouched; make room and resume."
        ) from error


def write_model(folder: Path, model: GroundingModel, config: CheckpointConfig) -> None:
    """Write weights, resolved configuration and tokenizer into an existing folder (see `new_checkpoint`)."""
    write_weights(folder, model.own_state_dict(), config, model.text_spec.tokenizer)


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], config: CheckpointConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """As write_model, for weights that are in no model."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
    tokenizer.save_pretrained(str(folder / TOKENIZER))


def read_model(folder: str | Path, overrides: Sequence[str] = ()) -> tuple[GroundingModel, CheckpointConfig]:
    """A model as it was saved, in evaluation mode, and the configuration it was saved with (but for the overrides).

    Raises:
        CheckpointError: not a checkpoint, a damaged file, or weights that do not fit the configuration.
    """
    folder = Path(folder)
    if (folder / "best" / WEIGHTS).exists():
        folder = folder / "best"  # the folder of a run stands for its best checkpoint
    for part in (CONFIG, TOKENIZER):
        if not (folder / part).exists():
            raise CheckpointError(f"{folder} is not a checkpoint of vg: it holds no {part}")
    config = load_checkpoint_config(folder / CONFIG, overrides)
    model = config.model.rebuild()
    model.load_tokenizer(str(folder / TOKENIZER))
    load_weights(model, folder)
    return model.eval(), config


def is_checkpoint(place: str | Path) -> bool:
    """Whether this is the folder of a run or of a checkpoint of vg, complete or not; else it may be another's."""
    return (
        any((Path(place) / part).exists() for part in (CONFIG, "best", WEIGHTS))
        and not (Path(place) / "config.json").exists()
    )


def load_weights(model: GroundingModel, folder: Path) -> None:
    """Load model.safetensors of a checkpoint; raises CheckpointError naming the file and every weight in question."""
    weights = read_weights(folder)
    try:
        model.load_own_state_dict(weights)
    except ValueError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by name; raises CheckpointError where their file is missing or damaged."""
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or was cut short ({error}); use an older checkpoint") from error


def write_training_state(folder: Path, state: dict[str, Any]) -> None:
    torch.save(state, folder / TRAINING)


def read_training_state(folder: Path, name: str = TRAINING) -> dict[str, Any]:
    """Raises CheckpointError where the file is missing or damaged."""
    try:
        return torch.load(folder / name, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot resume from {folder / name}: {error}") from error
