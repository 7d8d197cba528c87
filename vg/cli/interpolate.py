"""`vg interpolate`: mix the weights before and after fine-tuning (WiSE-FT)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vg.cli.arguments import MODEL_HELP, add_overrides, add_tokenizer, check_writable, with_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("initial", type=Path, metavar="INITIAL", help=f"before: {MODEL_HELP}")
    after = "after: a model like INITIAL; data.eval of its run selects the best mixture"
    parser.add_argument("final", type=Path, metavar="FINAL", help=after)
    add_overrides(parser, "settings of that run, such as data.eval.split=val", ("optim",))
    parser.add_argument(
        "--weights",
        nargs="+",
        action=_Weights,
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="W",
        help="weights of the final checkpoint (default: 0 .25 .5 .75 1)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint to write")
    add_tokenizer(parser)


class _Weights(argparse.Action):
    """Values in 0..1; argparse also collects the overrides after them, which are moved to the overrides."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        try:
            weights = [float(value) for value in values if "=" not in value]
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        if not weights or not all(0 <= weight <= 1 for weight in weights):
            raise argparse.ArgumentError(self, f"expected values in 0..1, got {' '.join(values)}")
        setattr(namespace, self.dest, weights)
        namespace.overrides = [*namespace.overrides, *(value for value in values if "=" in value)]


def run(options: argparse.Namespace) -> None:
    from vg.checkpoint import new_checkpoint
    from vg.distributed import new_accelerator
    from vg.errors import CheckpointError, ConfigError
    from vg.evaluation.evaluator import Evaluator
    from vg.inference.load import open_model
    from vg.models.saved import YAML
    from vg.training.interpolation import Interpolation, Sweep

    if options.output.exists():
        raise CheckpointError(f"{options.output} exists; choose another path, or remove it first")
    check_writable(options.output)
    tokenizers = [
        options.tokenizer if path.is_file() and path.suffix not in YAML else None  # the others contain theirs
        for path in (options.initial, options.final)
    ]
    if options.tokenizer is not None and not any(tokenizers):
        raise ConfigError(f"--tokenizer {options.tokenizer}: both models contain their tokenizer; leave the option out")
    model, saved, *_ = open_model(options.final, tokenizers[1], options.overrides)
    config = with_data(saved, options.final)
    initial = open_model(options.initial, tokenizers[0]).model
    mixtures = Interpolation(initial.own_state_dict(), model.own_state_dict())
    if mixtures.added:
        print(f"{options.initial} has no {', '.join(mixtures.added)}: taken from {options.final}")
    accelerator = new_accelerator(mixed_precision=config.train.precision)
    evaluator = Evaluator(config.data, model, accelerator, config.train.best_metric)
    sweep = Sweep(model.to(accelerator.device), mixtures, options.weights, evaluator)
    if accelerator.is_main_process:
        print(sweep)
        with new_checkpoint(options.output) as partial:
            sweep.write(partial, config, model)
        print(f"{options.output}: written, weight {sweep.best_weight:g} between {options.initial} and {options.final}")
