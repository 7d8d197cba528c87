"""Getting at the tensors of a file or folder from anywhere, without running any code that a file may carry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vg.errors import CheckpointError


def local_path(path: str | Path) -> Path:
    """The path, or the folder that a Hub id was downloaded to."""
    place = Path(path)
    if place.exists():
        return place
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or place.suffix in (".pth", ".pt", ".safetensors"):
        raise CheckpointError(f"{path} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except Exception as error:  # no network, no such id, no access: each has a class of its own
        raise CheckpointError(f"{path} is neither a file or folder here nor an id on the Hub: {error}") from error


def load_tensors(place: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the files of a folder of transformers; raises CheckpointError."""
    if place.is_dir():
        files = sorted(place.glob("model*.safetensors"))
        if not files:
            raise CheckpointError("the folder holds no model.safetensors")
        return {key: tensor for file in files for key, tensor in load_file(file).items()}
    if place.suffix == ".safetensors":
        return load_file(place)
    stored = _unpickle(place)
    for key in ("model", "state_dict"):
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()) or not stored:
        raise CheckpointError("no checkpoint: it holds no dictionary of tensors, nor one as `model` or `state_dict`")
    return stored


class _Inert:
    """Stands in for whatever is pickled beside the weights (logs, arguments, optimisers), and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _unpickle(file: Path) -> Any:
    """Load a .pth without running any code of it: only tensors and plain values come back, the rest is inert."""
    try:
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except ValueError:  # a file of before torch 1.6 does not tell
            names = []
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in many ways
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise CheckpointError(
            f"cannot be loaded: {reason}\nIf the file is whole and you trust who made it, keep only its weights: "
            "python -c \"import torch; x = torch.load('IN.pth', map_location='cpu', weights_only=False); "
            "torch.save({'model': x.get('model', x.get('state_dict'))}, 'OUT.pth')\""
        ) from error
