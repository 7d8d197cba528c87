"""What the verbs of the command line do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vg.config import PublishedConfig, RunConfig, dump_config, load_config, parse_config
from vg.types import ConfigError

if TYPE_CHECKING:
    from vg.models import ModelConfig
    from vg.models.base import GroundingModel

NUM_DRAWN = 24  # expressions in predictions.png, pictures in pictures.png
THRESHOLD = 0.3  # score that a box needs to be drawn by `vg predict`
PACKAGE = Path(__file__).parent


def run(options: argparse.Namespace) -> None:
    """Run one verb; an error that a user can mend is printed as one message, with exit status 1."""
    verbs: dict[str, Callable[[argparse.Namespace], None]] = {
        "train": train,
        "eval": evaluate,
        "predict": predict,
        "check": check,
        "convert": convert,
        "interpolate": interpolate,
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
    from vg.benchmark.command import benchmark, refuse

    if options.suite:
        benchmark(options)
        return
    refuse(options)
    place = Path(options.checkpoint)
    output = Path(options.output or (Path("runs", place.stem) if place.is_file() else place))
    _evaluate(place, options.overrides, output, options.detections)


def predict(options: argparse.Namespace) -> None:
    from PIL import Image

    from vg.inference.draw import COLOURS, draw_boxes
    from vg.inference.grounder import Grounder, above, to_array

    grounder, image = Grounder(options.checkpoint, options.device), to_array(options.image)
    found = grounder.predict(image, options.phrases)
    threshold = options.threshold if options.threshold is not None else THRESHOLD * grounder.takes_many
    shown = above(found, threshold)
    if not grounder.takes_many:  # one expression names one thing
        shown = replace(shown, boxes=shown.boxes[:1], scores=shown.scores[:1], phrase_ids=shown.phrase_ids[:1])
    names = [shown.phrases[id] for id in shown.phrase_ids.tolist()]
    for name, box, score in zip(names, shown.boxes.tolist(), shown.scores.tolist(), strict=True):
        print(
            f"{name}: left {box[0]:.1f}, top {box[1]:.1f}, right {box[2]:.1f}, bottom {box[3]:.1f}, score {score:.2f}"
        )
    if not names:
        best = f"the best box scores {found.scores[0]:.3g}" if len(found.scores) else "there is no box at all"
        print(f"nothing scores {threshold} or more ({best}); --threshold lowers the bar")
    labels = [f"{name} {score:.2f}" for name, score in zip(names, shown.scores.tolist(), strict=True)]
    colours = [COLOURS[id % len(COLOURS)] for id in shown.phrase_ids.tolist()] or COLOURS
    Image.fromarray(draw_boxes(image, shown.boxes, labels, colours)).save(options.output)
    print(f"drawn in {options.output}")


def check(options: argparse.Namespace) -> None:
    """Exit status 1 where there are errors."""
    from vg.checkpoint import write_json
    from vg.data.doctor import diagnose, recognise, to_json, to_text
    from vg.inference.draw import picture_grid

    if options.quick is not None and options.quick < 1:
        raise ConfigError(f"--quick {options.quick}: read at least one picture of each set")
    places = recognise(Path(options.data))
    config = _config_of(places, options.overrides) if places else load_config(options.data, options.overrides)
    sets = {"train": config.data.train}
    if len(places) != 1:
        sets |= {f"eval.{name}" if name else "eval": each for name, each in config.data.eval_sets().items()}
    count_tokens = _token_counter(config.model)
    diagnosis = diagnose(sets, config.model.max_tokens, count_tokens, options.quick)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "report.json", to_json(diagnosis))
    print(to_text(diagnosis))
    if count_tokens is None:
        print("the tokenizer of the model is not on this machine, so that lengths of prompts are lower bounds")
    written = ["report.json"]
    if pictures := diagnosis.pictures(NUM_DRAWN):
        picture_grid(pictures, 6, output / "pictures.png")
        written.append("pictures.png")
    print(f"written to {output}: {', '.join(written)}")
    if diagnosis.findings.num("error"):
        sys.exit(1)


def _config_of(places: Mapping[str, dict[str, Any]], overrides: Sequence[str]) -> RunConfig:
    """A run on data sets that were found at a path; each override is a setting of all of them."""
    changes = {key: yaml.safe_load(text) for key, _, text in (override.partition("=") for override in overrides)}
    sets = {split: settings | changes for split, settings in places.items()}
    train = next(iter(sets))
    others = {split: settings for split, settings in sets.items() if split != train} or sets
    return parse_config({"model": {"name": "grounding_dino"}, "data": {"train": sets[train], "eval": others}})


def _token_counter(model: ModelConfig) -> Callable[[list[str]], list[int]] | None:
    """Counts the tokens of phrases, if the model's tokenizer is on this machine: nothing is asked of the Hub."""
    from huggingface_hub import try_to_load_from_cache

    from vg.models.encoders import load_tokenizer

    text = model.text
    place = text.tokenizer or text.id
    if place is not None and not Path(place).exists():
        found = (try_to_load_from_cache(place, name) for name in ("tokenizer.json", "vocab.txt"))
        place = next((file for file in found if isinstance(file, str)), None)
        if place is None:
            return None
    tokenizer = load_tokenizer(replace(text, tokenizer=place))
    return lambda phrases: [
        len(ids) for ids in tokenizer(phrases, add_special_tokens=False, verbose=False)["input_ids"]
    ]


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


def interpolate(options: argparse.Namespace) -> None:
    from vg.checkpoint import CheckpointError, replacing
    from vg.distributed import new_accelerator
    from vg.evaluation import Evaluator
    from vg.interpolation import Interpolation, Sweep

    out = Path(options.output)
    if out.exists():
        raise CheckpointError(f"{out} exists; name another place, or remove it first")
    model, config = _model_with_data(Path(options.final), options.overrides)
    initial, _ = _model(Path(options.initial), [])
    mixtures = Interpolation(initial.own_state_dict(), model.own_state_dict())
    if mixtures.added:
        print(f"{options.initial} has no {', '.join(mixtures.added)}: taken from {options.final}")
    accelerator = new_accelerator(mixed_precision=config.train.precision)
    evaluator = Evaluator(config.data, model, accelerator)
    deciding = evaluator.deciding_number(config.train.best_metric)
    sweep = Sweep(model.to(accelerator.device), mixtures, options.weights, evaluator, deciding)
    if accelerator.is_main_process:
        print(sweep)
        with replacing(out) as partial:
            sweep.write(partial, config, model.text_spec.tokenizer)
        print(f"{out}: written, weights {sweep.best['weight']:g} of the way from {options.initial} to {options.final}")


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
    from vg.inference.curves import curves
    from vg.trainer import Trainer

    trainer = Trainer(config, resume, overwrite)
    try:
        trainer.fit()
    finally:
        rows = trainer.folder.history.rows()
        if trainer.accelerator.is_main_process and rows:
            curves(rows, trainer.folder.path / "curves.png")


def _evaluate(checkpoint: Path, overrides: list[str], output: Path, detections: bool = False) -> dict[str, Any]:
    from vg.checkpoint import write_json
    from vg.distributed import new_accelerator
    from vg.evaluation import Evaluator
    from vg.metrics.table import table

    model, config = _model_with_data(checkpoint, overrides)
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


def _model_with_data(checkpoint: Path, overrides: list[str]) -> tuple[GroundingModel, RunConfig]:
    """A model, and the run that says on what it is evaluated."""
    model, config = _model(checkpoint, overrides)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{checkpoint} was converted, so that it names no data to evaluate on; "
            "add data.train.name=... and data.eval.name=... (both may be the same)"
        )
    return model, config


def _model(checkpoint: Path, overrides: list[str]) -> tuple[GroundingModel, PublishedConfig]:
    from vg.checkpoint import read_model

    return (_published if checkpoint.suffix in (".yaml", ".yml") else read_model)(checkpoint, overrides)


def _published(path: Path, overrides: list[str]) -> tuple[GroundingModel, PublishedConfig]:
    """The model of a configuration with the published weights that it names."""
    config = load_config(path, overrides)
    if getattr(config.model, "weights", None) is None:
        raise ConfigError(f"{path}: model.weights names no checkpoint; train first, then name the folder of the run")
    return config.model.build().eval(), config


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
    number = min(NUM_DRAWN, len(data))  # the spacing is no whole number, for kinds of expressions may come in turn
    samples = [data[round(place * (len(data) - 1) / max(1, number - 1))] for place in range(number)]
    predictions = Grounder(model, str(model.device)).predict_samples(samples)
    prediction_grid(list(zip(samples, predictions, strict=True)), 6, path)


def _message(error: Exception) -> str:
    """The message alone; a DataLoader adds the traceback of its worker."""
    text = str(error)
    return text.split(f"{type(error).__name__}: ")[-1].strip() if "Original Traceback" in text else text
