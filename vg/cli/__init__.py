"""The command line: `vg train | eval | predict | finetune | web | export | check | convert | interpolate | ...`.

The functions that run a verb import what they need, so that `vg --help` starts without torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
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
from vg.errors import UserError, out_of_memory, printable
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


class PrintableFormatter(logging.Formatter):
    """Escapes control characters of names from data, see `printable`."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return "\n".join(map(printable, super().formatMessage(record).split("\n")))


def main(arguments: list[str] | None = None) -> None:
    """Run one verb. User errors print one message and exit with status 1, without a traceback."""
    parser = new_parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in options):
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse does not assign overrides that follow an option
        options.overrides += rest
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # Without path and line of code.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    for noisy in ("httpx", "datasets", "accelerate", "albumentations"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    # On a CPU, torch's threads wait for each other by spinning. With the default count, one other busy program makes
    # training ten times slower; with this one, two times. Torch reads it at import.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if options.verb in TRAINING:
        reuse_freed_memory()
    try:
        check_overrides(options)
        if options.verb in COMPUTING and not str(getattr(options, "checkpoint", "")).endswith(".onnx"):  # without torch
            use_fast_products()
        VERBS[options.verb].module.run(options)
        sys.stdout.flush()
    except SystemExit:
        if options.verb in TRAINING:  # stopped and saved; a further signal would only replace the message
            from vg.distributed import ignore_stop_signals

            ignore_stop_signals()
        raise
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            sys.exit(0)
        text = str(error)
        if "Original Traceback" in text:  # a DataLoader adds that of its worker
            text = text.split(f"{type(error).__name__}: ")[-1].strip()
        sys.exit("error: " + "\n".join(map(printable, text.split("\n"))))
    except (RuntimeError, MemoryError) as error:
        from vg.distributed import dead_process
        from vg.workers import dead_worker

        if not (message := dead_worker(error) or dead_process(error) or out_of_memory(error)):
            raise
        sys.exit(f"error: {message}")
    finally:
        if distributed := sys.modules.get("vg.distributed"):  # no process group was made without it
            distributed.shut_down()


def _is_output_closed() -> bool:
    """Whether the reader of standard output has ended, as in `vg config x.yaml | head -1`; the rest is discarded."""
    try:
        print(flush=True)
        return False
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it again at exit
        return True


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
