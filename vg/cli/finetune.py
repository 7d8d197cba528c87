"""`vg finetune`: train on a folder of annotated images, without a configuration."""

from __future__ import annotations

import argparse

from vg.cli.arguments import WordsAction, add_existing, add_overrides, add_tokenizer

EPILOG = """
FOLDER has images with boxes in COCO json, Pascal VOC, YOLO or ODVG, or a CSV or jsonl with the columns image, phrase
(or class) and left, top, right, bottom. Without a validation split, about a fifth of the images becomes one. The plan
is printed before training; it is a configuration for vg train (--dry-run > plan.yaml).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="folder of annotated images, or the file with the annotations")
    add_overrides(parser, "settings of the plan, such as train.max_steps=100 optim.lr=1e-5")
    add("--model", help='run, .pth, folder or Hub id to start from, or "small" (default: Grounding DINO Swin-T)')
    phrases = "train only on these classes (default: all); NAME=PHRASE renames one, and on its own leaves out no class"
    add("--phrases", nargs="+", action=WordsAction, metavar="PHRASE", help=phrases)
    add("--images", metavar="DIR", help="folder of the images, if they are not where the annotations are")
    add("--output", help="folder of the run (default: runs/NAME of the folder)")
    add("--lora", action="store_true", help="train low-rank adapters, which needs less memory")
    add("--dry-run", action="store_true", help="only check the data and print the plan on standard output")
    add_existing(parser, "--output")
    add_tokenizer(parser)


def run(options: argparse.Namespace) -> None:
    from vg.finetuning.plan import FinetuneSettings
    from vg.finetuning.run import finetune, shared_plan

    chosen = {name: getattr(options, name) for name in FinetuneSettings.__dataclass_fields__}
    if options.dry_run:
        shared_plan(FinetuneSettings(**chosen))
    else:
        finetune(**chosen, resume=options.resume, overwrite=options.overwrite)
