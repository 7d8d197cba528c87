"""The command line: `vg train | eval | predict | check | convert | interpolate | cache | config | demo | ops`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

from vg import __version__


def main(arguments: list[str] | None = None) -> None:
    """Run a verb; anything a user can mend ends in one message and exit status 1, not in a traceback."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    if rest:  # overrides after an option, which argparse does not see
        options.overrides += rest
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "accelerate", "albumentations"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    # On a CPU the threads of torch wait for one another by spinning, by default so long that one other busy program on
    # the machine makes training ten times slower; this short, twice. Torch reads it when it is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    from vg.commands import run

    run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vg", description="Find what a sentence names in a picture.")
    parser.add_argument("--version", action="version", version=f"vg {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train what a configuration describes")
    train.add_argument("config", help="YAML file, such as configs/demo_rec.yaml")
    _overrides(train)
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in train.output")
    train.add_argument("--overwrite", action="store_true", help="start anew where train.output holds a run")

    evaluate = verbs.add_parser("eval", help="evaluate a checkpoint and draw its predictions")
    evaluate.add_argument("checkpoint", help="folder of a run or of a checkpoint, or YAML file with model.weights")
    _overrides(evaluate)
    evaluate.add_argument(
        "--output", help="folder for metrics.json and predictions.png (default: that folder, or runs/NAME)"
    )
    evaluate.add_argument("--detections", action="store_true", help="write what was found as COCO results json, too")

    predict = verbs.add_parser("predict", help="find what phrases name in one picture")
    predict.add_argument("checkpoint", help="folder of a run or of a checkpoint")
    predict.add_argument("image", help="path or http(s) URL")
    predict.add_argument("phrases", nargs="+", metavar="PHRASE", help='such as "the man in the red shirt"')
    predict.add_argument("--threshold", type=float, help="leave out boxes that score lower (default: 0.3)")
    predict.add_argument("--output", default="prediction.png", help="picture to write (default: %(default)s)")
    predict.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")

    check = verbs.add_parser("check", help="look through data before training: what is wrong, where, how to mend it")
    check.add_argument("data", help="YAML file of a run, or COCO .json, ODVG .jsonl, Pascal VOC or YOLO folder")
    _overrides(check)
    check.add_argument("--quick", type=int, metavar="N", help="read N pictures of each set (default: all)")
    check.add_argument("--output", default="runs/check", help="folder of pictures and report (default: %(default)s)")

    convert = verbs.add_parser("convert", help="rewrite a checkpoint of Grounding DINO for another implementation")
    convert.add_argument("checkpoint", help=".pth, folder of transformers or vg, or Hub id; which, is recognised")
    convert.add_argument("output", help=".pth (official, mmdet) or folder (transformers, vg) to write")
    convert.add_argument("--to", required=True, choices=["official", "transformers", "mmdet", "vg"], help="dialect")
    convert.add_argument("--tokenizer", help="folder or id of BERT, for a .pth has no vocabulary (default: its Hub id)")

    mix = verbs.add_parser(
        "interpolate", help="mix the weights before and after fine-tuning, and keep the best mixture"
    )
    mix.add_argument("initial", help="checkpoint before: a folder, or a YAML file whose model.weights names it")
    mix.add_argument("final", help="checkpoint after, whose data.eval decides; a folder of a run or of a checkpoint")
    _overrides(mix)
    mix.add_argument(
        "--weights",
        nargs="+",
        action=_Shares,
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="W",
        help="shares of the final weights (default: 0 .25 .5 .75 1)",
    )
    mix.add_argument("--output", required=True, help="folder of the checkpoint to write")

    cache = verbs.add_parser("cache", help="run frozen encoders once and write their features to data.cache.folder")
    cache.add_argument("config", help="YAML file that will be trained, such as configs/rec/refcoco_cached.yaml")
    _overrides(cache)

    config = verbs.add_parser("config", help="print a configuration with every default and override")
    config.add_argument("config", help="YAML file")
    _overrides(config)

    demo = verbs.add_parser("demo", help="train, evaluate and draw on the embedded pictures, in minutes on a CPU")
    _overrides(demo)
    demo.add_argument("--config", help="YAML file (default: the rec family, configs/demo_rec.yaml)")

    verbs.add_parser("ops", help="print which kernels run on this machine and why; builds them if that is due")
    _suite(evaluate)
    return parser


class _Shares(argparse.Action):
    """Numbers from 0 to 1; overrides behind them, which argparse takes for more of them, go where they belong."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        try:
            shares = [float(value) for value in values if "=" not in value]
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise argparse.ArgumentError(self, f"{' '.join(values)}: numbers from 0 to 1 are needed")
        setattr(namespace, self.dest, shares)
        namespace.overrides += [value for value in values if "=" in value]


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optim.lr=1e-4 model.head=dense")


def _suite(evaluate: argparse.ArgumentParser) -> None:
    about = "evaluate a checkpoint of any dialect (.pth, folder, Hub id) on a benchmark, not on the data of its run"
    suite = evaluate.add_argument_group("suites", about)
    suite.add_argument("--suite", choices=["refcoco"], help="writes benchmark.json and benchmark.html to --output")
    suite.add_argument("--data", help="folder with its data sets (default: they come from the Hub)")
    suite.add_argument("--images", help="folder of COCO's train2014 pictures, for annotations without pixels")
    suite.add_argument("--sets", help="such as refcoco,refcoco+,refcocog,grefcoco (default: the first three)")
    suite.add_argument("--splits", help="such as val,testA (default: all there are)")
    suite.add_argument("--limit", type=int, help="only so many expressions of each split, for a quick look")
    suite.add_argument("--batch-size", type=int, help="expressions at a time (default: 32)")
    suite.add_argument("--workers", type=int, help="processes that read pictures (default: 2)")
    suite.add_argument("--precision", choices=["no", "bf16", "fp16"], help="(default: no)")
    suite.add_argument("--tokenizer", help="folder or id of BERT, for a .pth has no vocabulary (default: its Hub id)")


if __name__ == "__main__":
    main()
