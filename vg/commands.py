"""What the verbs of the command line do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vg.config import PublishedConfig, RunConfig, dump_config, load_config
from vg.types import ConfigError

if TYPE_CHECKING:
    from vg.models.base import GroundingModel

NUM_DRAWN = 24  # expressions in predictions.png
PACKAGE = Path(__file__).parent


def run(options: argparse.Namespace) -> None:
    """Run one verb; an error that a user can mend is printed as one message, with exit status 1."""
    verbs: dict[str, Callable[[argparse.Namespace], None]] = {
        "train": train,
        "eval": evaluate,
        "predict": predict,
        "convert": convert,
        "cache": cache,
        "config": show_config,
        "demo": demo,
        "ops": show_ops,
    }
    try:
        verbs[options.verb](options)
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    except (ValueError, RuntimeError) as error:
        from vg.checkpoint import CheckpointError
        from vg.data.source import DataError
        from vg.ops.build import BuildError
        from vg.trainer import TrainingError

        if not isinstance(error, (BuildError, CheckpointError, DataError, TrainingError)):
            raise
        sys.exit(f"error: {_message(error)}")
    finally:
        if "torch" in sys.modules:  # `vg config` does without
            from vg.distributed import leave

            leave()


def train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    _train(config, options.resume, options.overwrite)


def evaluate(options: argparse.Namespace) -> None:
    output = Path(options.output or options.checkpoint)
    _evaluate(Path(options.checkpoint), options.overrides, output, options.detections)


def predict(options: argparse.Namespace) -> None:
    from PIL import Image

    from vg.inference.crop import predict_and_crop

    _, box, drawn = predict_and_crop(options.image, options.expression, options.checkpoint, options.device)
    Image.fromarray(drawn).save(options.output)
    print(f"{options.expression}: left {box[0]:.1f}, top {box[1]:.1f}, right {box[2]:.1f}, bottom {box[3]:.1f}")
    print(f"drawn in {options.output}")


def cache(options: argparse.Namespace) -> None:
    from vg.caching import build_cache

    build_cache(load_config(options.config, options.overrides))


def convert(options: argparse.Namespace) -> None:
    from vg.checkpoint import CheckpointError, replacing, write_weights
    from vg.models.grounding_dino.checkpoints import bert_settings, open_tokenizer, read_checkpoint, write_checkpoint

    out = Path(options.output)
    if out.exists():
        raise CheckpointError(f"{out} exists; name another place, or remove it first")
    checkpoint = read_checkpoint(options.checkpoint, bert_settings(options.tokenizer))
    print(f"{options.checkpoint}: {checkpoint}")
    is_file = options.to in ("official", "mmdet")
    tokenizer = None if is_file else open_tokenizer(checkpoint, options.tokenizer)
    with replacing(out, is_file) as partial:
        if options.to == "vg":
            write_weights(partial, checkpoint.weights, PublishedConfig(checkpoint.config), tokenizer)
        else:
            write_checkpoint(checkpoint.weights, checkpoint.config, tokenizer, partial, options.to)
    print(f"{out}: written in the {options.to} dialect")


def show_config(options: argparse.Namespace) -> None:
    print(dump_config(load_config(options.config, options.overrides)), end="")


def demo(options: argparse.Namespace) -> None:
    inside = PACKAGE / "configs"  # in a wheel; in a checkout the folder lies beside the package
    folder = inside if inside.exists() else PACKAGE.parent / "configs"
    config = load_config(options.config or folder / "demo_rec.yaml", options.overrides)
    _train(config, resume=False, overwrite=True)
    _evaluate(Path(config.train.output), ["data.eval.split=test"], Path(config.train.output))


def show_ops(options: argparse.Namespace) -> None:
    from vg.ops import backend_info

    for device, backend in backend_info().items():
        print(f"deform_attn on {device}: {backend.name} ({backend.reason})")


def _train(config: RunConfig, resume: bool, overwrite: bool) -> None:
    from vg.inference.draw import curves
    from vg.trainer import Trainer

    trainer = Trainer(config, resume, overwrite)
    try:
        trainer.fit()
    finally:
        rows = trainer.folder.history.rows()
        if trainer.accelerator.is_main_process and rows:
            curves(rows, trainer.folder.path / "curves.png")


def _evaluate(checkpoint: Path, overrides: list[str], output: Path, detections: bool = False) -> dict[str, Any]:
    from vg.checkpoint import read_model, write_json
    from vg.distributed import new_accelerator
    from vg.evaluation import Evaluator
    from vg.metrics.table import table

    model, config = read_model(checkpoint, overrides)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{checkpoint} was converted, so that it names no data to evaluate on; "
            "add data.train.name=... and data.eval.name=... (both may be the same)"
        )
    accelerator = new_accelerator(mixed_precision=config.train.precision)
    evaluator = Evaluator(config.data, model, accelerator)
    results = {"checkpoint": str(checkpoint), **evaluator.run(model.to(accelerator.device))}
    found = evaluator.detections() if detections else {}  # a set's name -> its rows
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "metrics.json", results)
        for name, rows in found.items():
            (output / f"detections{name and '_'}{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        print(table(results))
        _draw(model, config, evaluator, output / "predictions.png")
        print(f"written to {output}: metrics.json, predictions.png")
    return results


def _draw(model: GroundingModel, config: RunConfig, evaluator: Any, path: Path) -> None:
    """A grid of samples, evenly spaced over the data."""
    from vg.data.dataset import GroundingDataset
    from vg.inference.draw import prediction_grid
    from vg.inference.grounder import Grounder

    data = evaluator.sets[0].data
    if config.data.cache:  # which has no pixels to draw on
        data = GroundingDataset(
            next(iter(config.data.eval_sets().values())).build(), bad_samples=config.data.bad_samples
        )
    samples = [data[index] for index in range(0, len(data), max(1, len(data) // NUM_DRAWN))][:NUM_DRAWN]
    predictions = Grounder(model, str(model.device)).predict_samples(samples)
    prediction_grid(list(zip(samples, predictions, strict=True)), 6, path)


def _message(error: Exception) -> str:
    """The message alone; a DataLoader adds the traceback of its worker."""
    text = str(error)
    return text.split(f"{type(error).__name__}: ")[-1].strip() if "Original Traceback" in text else text
