"""vg: train visual-grounding models, which locate the objects that phrases name in an image.

Public names are imported on first use, so that `import vg` and `vg --help` are fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vg.config import load_config
    from vg.finetuning.run import finetune
    from vg.inference.crop import predict_and_crop
    from vg.inference.formats import write_results
    from vg.inference.grounder import Grounder
    from vg.inference.load import load_model
    from vg.inference.result import Result
    from vg.training.trainer import Trainer
    from vg.types import Prediction, Sample

__version__ = "0.1.0"

__all__ = ["Grounder", "Prediction", "Result", "Sample", "Trainer"]
__all__ += ["finetune", "load_config", "load_model", "predict_and_crop", "write_results"]

_MODULES = {
    "Grounder": "vg.inference.grounder",
    "Prediction": "vg.types",
    "Result": "vg.inference.result",
    "Sample": "vg.types",
    "Trainer": "vg.training.trainer",
    "finetune": "vg.finetuning.run",
    "load_config": "vg.config",
    "load_model": "vg.inference.load",
    "predict_and_crop": "vg.inference.crop",
    "write_results": "vg.inference.formats",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vg' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
