"""Configurations: defaults, overrides, the way to YAML and back, and a message for everything one can get wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from vg.config import DataConfig, RunConfig, TrainConfig, dump_config, load_config, parse_config
from vg.data.augment import AugmentConfig
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import ConfigError
from vg.models.rec.config import DenseHeadConfig, DenseLossConfig, PooledHeadConfig, RecConfig
from vg.training.optim import GroupConfig, OptimConfig

MINIMAL: dict[str, Any] = {
    "model": {"name": "rec"},
    "data": {"train": {"name": "shapes"}, "eval": {"name": "shapes", "split": "val"}},
}


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_defaults_are_those_of_the_classes(minimal: Path) -> None:
    config = load_config(minimal)
    data = DataConfig(train=ShapesConfig(), eval=ShapesConfig(split="val"))
    assert config == RunConfig(model=RecConfig(), data=data, optim=OptimConfig(), train=TrainConfig())


def test_overrides(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "optim.lr=1e-3",  # a string to YAML 1.1, a number to us
            "optim.groups.vision.lr=2e-5",
            "optim.clip_norm=null",
            "train.trackers=[]",
            "train.output=runs/a=b",
            "data.augment={flip: 0.5}",
            "data.eval.size=7",
            "model.head=dense",
            "model.head.layers=2",
            "model.head.loss.l1=1",
        ],
    )
    assert config.optim == OptimConfig(lr=1e-3, clip_norm=None, groups={"vision": GroupConfig(lr=2e-5)})
    assert config.train == TrainConfig(output="runs/a=b", trackers=[])
    assert config.data.augment == AugmentConfig(flip=0.5)
    assert config.data.eval == ShapesConfig(split="val", size=7)
    assert config.model.head == DenseHeadConfig(layers=2, loss=DenseLossConfig(l1=1))


def test_no_is_a_precision_although_yaml_reads_false(minimal: Path) -> None:
    assert load_config(minimal, ["train.precision=no"]).train.precision == "no"
    with pytest.raises(ConfigError, match="precision: Input should be"):
        load_config(minimal, ["train.precision=yes"])


def nested(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every dataclass inside a dataclass, with the path to it."""
    found = [((*path, field.name), getattr(value, field.name)) for field in fields(value)]
    found = [(place, inner) for place, inner in found if is_dataclass(inner)]
    return found + [deeper for place, inner in found for deeper in nested(inner, place)]


def default_of(path: tuple[str, ...]) -> Any:
    value: Any = parse_config(MINIMAL)
    for name in path:
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("path", [path for path, _ in nested(parse_config(MINIMAL))], ids=".".join)
def test_changing_one_key_keeps_the_other_defaults(path: tuple[str, ...], minimal: Path) -> None:
    """A nested default that differs from the default of its class would be lost with the first key given below it."""
    default = default_of(path)
    key = next(field.name for field in reversed(fields(default)) if not is_dataclass(getattr(default, field.name)))
    value = yaml.safe_dump(getattr(default, key), width=9999)
    head = ["model.head=pooled"] if "head" in path else []  # a choice of two: its name must be given
    changed = load_config(minimal, [*head, f"{'.'.join(path)}.{key}={value}"])
    assert changed == parse_config(MINIMAL)


def test_round_trip(tmp_path: Path, minimal: Path) -> None:
    overrides = [
        "model.head={name: dense, dropout: 0.2}",
        "model.vision={frozen: false, architecture: {model_type: dinov3_vit, hidden_size: 8}}",
        "optim.groups={vision: {lr: 1e-5}}",
        "optim.betas=[0.8, 0.95]",
        "train.ema=0.999",
        "train.output=runs/größe",
    ]
    for chosen in ([], overrides):
        config = load_config(minimal, chosen)
        path = tmp_path / "dumped.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config
        assert dump_config(load_config(path)) == path.read_text(encoding="utf-8")
    assert config.optim.betas == (0.8, 0.95)
    assert config.model.vision.id is None, "`architecture` stands in for the default id"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optm.lr=1"], "optm: unknown key; did you mean `optim`?"),
        (["optim.learning=1"], "optim.learning: unknown key; "),
        (["optim.warmup_step=1"], "optim.warmup_step: unknown key; did you mean `warmup_steps`?"),
        (["data.train.sise=3"], "data.train.sise: unknown key; did you mean `size`?"),
        (["model.head=pooled", "model.head.widht=3"], "model.head.widht: unknown key; did you mean `width`?"),
        (["model.head=dense", "model.head.loss.gio=3"], "model.head.loss.gio: unknown key; did you mean `giou`?"),
        (["optim.groups.vision.lrr=3"], "optim.groups.vision.lrr: unknown key; did you mean `lr`?"),
        (["zzzzzz=1"], "zzzzzz: unknown key; there are model, data, optim, train"),
        (["__class__=1"], "__class__: unknown key"),
        (
            ["model.head=pooledd"],
            "model.head.name: 'pooledd' is unknown; did you mean `pooled`? there are dense, pooled",
        ),
        (["model.name=recc"], "model.name: 'recc' is unknown; did you mean `rec`?"),
        (["data.train.name=coco3000"], "data.train.name: 'coco3000' is unknown; "),
        (["optim.lr=fast"], "optim.lr: Input should be a valid number"),
        (["data.batch_size=0"], "data.batch_size: Input should be greater than 0"),
        (["data.workers=-1"], "data.workers: Input should be greater than or equal to 0"),
        (["data.bad_samples=ignore"], "data.bad_samples: Input should be 'error' or 'skip'"),
        (["train.precision=fp8"], "train.precision: Input should be 'no', 'bf16' or 'fp16'"),
        (["train.ema=-1"], "train.ema: Input should be greater than 0"),
        (["train.ema=1"], "train.ema: Input should be less than 1"),
        (["train.seed=-1"], "train.seed: Input should be greater than or equal to 0"),
        (["optim.lr=-1"], "optim.lr: Input should be greater than or equal to 0"),
        (["optim.lr=.nan"], "optim.lr: Input should be greater than or equal to 0"),
        (["optim.groups.head.lr=-1"], "optim.groups.head.lr: Input should be greater than or equal to 0"),
        (["optim.clip_norm=0"], "optim.clip_norm: Input should be greater than 0"),
        (["data.augment.flip=5"], "data.augment.flip: Input should be less than or equal to 1"),
        (["train=5"], "train: "),
        (["optim.betas=[0.9]"], "optim.betas.1: Field required"),
        (["optim.groups.vision=3"], "optim.groups.vision: "),
        (["model.head.width=3"], "model.head.name: is missing; there are dense, pooled"),
        (["model.head=dense", "model.head.width=big"], "model.head.width: Input should be a valid integer"),
        (["data.train.split=nope"], "data.train.split: Input should be 'train', 'val' or 'test'"),
        (["model.vision.id=null"], "give `id` (pretrained weights) or `architecture` (random weights)"),
        (["model.text.architecture={hidden_size: 3}"], "`architecture` needs `model_type`"),
        (["optim.lr"], "an override reads key.subkey=value, for example optim.lr=1e-4; got 'optim.lr'"),
        (["=3"], "an override reads key.subkey=value"),
        (["optim.lr=1", "optim.lr.x=3"], "optim.lr.x=3: lr is 1, it has no keys below it"),
        (["optim.betas=[1"], "optim.betas=[1: the value is not valid YAML"),
    ],
)
def test_every_mistake_has_its_message(minimal: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, overrides)
    assert message in str(caught.value)


def test_all_mistakes_are_told_at_once_with_their_origin(minimal: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["optim.lrr=1", "train.epoch=1"])
    assert str(minimal) in str(caught.value)
    assert "optim.lrr: unknown key; did you mean `lr`?" in str(caught.value)
    assert "train.epoch: unknown key; did you mean `epochs`?" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model: Field required"),
        (b"data: {train: {name: shapes}}", "data.eval: Field required"),
        (b"- a\n- b\n", "must hold keys such as `model:` and `data:`, not a list"),
        (b"just words", "not a str"),
        (b"a: [1", "is not valid YAML"),
        (b"a: b: c", "is not valid YAML"),
        (b"1: 2", "1: unknown key"),
        (b"\x80\x04\xff\xfe", "is not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "bad.yaml" in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*: Is a directory"):
        load_config(tmp_path)


def test_heads_by_name() -> None:
    for head in ("pooled", {"name": "pooled"}):
        assert parse_config(MINIMAL | {"model": {"name": "rec", "head": head}}).model.head == PooledHeadConfig()


@pytest.mark.parametrize("module", ["vg", "vg.config", "vg.data", "vg.models"])
def test_torch_is_not_imported(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1]).returncode == 0
