"""Load the tensors of a file or folder without running pickled code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vg.errors import CheckpointError, unpickling_problem


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load all tensors of a file, or of all files of a transformers folder; raises CheckpointError."""
    if path.is_dir():
        files = sorted(path.glob("model*.safetensors"))
        if not files:
            raise CheckpointError("the folder contains no model.safetensors")
        return {key: tensor for file in files for key, tensor in load_file(file).items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    stored = _unpickle(path)
    for key in ("model", "state_dict"):
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    tensors = isinstance(stored, dict) and all(isinstance(x, str) and isinstance(y, Tensor) for x, y in stored.items())
    if not tensors or not stored:
        raise CheckpointError("not a checkpoint: neither a dictionary of tensors, nor one as `model` or `state_dict`")
    return stored


class _Inert:
    """Placeholder for all other pickled classes (logs, arguments, optimizers); it ignores its arguments."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _unpickle(file: Path) -> Any:
    """Load a .pth without running its code: tensors and plain values are kept, other objects become `_Inert`."""
    try:
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except ValueError:  # the format before torch 1.6 does not list them
            names = []
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in many ways
        raise CheckpointError(
            f"cannot be loaded: {unpickling_problem(error)}\nUse an intact copy. A file that needs more Python objects "
            "than tensors and plain values is refused, because loading them can run any code."
        ) from error
