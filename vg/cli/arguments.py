"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vg.errors import ConfigError

if TYPE_CHECKING:
    from vg.config import RunConfig, SavedConfig
    from vg.inference.grounder import Grounder

MODEL_HELP = "folder of a run or checkpoint, a published Grounding DINO, its Hub id, or YAML file with model.weights"


class HelpFormatter(argparse.HelpFormatter):
    """Wraps each paragraph of a description or epilog, and keeps the lines of one with indented lines, an example."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.strip("\n").split("\n\n"):
            is_example = "\n  " in paragraph
            paragraphs.append(paragraph if is_example else super()._fill_text(paragraph, width, indent))
        return "\n\n".join(paragraphs)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the configuration of a run and its overrides."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run, such as configs/demo_rec.yaml")
    add_overrides(parser, "settings of the run, such as optim.lr=1e-4 model.head=dense")


def add_existing(parser: argparse.ArgumentParser, folder: str = "train.output") -> None:
    """Add the ways to train in a folder that already contains a run."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help=f"continue from the newest checkpoint in {folder}")
    group.add_argument("--overwrite", action="store_true", help=f"replace an existing run in {folder}")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the datasets that `read_data` reads."""
    known = "COCO, ODVG, Pascal VOC, YOLO, CSV or shards"
    parser.add_argument("data", metavar="DATA", help=f"YAML file of a run; or a folder or file in {known}")


def add_data_overrides(parser: argparse.ArgumentParser) -> None:
    """Add overrides for `read_data`."""
    of_run, of_data = "data.train.split=val for a YAML file", "image_root=photos otherwise"
    add_overrides(parser, f"settings of the run, such as {of_run}; of the dataset, such as {of_data}")


def add_model_overrides(parser: argparse.ArgumentParser) -> None:
    """Add overrides of a model that is only run; those of data and training would have no effect."""
    add_overrides(parser, "settings of the model, such as model.vision.id=/new/folder", ("data", "optim", "train"))


def add_overrides(parser: argparse.ArgumentParser, about: str, without_effect: Sequence[str] = ()) -> None:
    """Add KEY=VALUE pairs that override values of a configuration.

    Args:
        about: what the keys are, with an example.
        without_effect: sections of the configuration that the verb does not use; `check_overrides` refuses them.
    """
    # "extend" keeps those that WordsAction has found.
    parser.add_argument("overrides", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help=about)
    parser.set_defaults(without_effect=without_effect)


def check_overrides(options: argparse.Namespace) -> None:
    """Raise ConfigError for an override that would have no effect."""
    for override in getattr(options, "overrides", ()):
        if override.partition(".")[0] in options.without_effect:
            raise ConfigError(f"{override} has no effect on vg {options.verb}; leave it out")


def check_writable(output: Path) -> None:
    """Raise ConfigError, before long work, if an output cannot be created below the nearest folder that exists."""
    try:
        tempfile.TemporaryFile(dir=next(folder for folder in output.absolute().parents if folder.exists())).close()
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error.strerror}): choose another path") from error


class WordsAction(argparse.Action):
    """Phrases or images; argparse also collects the overrides among them, which are moved to the overrides."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        overrides = [word for word in values if re.match(r"(model|data|optim|train)\.[\w.]+=", word)]
        words = [word for word in values if word not in overrides]
        if not words:
            raise argparse.ArgumentError(self, f"expected more than {' '.join(values)}")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *words])
        namespace.overrides = [*namespace.overrides, *overrides]


def add_tokenizer(parser: Any) -> None:
    """Add the tokenizer for a checkpoint that does not contain one."""
    about = "BERT tokenizer for a .pth, which contains none: folder or Hub id (default: google-bert/bert-base-uncased)"
    parser.add_argument("--tokenizer", help=about)


def add_runtime(parser: argparse.ArgumentParser, default: str = "the fastest available") -> None:
    """Add the arguments of `open_grounder`, beside the model and its overrides.

    Args:
        default: the device that is used without --device.
    """
    parser.add_argument("--device", help=f"cpu, cuda or mps (default: {default})")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="precision of the network (default: fp32)")
    add_tokenizer(parser)


def open_grounder(options: argparse.Namespace) -> Grounder:
    """Load the model of the command line."""
    from vg.inference.grounder import Grounder

    return Grounder(options.checkpoint, options.device, options.tokenizer, options.overrides, dtype=options.dtype)


def add_prediction(parser: argparse.ArgumentParser) -> None:
    """Add which boxes are selected, and how many images the network takes; `check_prediction` checks the values."""
    add = parser.add_argument
    threshold = (
        "minimum score, 0..1 (default: 0.3 for grounding_dino; for rec the best box of each phrase, or 0.5 if the "
        "model was trained with `objects: any`)"
    )
    add("--threshold", type=float, help=threshold)
    add("--nms", type=float, metavar="IOU", help="drop boxes that overlap more with a better one of their phrase")
    add("--batch-size", type=int, default=8, help="images in a pass of the network (default: %(default)s)")


def check_prediction(options: argparse.Namespace) -> None:
    """Raise ConfigError, before a model is loaded, for a value of `add_prediction` that is out of range."""
    from vg.inference.arguments import check_count, check_fraction

    for name in ("threshold", "nms"):
        if (value := getattr(options, name)) is not None:
            check_fraction(value, f"--{name}")
    check_count(options.batch_size, "--batch-size")


def with_data(config: SavedConfig, path: str | Path) -> RunConfig:
    """Return the configuration of the model at a path; raises ConfigError if it has no datasets to evaluate on."""
    from vg.config import RunConfig

    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{path} is a model without a data config; "
            "add data.train.name=... and data.eval.name=... (both may be the same)"
        )
    return config


def read_data(path: str, overrides: Sequence[str]) -> tuple[RunConfig, bool]:
    """Return the configuration in a YAML file, or one for the datasets found at a path.

    Returns:
        The configuration, and whether the path is a single dataset, which is then both for training and evaluation.
    """
    from vg.config import load_config
    from vg.data.check import detect_format

    found = detect_format(Path(path))
    return (_config_of(found, overrides) if found else load_config(path, overrides)), len(found) == 1


def _config_of(found: Mapping[str, dict[str, Any]], overrides: Sequence[str]) -> RunConfig:
    """A run on the datasets found at a path; each override is a setting of all of them."""
    from yaml import YAMLError

    from vg.config import parse_config
    from vg.settings import parse_yaml

    try:
        changes = {key: parse_yaml(text) for key, _, text in (override.partition("=") for override in overrides)}
    except YAMLError as error:
        raise ConfigError(f"{' '.join(overrides)}: a value is not valid YAML ({error})") from error
    datasets = {split: settings | changes for split, settings in found.items()}
    train, *evaluation = datasets
    evaluated = {split: datasets[split] for split in evaluation or [train]}
    return parse_config({"model": {"name": "grounding_dino"}, "data": {"train": datasets[train], "eval": evaluated}})
