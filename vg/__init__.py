"""vg: train visual-grounding models, which locate the objects that phrases name in an image.

Public names are imported on first use, so that `import vg` and `vg --help` are fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vg.config import load_config
    from vg.inference.grounder import Grounder, load_model, predict_and_crop
    from vg.training.trainer import Trainer
    from vg.types import Prediction, Sample

__version__ = "0.1.0"

__all__ = ["Grounder", "Prediction", "Sample", "Trainer", "load_config", "load_model", "predict_and_crop"]

_MODULES = {
    "Grounder": "vg.inference.grounder",
    "Prediction": "vg.types",
    "Sample": "vg.types",
    "Trainer": "vg.training.trainer",
    "load_config": "vg.config",
    "load_model": "vg.inference.grounder",
    "predict_and_crop": "vg.inference.grounder",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vg' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
