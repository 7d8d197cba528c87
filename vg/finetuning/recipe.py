"""The model that is fine-tuned and how it is trained: the recipes of configs/, or those of the run to continue from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vg.checkpoint import TOKENIZER
from vg.config import RunConfig, load_config, load_saved_config, recipe_path
from vg.data.source import Task
from vg.errors import ConfigError
from vg.models.grounding_dino.checkpoints import read_checkpoint
from vg.models.grounding_dino.config import BertConfig, ClassHeadConfig, GroundingDinoConfig, PredictConfig
from vg.models.rec.config import RecConfig
from vg.models.saved import CONFIG, best_of, is_checkpoint, local_path
from vg.training.settings import TrainConfig

SMALL = "small"
DEFAULT = "IDEA-Research/grounding-dino-tiny"
OWN, LORA, EXPRESSIONS, REC = (
    f"{name}.yaml"
    for name in (
        "grounding_dino/finetune_own",
        "grounding_dino/finetune_lora",
        "grounding_dino/finetune_refcoco_mm_t",
        "rec/refcoco_dense",
    )
)


@dataclass(frozen=True)
class Recipe:
    """Settings of a run, whose data and length are not those of the folder yet."""

    config: RunConfig
    title: str  # what the settings are from
    epochs: int  # unless the dataset is small or large
    steps: int  # fewer are not enough, however small the data
    evaluations: int  # the upper limit of their number
    tokenizer: str | None = None  # where it is, if not in the settings of the model


def choose_recipe(model: str | Path | None, task: Task, lora: bool, tokenizer: str | None) -> Recipe:
    """Return the recipe for a model and a task.

    Args:
        model: "small", a run or checkpoint of vg, or a Grounding DINO of any format; None for DEFAULT.
        lora: train adapters, see configs/grounding_dino/finetune_lora.yaml.
        tokenizer: see `vg.inference.load.load_model`.

    Raises:
        ConfigError: the model cannot learn the task, or has no recipe with adapters.
        CheckpointError: the model does not exist, or is damaged.
    """
    expressions = task == "expressions"
    pretrained = _pretrained_recipe(expressions, lora)
    if model is None or str(model) == DEFAULT:
        return pretrained
    if str(model) == SMALL:
        return _without_lora(lora, _small_recipe(expressions))
    path = local_path(model)
    if is_checkpoint(path):
        return _without_lora(lora, _recipe_of_run(path, pretrained, expressions))
    found = read_checkpoint(path)
    text = found.config.text
    if text.tokenizer is None and (tokenizer or found.tokenizer is None):
        text = replace(text, tokenizer=tokenizer or BertConfig().id)
    settings = pretrained.config.model
    assert isinstance(settings, GroundingDinoConfig)
    classes = found.config.classes
    if classes == ClassHeadConfig():  # as mmdetection fine-tunes official weights; others have a scale already
        classes = settings.classes
    network = replace(
        found.config,
        weights=str(model),
        text=text,
        classes=classes,
        shared_heads=settings.shared_heads,
        fusion_dropout=settings.fusion_dropout,
        fusion_drop_path=settings.fusion_drop_path,
        gradient_checkpointing=settings.gradient_checkpointing,
        denoising=settings.denoising,
        predict=settings.predict,
    )
    return replace(pretrained, config=replace(pretrained.config, model=network), tokenizer=found.tokenizer)


def _pretrained_recipe(expressions: bool, lora: bool) -> Recipe:
    """The recipe for published weights."""
    name = LORA if lora else OWN
    config = load_config(recipe_path(name), [f"model.weights={DEFAULT}"])
    if not expressions:
        return Recipe(config, f"configs/{name}", config.train.epochs, 180, 20)
    found = load_config(recipe_path(EXPRESSIONS))
    assert isinstance(found.model, GroundingDinoConfig)
    assert isinstance(config.model, GroundingDinoConfig)
    config = replace(
        config,
        model=replace(config.model, predict=found.model.predict),
        data=replace(config.data, augment=found.data.augment),
        train=replace(config.train, best_metric=found.train.best_metric),
    )
    if lora:
        return Recipe(config, f"configs/{name}", config.train.epochs, 180, 20)
    accumulate = (found.optim.batch_size or 1) // config.data.batch_size  # for one process
    train = replace(config.train, epochs=found.train.epochs, accumulate=accumulate)
    config = replace(config, optim=found.optim, train=train)
    return Recipe(config, f"configs/{EXPRESSIONS}", found.train.epochs, 180, 20)


def _small_recipe(expressions: bool) -> Recipe:
    """The recipe for random weights, which also fits a CPU."""
    config = load_config(recipe_path("own_small.yaml"))
    steps = config.train.max_steps or 0
    config = replace(config, train=replace(config.train, max_steps=None))
    assert isinstance(config.model, GroundingDinoConfig)
    if expressions:
        config = replace(config, model=replace(config.model, predict=PredictConfig(score="max")))
    return Recipe(config, "configs/own_small.yaml", 20, steps, 4)


def _recipe_of_run(path: Path, pretrained: Recipe, expressions: bool) -> Recipe:
    """The settings with which a run of vg was trained; those of `pretrained` for a converted checkpoint."""
    folder = best_of(path)
    found = load_saved_config(folder / CONFIG)
    if found.model.name == "rec" and not expressions:
        raise ConfigError(
            f"{path} is a rec model, which finds one box for one expression; the data has boxes of classes: use a "
            "Grounding DINO, or a table of expressions"
        )
    if not isinstance(found.model, RecConfig | GroundingDinoConfig):
        raise ConfigError(
            f"{path}: the family {found.model.name} cannot be fine-tuned; use vg train on a configuration"
        )
    model = replace(found.model, weights=str(path))
    tokenizer = str(folder / TOKENIZER)
    if not isinstance(found, RunConfig):
        base = load_config(recipe_path(REC)) if found.model.name == "rec" else pretrained.config
        return replace(pretrained, config=replace(base, model=model), tokenizer=tokenizer)
    train = TrainConfig(
        epochs=found.train.epochs,
        accumulate=found.train.accumulate,
        precision=found.train.precision,
        ema=found.train.ema,
        seed=found.train.seed,
    )
    config = replace(found, model=model, train=train, data=replace(found.data, cache=None))
    return Recipe(config, f"the run {path}", 10, 180, 20, tokenizer)


def _without_lora(lora: bool, recipe: Recipe) -> Recipe:
    if lora:
        raise ConfigError("adapters (LoRA) are for published Grounding DINO weights: leave out --lora, or the model")
    return recipe
