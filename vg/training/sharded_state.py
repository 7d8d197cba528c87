"""Shards of a training state: safetensors files that every process writes, and that any number of processes reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from vg.checkpoint import SHARDS, TRAINING
from vg.errors import CheckpointError, DamagedCheckpointError
from vg.training.fsdp import like


def split(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """Separate a nested state into one with None for every sharded tensor, and these, by name.

    Names are keys and indices, joined by dots: optimizer.state.3.exp_avg.
    """
    shards = {}

    def take(name: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        shards[name] = value
        return None

    return _replaced(state, take), shards


def write_shards(shards: Mapping[str, DTensor], folder: Path) -> None:
    """Write the shards of this process; all processes must call it, and all raise if one fails.

    Raises:
        CheckpointError: the disk is full or cannot be written to.
    """
    try:
        save(dict(shards), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        rank, failure = next(iter(error.failures.items()))
        raise CheckpointError(
            f"process {rank} could not write its shard of the checkpoint to {folder}: {failure[0]}"
        ) from error


def files_of(folder: Path) -> dict[str, int]:
    """Return the name and the size in bytes of each file of shards in a checkpoint."""
    return {file.name: file.stat().st_size for file in sorted((folder / SHARDS).glob("*.safetensors"))}


def read_shards(folder: Path, state: dict[str, Any], layouts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a state that `split` separated with all of its tensors, distributed as these processes need them.

    Args:
        folder: a checkpoint, perhaps one without shards.
        state: from TRAINING, with the entry "shards": `files_of` when it was written.
        layouts: beginning of a name -> the weight that a tensor is distributed like; others remain None.

    Raises:
        DamagedCheckpointError: a file is missing or damaged.
        CheckpointError: a tensor does not have the shape of its weight.
    """
    shards: dict[str, Tensor] = {}
    if written := state["shards"]:
        if files_of(folder) != written:
            raise DamagedCheckpointError(
                f"cannot resume from {folder / SHARDS}: it must have {len(written)} files, and all complete"
            )
        shards = _read(folder / SHARDS, layouts)

    def place(name: str, value: Any) -> Any:
        layout = _layout(name, layouts)
        return like(value, layout) if isinstance(value, Tensor) and layout is not None else shards.get(name, value)

    return _replaced(state, place)


def _read(folder: Path, layouts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        reader = HuggingFaceStorageReader(str(folder))
        shards = {}
        for name, saved in reader.read_metadata().state_dict_metadata.items():
            layout = _layout(name, layouts)
            if layout is None or not isinstance(saved, TensorStorageMetadata):
                continue
            if saved.size != layout.shape:
                raise CheckpointError(
                    f"{folder.parent / TRAINING} does not match the configuration: {name} is {tuple(saved.size)}, "
                    f"expected {tuple(layout.shape)}"
                )
            shards[name] = torch.empty_like(layout.detach(), dtype=saved.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(shards, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    except (OSError, SafetensorError, CheckpointException) as error:
        raise DamagedCheckpointError(f"cannot resume from {folder}: {error}") from error
    return shards


def _layout(name: str, layouts: Mapping[str, Tensor]) -> Tensor | None:
    """Find the layout of "optimizer.state.3.exp_avg" under "optimizer.state.3"."""
    return layouts.get(name, layouts.get(name.rpartition(".")[0]))


def _replaced(value: Any, replace: Callable[[str, Any], Any], name: str = "") -> Any:
    """Replace everything in nested dicts and lists by `replace(name, value)`."""
    if isinstance(value, dict):
        return {key: _replaced(x, replace, f"{name}.{key}".lstrip(".")) for key, x in value.items()}
    if isinstance(value, list):
        return [_replaced(x, replace, f"{name}.{index}") for index, x in enumerate(value)]
    return replace(name, value)
