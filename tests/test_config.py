"""Configurations: defaults, bases, overrides, the round trip to YAML, and messages for mistakes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from vg.config import DataConfig, RunConfig, dump_config, load_config, parse_config
from vg.data.augment import AugmentConfig
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import ConfigError
from vg.models.rec.config import DenseHeadConfig, DenseLossConfig, PooledHeadConfig, RecConfig
from vg.training.optim import GroupConfig, OptimConfig
from vg.training.settings import TrainConfig

MINIMAL: dict[str, Any] = {
    "model": {"name": "rec"},
    "data": {"train": {"name": "shapes"}, "eval": {"name": "shapes", "split": "val"}},
}


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_defaults_come_from_the_dataclasses(minimal: Path) -> None:
    config = load_config(minimal)
    data = DataConfig(train=ShapesConfig(), eval=ShapesConfig(split="val"))
    assert config == RunConfig(model=RecConfig(), data=data, optim=OptimConfig(), train=TrainConfig())
    assert data.datasets() == {"train": data.train, "eval": data.eval}


def test_overrides(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "optim.lr=1e-3",  # a string in YAML 1.1
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


def test_one_override_instead_of_a_list(minimal: Path) -> None:
    assert load_config(minimal, "train.seed=3") == load_config(minimal, ["train.seed=3"])
    assert parse_config(MINIMAL, overrides="train.seed=3").train.seed == 3


def test_text_that_yaml_1_1_reads_as_another_number(minimal: Path) -> None:
    changes = ["train.seed=010", "train.output='010'", "data.train.size=1_000", "data.cache.folder=1:30"]
    config = load_config(minimal, changes)
    assert (config.train.seed, config.train.output, config.data.train.size) == (10, "010", 1000)
    assert config.data.cache.folder == "1:30"
    for name in ("no", "on", "null", "~", "007"):
        assert list(load_config(minimal, [f"data.eval={{{name}: {{name: shapes}}}}"]).data.eval_datasets()) == [name]
    path = minimal.with_name("dumped.yaml")
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_the_home_folder_in_paths(tmp_path: Path, minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"train": {"output": "~/run"}, "data": {"train": {"name": "coco", "path": "~/a.json"}}}
    path = write(tmp_path / "own.yaml", {"base": "~/minimal.yaml", **values})
    config = load_config(path, ["data.cache.folder=~/cache", "model.vision.id=~/dino", "train.trackers=[a~/b]"])
    assert config.train.output == str(tmp_path / "run")
    assert config.data.train.path == str(tmp_path / "a.json")
    assert config.data.cache.folder == str(tmp_path / "cache")
    assert config.model.vision.id == str(tmp_path / "dino")
    assert config.train.trackers == ["a~/b"]


def test_overrides_below_null(tmp_path: Path, minimal: Path) -> None:
    """`vg config` prints all options, null where they are off."""
    (tmp_path / "full.yaml").write_text(dump_config(load_config(minimal)))
    config = load_config(tmp_path / "full.yaml", ["data.cache.folder=cache", "train.output=x"])
    assert config.data.cache is not None
    assert config.data.cache.folder == "cache"


def test_precision_no_although_yaml_reads_it_as_false(minimal: Path) -> None:
    assert load_config(minimal, ["train.precision=no"]).train.precision == "no"
    with pytest.raises(ConfigError, match="precision: Input should be"):
        load_config(minimal, ["train.precision=yes"])


def nested(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every dataclass nested in a dataclass, with its path."""
    found = [((*path, field.name), getattr(value, field.name)) for field in fields(value)]
    found = [(inner_path, inner) for inner_path, inner in found if is_dataclass(inner)]
    return found + [deeper for inner_path, inner in found for deeper in nested(inner, inner_path)]


def default_of(path: tuple[str, ...]) -> Any:
    value: Any = parse_config(MINIMAL)
    for name in path:
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("path", [path for path, _ in nested(parse_config(MINIMAL))], ids=".".join)
def test_changing_one_key_keeps_the_other_defaults(path: tuple[str, ...], minimal: Path) -> None:
    """A nested default that differs from the default of its class would be lost if one of its keys were set."""
    default = default_of(path)
    key = next(field.name for field in reversed(fields(default)) if not is_dataclass(getattr(default, field.name)))
    value = yaml.safe_dump(getattr(default, key), width=9999)
    head = ["model.head=pooled"] if "head" in path else []  # a union of two: its name is required
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
    for changes in ([], overrides):
        config = load_config(minimal, changes)
        path = tmp_path / "dumped.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config
        assert dump_config(load_config(path)) == path.read_text(encoding="utf-8")
    assert config.optim.betas == (0.8, 0.95)
    assert config.model.vision.id is None, "`architecture` replaces the default id"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optm.lr=1"], "optm: unknown key; did you mean `optim`?"),
        (["epochs=3"], "epochs: unknown key; did you mean `train.epochs`?"),
        (["batch_size=3"], "batch_size: unknown key; did you mean `data.batch_size`?"),
        (["optim.learning=1"], "optim.learning: unknown key; expected one of algorithm, lr, "),
        (["optim.learning_rate=1"], "optim.learning_rate: unknown key; did you mean `lr`?"),
        (["optim.wd=1"], "optim.wd: unknown key; did you mean `weight_decay`?"),
        (["optim.warmup_step=1"], "optim.warmup_step: unknown key; did you mean `warmup_steps`?"),
        (["data.train.sise=3"], "data.train.sise: unknown key; did you mean `size`?"),
        (["model.head=pooled", "model.head.widht=3"], "model.head.widht: unknown key; did you mean `width`?"),
        (["model.head=dense", "model.head.loss.gio=3"], "model.head.loss.gio: unknown key; did you mean `giou`?"),
        (["optim.groups.vision.lrr=3"], "optim.groups.vision.lrr: unknown key; did you mean `lr`?"),
        (["zzzzzz=1"], "zzzzzz: unknown key; expected one of model, data, optim, train"),
        (["__class__=1"], "__class__: unknown key"),
        (
            ["model.head=pooledd"],
            "model.head.name: 'pooledd' is unknown; did you mean `pooled`? expected one of dense, pooled",
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
        (["optim.lr=.nan"], "optim.lr: Input should be a finite number"),
        (["optim.milestones=[.inf]"], "optim.milestones.0: Input should be a finite number"),
        (["optim.groups.head.lr=-1"], "optim.groups.head.lr: Input should be greater than or equal to 0"),
        (["optim.clip_norm=0"], "optim.clip_norm: Input should be greater than 0"),
        (["data.augment.flip=5"], "data.augment.flip: Input should be less than or equal to 1"),
        (["train=5"], "train: "),
        (["optim.betas=[0.9]"], "optim.betas.1: Field required"),
        (["optim.groups.vision=3"], "optim.groups.vision: "),
        (["model.head.width=3"], "model.head.name: missing; expected one of dense, pooled"),
        (["model.head=dense", "model.head.width=big"], "model.head.width: Input should be a valid integer"),
        (["data.train.split=nope"], "data.train.split: Input should be 'train', 'val' or 'test'"),
        (["model.vision.id=null"], "give `id` (pretrained weights) or `architecture` (random weights)"),
        (["model.text.architecture={hidden_size: 3}"], "`architecture` needs `model_type`"),
        (["optim.lr"], "an override must read key.subkey=value, for example optim.lr=1e-4; got 'optim.lr'"),
        (["=3"], "an override must read key.subkey=value"),
        (["optim.lr=1", "optim.lr.x=3"], "optim.lr.x=3: lr is 1, which has no keys"),
        (["data.train.name=[1]"], "data.train.name: [1] is unknown"),
        (["train.seed=9223372036854775808"], "train.seed: Input should be less than 9223372036854775808"),
        (["train.max_steps=1:30"], "train.max_steps: Input should be a valid integer, unable to parse string as an"),
        (["train.max_steps=1e3"], "integer, got '1e3'"),
        (["train.output=no"], "train.output: Input should be a valid string, got False, as YAML reads it; write text"),
        (["train.output=3"], "train.output: Input should be a valid string, got 3, as YAML reads it; write text"),
        (["train.precision=yes"], "train.precision: Input should be 'no', 'bf16' or 'fp16', got True"),
        (["train={no: 3}"], "train.no: unknown key"),
        (["data.eval={3: {name: shapes}}"], "data.eval.3.[key]: Input should be a valid string, got 3, as YAML reads"),
        (["optim.betas=[1"], "optim.betas=[1: the value is not valid YAML"),
    ],
)
def test_error_messages(minimal: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, overrides)
    assert message in str(caught.value)


def test_all_errors_are_reported_at_once_with_their_file(minimal: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["optim.lrr=1", "train.epoch=1"])
    assert str(minimal) in str(caught.value)
    assert "optim.lrr: unknown key; did you mean `lr`?" in str(caught.value)
    assert "train.epoch: unknown key; did you mean `epochs`?" in str(caught.value)


LAUGHS = b"a0: &a0 [lol]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model: Field required"),
        (b"data: {train: {name: shapes}}", "data.eval: Field required"),
        (b"- a\n- b\n", "must contain keys such as `model:` and `data:`, not a list"),
        (b"just words", "not a str"),
        (b"a: [1", "is not valid YAML"),
        (b"a: b: c", "is not valid YAML"),
        (b"1: 2", "1: unknown key"),
        (b"optim:\n  lr: 1\n  clip_norm: 2\n  'lr': 3\n", "the key `lr` in line 4 is already in line 2; remove one"),
        (b"model: rec\ndata: {}\nmodel: grounding_dino\n", "the key `model` in line 3 is already in line 1"),
        (b"no: rec\n'no': grounding_dino\n", "the key `no` in line 2 is already in line 1"),
        (b"\x80\x04\xff\xfe", "is not valid YAML"),
        ("a: b".encode("utf-16"), "is not encoded in UTF-8"),
        (b"a: &a [*a]", "does an alias (*name) refer to itself"),
        (b"model: &a {name: rec, vision: *a}", "does an alias (*name) refer to itself"),
        (LAUGHS, "more than 200,000 values"),
        (LAUGHS.replace(b"a9:", b"base:"), "more than 200,000 values"),
        (b"model: " + b"[" * 2000 + b"]" * 2000, "nested deeper than 100 levels"),
        (b"model: " + b"[" * 200 + b"]" * 200, "nested deeper than 100 levels"),
        (b"# nothing\n" * 200_001, "more than 2,000 kB"),
        (b"date: 2020-99-01", "month must be in 1..12"),
        (b"".join(b"key%d: 1\n" % n for n in range(1000)), "and 950 more"),
    ],
)
def test_files_that_are_not_a_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "bad.yaml" in str(caught.value)
    assert len(str(caught.value)) < 5000


def test_a_key_that_is_twice_in_an_override(minimal: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train=.*the key `name` in line 1 is already in line 1"):
        load_config(minimal, ["data.train={name: shapes, size: 3, name: coco}"])


def test_merged_keys_may_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "data:\n  train: &train {name: shapes, size: 3}\n  eval: {val: &val {<<: *train, size: 5}, "
        "test: {<<: *val, size: 7}}\nmodel: {name: rec}\n"
    )
    data = load_config(tmp_path / "a.yaml").data
    assert {key: dataset.size for key, dataset in data.datasets().items()} == {
        "train": 3,
        "eval.val": 5,
        "eval.test": 7,
    }


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*: Is a directory"):
        load_config(tmp_path)


def test_selecting_a_head_by_name_alone() -> None:
    for head in ("pooled", {"name": "pooled"}):
        assert parse_config(MINIMAL | {"model": {"name": "rec", "head": head}}).model.head == PooledHeadConfig()


def write(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_a_file_is_merged_over_its_bases(tmp_path: Path) -> None:
    """Paths are relative to the file; the command line overrides all files."""
    first = MINIMAL | {"optim": {"lr": 0.1, "groups": {"text": {"lr": 0.5}}}, "train": {"epochs": 3, "trackers": ["a"]}}
    write(tmp_path / "first.yaml", first)
    second = {"base": "../first.yaml", "optim": {"weight_decay": 0.2}, "train": {"epochs": 4, "ema": 0.9}}
    write(tmp_path / "sub" / "second.yaml", second)
    third = {"base": "second.yaml", "optim": {"groups": {"head": {"lr": 1}}}, "train": {"trackers": ["b"], "ema": None}}
    config = load_config(write(tmp_path / "sub" / "third.yaml", third), ["train.epochs=5", "optim.groups.head.lr=2"])
    groups = {"text": GroupConfig(lr=0.5), "head": GroupConfig(lr=2)}
    assert config.optim == OptimConfig(lr=0.1, weight_decay=0.2, groups=groups)
    assert config.train == TrainConfig(epochs=5, trackers=["b"], ema=None)
    assert config.data == parse_config(MINIMAL).data
    assert "base" not in yaml.safe_load(dump_config(config))


COCO = {"name": "coco", "path": "a.json", "image_root": "images", "min_side": 3}


@pytest.mark.parametrize(
    ("base", "values", "expected"),
    [
        (COCO, {"path": "b.json"}, COCO | {"path": "b.json"}),
        (COCO, COCO | {"path": "b.json"}, COCO | {"path": "b.json"}),
        (COCO, {"name": "shapes"}, {"name": "shapes"}),
        (COCO, {"mine": {"name": "shapes"}}, {"mine": {"name": "shapes"}}),
        ({"mine": COCO}, {"name": "shapes"}, {"name": "shapes"}),
        ({"mine": COCO}, {"mine": {"path": "b.json"}}, {"mine": COCO | {"path": "b.json"}}),
        ({"mine": COCO}, {"base": {"name": "shapes"}}, {"mine": COCO, "base": {"name": "shapes"}}),
    ],
    ids=["same name implied", "same name", "other name", "one to several", "several to one", "one of several", "added"],
)
def test_merging_of_datasets(tmp_path: Path, base: Any, values: Any, expected: Any) -> None:
    write(tmp_path / "base.yaml", MINIMAL | {"data": MINIMAL["data"] | {"eval": base}})
    config = load_config(write(tmp_path / "own.yaml", {"base": "base.yaml", "data": {"eval": values}}))
    assert config == parse_config(MINIMAL | {"data": MINIMAL["data"] | {"eval": expected}})


@pytest.mark.parametrize(
    ("base", "values", "expected"),
    [
        ({"name": "dense", "width": 64}, {"layers": 2}, DenseHeadConfig(width=64, layers=2)),
        ({"name": "dense", "width": 64}, "dense", DenseHeadConfig(width=64)),
        ({"name": "dense", "width": 64}, "pooled", PooledHeadConfig()),
        ({"name": "dense", "width": 64}, {"name": "pooled", "layers": 2}, PooledHeadConfig(layers=2)),
        ("dense", {"layers": 2}, DenseHeadConfig(layers=2)),
        ("dense", {"name": "pooled", "layers": 2}, PooledHeadConfig(layers=2)),
        ({"name": "dense", "loss": {"l1": 3, "giou": 4}}, {"loss": {}}, DenseHeadConfig()),
    ],
)
def test_merging_of_heads(tmp_path: Path, base: Any, values: Any, expected: Any) -> None:
    write(tmp_path / "base.yaml", MINIMAL | {"model": {"name": "rec", "head": base}})
    config = load_config(write(tmp_path / "own.yaml", {"base": "base.yaml", "model": {"head": values}}))
    assert config.model == RecConfig(head=expected)


def test_errors_name_the_base_file_that_they_come_from(tmp_path: Path) -> None:
    wrong = {"train": {"name": "shapes", "sise": 3}, "eval": {"name": "shapes"}, "batch_size": 0}
    base = write(tmp_path / "base.yaml", MINIMAL | {"data": wrong, "optim": {"groups": {"text.network": {"rl": 1}}}})
    own = write(tmp_path / "own.yaml", {"base": "base.yaml", "optim": {"lrr": 1}})
    with pytest.raises(ConfigError) as caught:
        load_config(own, ["train.epoch=3"])
    assert str(caught.value).splitlines() == [
        f"{own}:",
        f"  data.train.sise: unknown key; did you mean `size`? (in {base})",
        f"  optim.groups.text.network.rl: unknown key; did you mean `lr`? (in {base})",
        "  optim.lrr: unknown key; did you mean `lr`?",
        "  train.epoch: unknown key; did you mean `epochs`?",
    ]
    own.write_text("base: base.yaml")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(MINIMAL | {"optim": {"lr": -1}, "train": {"seed": -1}}))
    with pytest.raises(ConfigError) as caught:
        load_config(own, ["train.seed=-2"])
    lr, seed = str(caught.value).splitlines()[1:]
    assert lr == f"  optim.lr: Input should be greater than or equal to 0 (in {base})"
    assert seed == "  train.seed: Input should be greater than or equal to 0", "it comes from the command line"


def test_a_missing_or_wrong_base(tmp_path: Path) -> None:
    own = write(tmp_path / "own.yaml", {"base": "missing.yaml"})
    with pytest.raises(ConfigError, match=r"missing\.yaml, the base of .*own\.yaml: No such file"):
        load_config(own)
    for base in (3, ["a.yaml", "b.yaml"]):
        with pytest.raises(ConfigError, match=r"own\.yaml: base must be the path of one YAML file, got "):
            load_config(write(own, {"base": base}))
    with pytest.raises(ConfigError, match="base: unknown key"):
        parse_config(MINIMAL | {"base": "own.yaml"})


def test_a_cycle_of_bases_is_named(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "../" + tmp_path.name + "/b")):
        write(tmp_path / f"{name}.yaml", {"base": f"{base}.yaml"})
    with pytest.raises(ConfigError, match=r"`base` forms a cycle: .*a\.yaml -> .*b\.yaml -> .*c\.yaml -> .*b\.yaml"):
        load_config(tmp_path / "a.yaml")


def test_overrides_change_one_dataset_of_a_yaml_anchor(tmp_path: Path) -> None:
    path = write(tmp_path / "own.yaml", "model: {name: rec}\ndata: {train: &data {name: shapes}, eval: *data}")
    config = load_config(path, ["data.eval.size=7"])
    assert config.data.eval == ShapesConfig(size=7)
    assert config.data.train == ShapesConfig()


@pytest.mark.parametrize("module", ["vg", "vg.config", "vg.data", "vg.models"])
def test_torch_is_not_imported(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1]).returncode == 0
