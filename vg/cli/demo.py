"""`vg demo`: train, evaluate and draw on synthetic scenes."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vg.cli.arguments import add_existing, add_overrides

if TYPE_CHECKING:
    from vg.data.mixture import SourceConfig

QUICK = [
    "train.minutes=1.5",
    "train.output=runs/demo_quick",
    "data.train.kinds=[attribute, superlative, relation]",  # easier, as is the margin
    "data.train.margin=1.0",
]
SCENE = 3  # index of the sample that is saved: "the red cross" in the README


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "A former demo in its default folder is replaced, with or without --overwrite."
    add_overrides(parser, "settings of the run, such as train.minutes=2 train.output=runs/mine")
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument("--config", help="YAML file (default: the rec family, configs/demo_rec.yaml)")
    recipe.add_argument("--quick", action="store_true", help="train the rec family for 90 seconds, in runs/demo_quick")
    add_existing(parser)


def run(options: argparse.Namespace) -> None:
    """Train, then evaluate: synthetic scenes on their test split, other data as configured in `data.eval`."""
    from accelerate import PartialState

    from vg.cli.evaluate import evaluate
    from vg.config import load_config, recipe_path
    from vg.data.synthetic.world import WorldConfig
    from vg.training.trainer import Trainer

    overrides = [*(QUICK if options.quick else []), *options.overrides]
    config = load_config(options.config or recipe_path("demo_rec.yaml"), overrides)
    Trainer(config, options.resume, options.overwrite or _is_default(config.train.output)).fit()
    overrides = ["data.eval.split=test"] if isinstance(config.data.eval, WorldConfig) else []
    evaluate(Path(config.train.output), overrides, Path(config.train.output))
    if PartialState().is_main_process:
        settings = next(iter(config.data.eval_datasets().values()))
        settings = replace(settings, split="test") if isinstance(settings, WorldConfig) else settings
        _save_scene(settings, Path(config.train.output))


def _is_default(output: str) -> bool:
    """Whether a folder is that of a demo without overrides, which only contains earlier demos."""
    from vg.config import load_config, recipe_path

    recipes = recipe_path("").glob("demo_*.yaml")
    return f"train.output={output}" in QUICK or output in [load_config(path).train.output for path in recipes]


def _save_scene(settings: SourceConfig, folder: Path) -> None:
    """Write an image and its phrases to scene.png and scene.txt, and print the command that grounds them."""
    from PIL import Image

    source = settings.build()
    sample = source.load(min(SCENE, len(source) - 1), epoch=0)
    Image.fromarray(sample.image).save(folder / "scene.png")
    (folder / "scene.txt").write_text("".join(f"{phrase}\n" for phrase in sample.phrases), encoding="utf-8")
    print(f"try: vg predict {shlex.join([str(folder), str(folder / 'scene.png'), *sample.phrases])}")
