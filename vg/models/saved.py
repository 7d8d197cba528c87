"""Files of a saved model that models read, too: its configuration, weights, and the frozen encoders of its training."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vg.errors import CheckpointError, DamagedCheckpointError
from vg.files import read_json, similar_paths
from vg.hub import loading
from vg.models.settings import ModelSettings

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"
CLASSES = "classes.json"  # only of a model that was trained on classes
YAML = (".yaml", ".yml")  # suffixes
ENCODERS = "frozen_encoders.json"  # only with encoders whose weights are not in WEIGHTS


def best_of(folder: Path) -> Path:
    """Return the best checkpoint of a run, or the folder itself if it is a checkpoint."""
    return folder / "best" if (folder / "best" / WEIGHTS).exists() else folder


def local_path(path: str | Path, revision: str | None = None) -> Path:
    """Return the path, or the folder that a revision of a Hub id was downloaded to; raises CheckpointError."""
    local = Path(path)
    if local.exists():
        if revision is not None:
            raise CheckpointError(f"{path} is a local path, which has no revision {revision!r}; leave it out")
        check_is_model(local)
        return local
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or local.suffix in (".pth", ".pt", ".safetensors"):
        raise CheckpointError("; ".join(filter(None, [f"{path} does not exist", similar_paths(path)])))
    from huggingface_hub import snapshot_download

    with loading(str(path), "the checkpoint, or model.weights", CheckpointError):
        patterns = ["*.json", "*.txt", "*.safetensors", "*.yaml"]
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a run or checkpoint of vg, complete or not, instead of one of another library."""
    files = (CONFIG, "best", WEIGHTS)
    return any((Path(path) / name).exists() for name in files) and not (Path(path) / "config.json").exists()


def check_is_model(path: Path) -> None:
    """Raise CheckpointError for an exported model, and for a file in a run or checkpoint instead of its folder."""
    if path.is_file() and path.suffix in YAML:
        raise CheckpointError(f"{path} is a YAML file, not a model; give the folder of the run, such as {path.parent}")
    if path.is_file() and path.suffix == ".safetensors" and is_checkpoint(path.parent):
        raise CheckpointError(f"{path} has only the weights of a checkpoint; give its folder, {path.parent}")
    if path.is_file() and path.suffix in (".onnx", ".pt2"):
        raise CheckpointError(f"{path} is an exported model; give the run or checkpoint that it was exported from")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by name.

    Raises:
        DamagedCheckpointError: the file is missing or damaged.
        CheckpointError: it cannot be read.
    """
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except SafetensorError as error:
        raise DamagedCheckpointError(
            f"{path} is damaged or was cut short ({error}); use an older checkpoint"
        ) from error


def check_encoders(folder: Path, config: ModelSettings) -> None:
    """Warn if a frozen encoder of `config` is not the one that a checkpoint was trained with.

    Raises:
        DamagedCheckpointError: the file that identifies them is missing or damaged.
    """
    weights = config.frozen_weights()
    if not weights:
        return
    file = folder / ENCODERS
    try:
        trained = read_json(file, dict)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{file} does not exist") from error
    except OSError as error:
        raise DamagedCheckpointError(f"{file} is damaged ({error.strerror}); use an older checkpoint") from error
    for name, now in weights.items():
        before = trained.get(name)
        if not isinstance(before, dict) or not {"id", "weights"} <= before.keys():
            raise DamagedCheckpointError(f"{file} is damaged: {name} has no id and weights; use an older checkpoint")
        if before["weights"] != now["weights"]:
            shown = [f"{x['id']} ({str(x['weights'])[:12]})" for x in (now, before)]
            warnings.warn(
                f"{folder}: model.{name} is {shown[0]}, but the checkpoint was trained with {shown[1]}; unless their "
                f"weights are equal, predictions are wrong. Set model.{name}.id to the encoder of the training",
                stacklevel=3,
            )
