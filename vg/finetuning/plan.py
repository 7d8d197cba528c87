"""From a folder of annotated images to the configuration of a run on them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from vg.config import RunConfig, dump_config, parse_config
from vg.data import DatasetConfig
from vg.data.check import detect_format, diagnose, to_text
from vg.data.detection.annotations import Annotations, ReadsAnnotations
from vg.data.detection.issues import Issues
from vg.data.detection.vocabulary import normalized_name
from vg.data.source import Source, Task
from vg.errors import ConfigError, DataError, printable
from vg.finetuning.recipe import SMALL, Recipe, choose_recipe
from vg.finetuning.sizes import Resources, available_resources, sized
from vg.models.encoders import cached_token_counter
from vg.models.saved import YAML
from vg.settings import differences

NUM_LISTED = 5  # classes without a box that the plan names
NUM_CHECKED = 2000  # images of each dataset that are opened; `vg check` opens all
FRACTION = 0.2  # of the images, for validation
OUTPUT = "train.output="


@dataclass(frozen=True)
class FinetuneSettings:
    """What to fine-tune on, and how: the arguments of `vg.finetuning.run.finetune`, which describes them."""

    folder: str | Path
    model: str | Path | None = None
    phrases: Sequence[str] | Mapping[str, str] | None = None
    images: str | Path | None = None
    output: str | Path | None = None
    lora: bool = False
    tokenizer: str | None = None
    overrides: Sequence[str] = ()

    @property
    def run_folder(self) -> Path:
        """Folder of the run: that of the overrides, or `output`, or one with the name of the data in runs/."""
        data = Path(self.folder).resolve()
        # The file of a YOLO dataset is always named data.yaml.
        named = Path("runs", data.name if data.is_dir() else data.parent.name if data.suffix in YAML else data.stem)
        chosen = [override.removeprefix(OUTPUT) for override in self.overrides if override.startswith(OUTPUT)]
        return Path([str(self.output or named), *chosen][-1]).expanduser()


@dataclass(frozen=True)
class Plan:
    """The configuration of a run, and what was decided for it."""

    config: RunConfig
    notes: list[str]  # a sentence each

    def to_yaml(self) -> str:
        """Return a file for `vg train`: what differs from the defaults, with the decisions as comments."""
        comments = "".join(f"# {line}\n" for note in self.notes for line in printable(note).split("\n"))
        return comments + dump_config(self.config, defaults=False)


def make_plan(settings: FinetuneSettings, resources: Resources | None = None) -> Plan:
    """Find the data in a folder, check it, and choose how to train on it.

    Args:
        resources: of all processes of the run; by default those of this process alone.

    Raises:
        DataError: there is no dataset, or several; or the data has errors, which the message lists.
        ConfigError: unknown overrides or phrases, or a model that cannot learn this data.
        CheckpointError: see `choose_recipe`.
    """
    path = Path(settings.folder)
    if not (found := detect_format(path)):
        raise DataError(f"{path} is the configuration of a run, not data: vg train {shlex.quote(str(path))}")
    data, notes = _data(found, settings.phrases, settings.images)
    of_data = [override for override in settings.overrides if override.startswith("data.")]
    draft = parse_config({"model": {"name": "grounding_dino"}, "data": data}, str(path), of_data)
    first = next(iter(found.values()))
    task: Task = "expressions" if first["name"] == "csv" and not _classes(first) else "detection"
    recipe = choose_recipe(settings.model, task, settings.lora, settings.tokenizer)
    warnings = _check(draft, recipe, path)
    train, *evaluations = (config.build() for config in draft.data.datasets().values())
    counts = " and ".join(map(_count, evaluations))
    notes = [f"data: {_count(train)} to train on, {counts} to evaluate on", *notes, *warnings]
    notes.append(f"model: {recipe.config.model.weights or 'random weights'}; settings of {recipe.title}")
    config, decisions = sized(recipe, len(train), resources or available_resources())
    config = replace(
        config,
        data=replace(config.data, train=draft.data.train, eval=draft.data.eval, drop_overlap=True),
        train=replace(config.train, output=str(settings.run_folder)),
    )
    return Plan(parse_config(differences(config), str(path), settings.overrides), [*notes, *decisions])


def refuse_other_run(config: RunConfig, settings: FinetuneSettings) -> None:
    """Raise ConfigError if a run was not planned with the given settings; those left at their default are its own."""
    data, _ = _data(detect_format(Path(settings.folder)), settings.phrases, settings.images)
    planned, own = data["train"], asdict(config.data.train)
    planned, own = planned.get("dataset", planned), own.get("dataset") or own
    values: dict[str, tuple[Any, ...]] = {"the data": (_absolute(own.get("path")), _absolute(planned["path"]))}
    if settings.images is not None:
        values["--images"] = _absolute(own.get("image_root")), _absolute(str(settings.images))
    if settings.phrases:
        vocabulary = own.get("vocabulary") or {}
        values["--phrases"] = tuple(
            ", ".join(chosen.get("only") or ["all classes"])
            + "".join(f", {name}={phrase}" for name, phrase in (chosen.get("phrases") or {}).items())
            for chosen in (vocabulary, planned["vocabulary"])
        )
    if settings.model is not None:
        weights = str(config.model.weights or SMALL)
        values["--model"] = weights, weights if _same_model(weights, str(settings.model)) else str(settings.model)
    if settings.lora:
        values["--lora"] = ("yes" if config.optim.lora else "no", "yes")
    changed = [f"{name}: {before} in the run, {now} given" for name, (before, now) in values.items() if before != now]
    if changed:
        raise ConfigError(
            f"{config.train.output} is a run with other options ({'; '.join(changed)}): leave out --resume and choose "
            "another --output, or continue with the options of the run"
        )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def _same_model(first: str, second: str) -> bool:
    """Return whether two models are equal; one may be a Hub id and the other the folder it was downloaded to."""
    if SMALL in (first, second):
        return first == second
    in_cache = (
        f"models--{one.replace('/', '--')}" in Path(other).parts for one, other in ((first, second), (second, first))
    )
    return Path(first).resolve() == Path(second).resolve() or any(in_cache)


def _data(
    found: Mapping[str, dict[str, Any]], phrases: Sequence[str] | Mapping[str, str] | None, images: str | Path | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the values of data.train and data.eval for the splits of a folder, and what was decided."""
    first, *rest = found
    notes = []
    datasets = {split: dict(settings) for split, settings in found.items()}
    if images is not None:
        for settings in datasets.values():
            if settings["name"] in ("voc", "yolo"):
                raise ConfigError(f"--images {images}: {settings['path']} names its images; leave the option out")
            settings["image_root"] = str(images)
    if phrases:
        vocabulary, remark = _vocabulary(datasets[first], phrases)
        notes.append(remark)
        for settings in datasets.values():
            settings["vocabulary"] = vocabulary
    if not rest:
        notes.append(
            f"no validation split: about {FRACTION:.0%} of the images are set aside for it, drawn with seed 0, and "
            "stay there when others are added; these are the settings fraction and seed of data.train and data.eval, "
            "which must be the same in both"
        )
        split = {"name": "split", "dataset": datasets[first], "fraction": FRACTION, "seed": 0}
        return {"train": split | {"part": "train"}, "eval": split | {"part": "val"}}, notes
    if rest[1:]:
        notes.append(f"not used: the splits {', '.join(rest[1:])}; evaluate on them at the very end (vg eval)")
    return {"train": datasets[first], "eval": datasets[rest[0]]}, notes


def _vocabulary(settings: dict[str, Any], phrases: Sequence[str] | Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Return the settings for a choice of classes, and which classes are left out: none if all of it is NAME=PHRASE.

    Args:
        settings: of a dataset.
        phrases: names of classes, or NAME=PHRASE; names may differ in case, punctuation and plural.

    Raises:
        ConfigError: the dataset has no classes, or not these.
    """
    names = _classes(settings)
    if not names:
        raise ConfigError(f"--phrases selects classes, but {settings['path']} has none: its phrases are free text")
    chosen = dict(phrases) if isinstance(phrases, Mapping) else {}
    renames_only = bool(chosen) or all("=" in phrase and phrase not in names for phrase in phrases)
    for phrase in () if isinstance(phrases, Mapping) else phrases:
        name, _, renamed = (phrase, "", "") if phrase in names else phrase.partition("=")
        chosen[name] = renamed or name
    only = {}
    for name, phrase in chosen.items():
        matches = [own for own in names if own == name] or [
            own for own in names if normalized_name(own) == normalized_name(name)
        ]
        if len(matches) != 1:
            listed = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
            raise ConfigError(f"--phrases: {name!r} is not one of {listed}; to rename one: {names[0]}=PHRASE")
        only[matches[0]] = phrase
    left_out = [] if renames_only else [name for name in names if name not in only]
    remark = "classes left out, with their boxes: " + ", ".join(left_out) if left_out else "all classes are used"
    other_words = {name: phrase for name, phrase in only.items() if name != phrase}
    return ({} if renames_only else {"only": list(only)}) | {"phrases": other_words}, remark


def _classes(settings: dict[str, Any]) -> list[str]:
    """Return the names of the classes of a dataset; none if its phrases are free text."""
    config = TypeAdapter(DatasetConfig).validate_python(settings)
    annotations = config.read(Issues()) if isinstance(config, ReadsAnnotations) else Annotations()
    return annotations.names[: annotations.num_classes]


def _check(draft: RunConfig, recipe: Recipe, path: Path) -> list[str]:
    """Check the datasets; return the warnings in short, and classes without boxes.

    Raises:
        DataError: there are errors; the message has the report.
    """
    text = recipe.config.model.text
    count_tokens = cached_token_counter(replace(text, tokenizer=recipe.tokenizer or text.tokenizer))
    diagnosis = diagnose(draft.data.datasets(), recipe.config.model.max_tokens, count_tokens, NUM_CHECKED)
    if diagnosis.count("error"):
        advice = f"correct them first (vg check {shlex.quote(str(path))} also draws images)"
        raise DataError(f"{path} has errors; {advice}\n{to_text(diagnosis)}")
    warnings = {issue.what: issue for issue in reversed(diagnosis.issues) if issue.severity == "warning"}
    notes = [
        f"WARNING {issue.dataset}: {what} ({issue.count}), such as {issue.examples[0]}; {issue.fix}"
        for what, issue in reversed(warnings.items())
    ]
    train, found = diagnosis.datasets[0], diagnosis.datasets[0].classes_with_boxes
    if empty := [name for name in train.classes if name not in found]:
        more = f" and {len(empty) - NUM_LISTED} more" if len(empty) > NUM_LISTED else ""
        notes.append(
            f"classes without any box: {', '.join(empty[:NUM_LISTED])}{more}; --phrases with the names of the other "
            "classes leaves them out"
        )
    return notes


def _count(source: Source) -> str:
    if source.provenance.is_detection:
        return f"{len(source):,} images"
    keys = source.image_keys()
    images = "" if keys is None else f" of {len(set(keys)):,} images"
    return f"{len(source):,} expressions{images}"
