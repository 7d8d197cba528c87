"""The command line: `vg train | eval | predict | finetune | web | export | check | convert | interpolate | ...`.

The functions that run a verb import what they need, so that `vg --help` starts without torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from types import ModuleType
from typing import NamedTuple

from vg import __version__
from vg.cli import (
    cache,
    check,
    config,
    convert,
    demo,
    evaluate,
    export,
    finetune,
    interpolate,
    label,
    ops,
    predict,
    shard,
    table,
    train,
    web,
)
from vg.cli.arguments import HelpFormatter, check_overrides
from vg.cli.messages import set_up_messages, short_errors
from vg.machine import reuse_freed_memory, use_fast_products


class Verb(NamedTuple):
    help: str
    module: ModuleType  # with add_arguments(parser) and run(options)
    example: str  # arguments


VERBS = {
    "train": Verb("train a model", train, "configs/demo_rec.yaml optim.lr=3e-4 train.output=runs/mine"),
    "finetune": Verb("train on a folder of annotated images", finetune, "raccoons --model small"),
    "eval": Verb("evaluate a checkpoint and draw its predictions", evaluate, "runs/demo data.eval.split=test"),
    "table": Verb(
        "tabulate benchmark results for a paper: LaTeX, markdown, CSV",
        table,
        "runs/refcoco runs/refcoco_1 --output paper.tex",
    ),
    "predict": Verb("ground phrases in images", predict, 'runs/demo runs/demo/scene.png "the red cross"'),
    "label": Verb(
        "label any number of images with a model, to train on", label, 'runs/detector photos labels -p dog "red car"'
    ),
    "web": Verb("serve a page on which a model can be tried", web, "runs/demo"),
    "check": Verb("validate a dataset before training and suggest fixes", check, "raccoons --quick 100"),
    "shard": Verb(
        "write a dataset as WebDataset tar or parquet",
        shard,
        "raccoons/train.json shards/raccoons image_root=raccoons/images",
    ),
    "convert": Verb(
        "convert a Grounding DINO checkpoint to another format",
        convert,
        "groundingdino_swint_ogc.pth swin_t --to transformers",
    ),
    "export": Verb(
        "write a model as ONNX, or for torch.export, and compare it with PyTorch", export, "runs/demo demo.onnx"
    ),
    "interpolate": Verb(
        "mix weights before and after fine-tuning", interpolate, "runs/before runs/after --output runs/mixed"
    ),
    "cache": Verb(
        "run frozen encoders once and write their features to data.cache.folder",
        cache,
        "configs/rec/refcoco_cached.yaml",
    ),
    "config": Verb(
        "print a configuration with all defaults, or the memory it needs",
        config,
        "configs/demo_rec.yaml model.head=pooled",
    ),
    "demo": Verb("train, evaluate and draw on synthetic scenes, in minutes", demo, "--quick"),
    "ops": Verb("print which kernels run on this machine and why; build them if needed", ops, ""),
}
TRAINING = ("train", "finetune", "demo")
COMPUTING = (*TRAINING, "cache", "eval", "export", "interpolate", "label", "predict", "web")


def main(arguments: list[str] | None = None) -> None:
    """Run one verb. User errors print one message and exit with status 1, without a traceback."""
    options = parse(arguments)
    set_up_messages()
    # On a CPU, torch's threads wait for each other by spinning. With the default count, one other busy program makes
    # training ten times slower; with this one, two times. Torch reads it at import.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if options.verb in TRAINING:
        reuse_freed_memory()
    with short_errors(trains=options.verb in TRAINING):
        check_overrides(options)
        if options.verb in COMPUTING and not str(getattr(options, "checkpoint", "")).endswith(".onnx"):  # without torch
            use_fast_products()
        VERBS[options.verb].module.run(options)
        sys.stdout.flush()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 if it is wrong."""
    options, rest = new_parser().parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in options):
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse does not assign overrides that follow an option
        options.overrides += rest
    return options


def new_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; `verb` is the key of VERBS, `parser` the parser of that verb."""
    parser = argparse.ArgumentParser(prog="vg", description="Train and run models that ground phrases in images.")
    parser.add_argument("--version", action="version", version=f"vg {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        about = f"{verb.help[0].upper()}{verb.help[1:]}."
        subparser = subparsers.add_parser(name, help=verb.help, description=about, formatter_class=HelpFormatter)
        subparser.set_defaults(parser=subparser)  # whose usage belongs to errors that `main` finds
        verb.module.add_arguments(subparser)
        example = f"example:\n  vg {name} {verb.example}".rstrip()
        subparser.epilog = "\n\n".join(filter(None, [(subparser.epilog or "").strip(), example]))
    return parser
