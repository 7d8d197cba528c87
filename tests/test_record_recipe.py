"""The recipe for a record: true parameters, the figures in its header, and its commands from cache to table."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel

from tests.conftest import TEXT
from tests.models.rec.published import PUBLISHED
from vg.cli import main
from vg.cli.benchmark import trained_parameters
from vg.config import load_config
from vg.models.encoders import SMALL_VOCABULARY
from vg.models.rec.model import RecModel

RECIPE = Path(__file__).parents[1] / "configs" / "rec" / "refcoco_record.yaml"
COMMENT = "\n".join(line.removeprefix("#") for line in RECIPE.read_text().splitlines() if line.startswith("#"))
VISION = PUBLISHED["facebook/dinov3-vitl16-pretrain-lvd1689m"]
ENCODERS = [
    f"model.vision={json.dumps({'id': None, 'architecture': VISION, 'layers': [6, 12, 18, 24], 'mixed_width': 1024})}",
    f"model.text={json.dumps({'id': None, 'architecture': PUBLISHED['BAAI/bge-base-en-v1.5']})}",
]
PRINTED = (r"([\d,]+) steps", r"([\d.]+) GB of memory", r"view, ([\d.]+) GB", r"([\d.]+) GB/s")
HEADER = (
    r"(\d+) minutes, of them ([\d.]+) for the cache, ([\d.]+) for ([\d,]+) steps, ([\d.]+) for 40 validations and "
    r"([\d.]+) for the benchmark; (\d+) PFLOP. A step needs (\d+) GB of GPU memory, and the cache (\d+) GB of disk for "
    r"images .* read at ([\d.]+) GB/s"
)


def test_the_model_has_the_parameters_of_its_parts() -> None:
    config, built = load_config(RECIPE), load_config(RECIPE, ENCODERS)
    assert config.model.vision.layers == [6, 12, 18, 24]  # type: ignore[union-attr]
    assert config.data.batch_size * config.train.accumulate == 256
    assert config.data.cache is not None
    assert config.data.cache.views == ["plain", "flip", "crop", "flip_crop"]
    with torch.device("meta"):
        model = built.model.build(pretrained=False)
    assert isinstance(model, RecModel)
    width, feedforward = 512, 2048
    linear = {"query_key": 2 * width, "value": width, "attention_output": width}
    layer = sum((width + 1) * outputs for outputs in linear.values()) + 2 * 2 * width
    layer += (width + 1) * feedforward + (feedforward + 1) * width
    projections = (1024 + 1) * width + (768 + 1) * width
    head = projections + 6 * layer + 2 * width + (width + 1) + (width + 1) * width + (width + 1) * 4
    assert trained_parameters(built) == head == 20_099_077
    assert model.num_parameters() == 303_129_600 + 109_482_240 + head


def test_the_figures_of_the_header_are_calculated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.benchmarks import training_cost

    monkeypatch.setattr(sys, "argv", ["training_cost.py", str(RECIPE), *ENCODERS])
    training_cost.main()
    shown = capsys.readouterr().out
    rows = {
        name.strip(): [float(value) for value in values]
        for name, *values in re.findall(r"(?m)^(\S.{29})(.{10})(.{10})(.{10})$", shown)
    }
    minutes = {name: values[2] for name, values in rows.items()}
    printed = [float(re.search(pattern, shown)[1].replace(",", "")) for pattern in PRINTED]  # type: ignore[index]
    caching = minutes["cache: images"] + minutes["cache: expressions, at most"]
    stated = re.search(HEADER, " ".join(COMMENT.split()))
    assert stated, "the header has another form"
    calculated = minutes["all"], caching, minutes["training"], printed[0], minutes["validation"]
    calculated += minutes["benchmark, bf16"], rows["all"][0], *printed[1:]
    for text, value in zip(stated.groups(), calculated, strict=True):
        assert agree(text, value), f"{text} in the header, {value} in\n{shown}"

    page = (RECIPE.parents[2] / "scripts" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    section = page.partition("## Cost of the recipe for a record")[2].partition("\n## ")[0]
    table = [
        line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ") and "PFLOP" not in line
    ]
    assert len(table) > len(rows) == 6
    for (name, *texts), values in zip(table, rows.values(), strict=False):
        assert all(map(agree, texts, values)), f"{name}: {texts} in the documentation, {values} in\n{shown}"


def agree(text: str, value: float) -> bool:
    """Whether a figure of the documentation is this one, up to its last digit and what versions of torch change."""
    unit = 10 ** -len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - value) <= max(unit, 0.02 * value)


def write_data(folder: Path) -> None:
    """Write random images with three expressions each, as annotations of several splits in one file."""
    (folder / "images").mkdir()
    random, rows = np.random.default_rng(0), []
    for image, split in enumerate(["train"] * 3 + ["val", "testA", "testB"]):
        name, size = f"{image}.png", (60 + 8 * image, 80)
        pixels = random.integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC).save(folder / "images" / name)
        about = {"dataset": "refcoco_unc", "split": split, "image": name, "width": size[1], "height": size[0]}
        for index, sentence in enumerate(("left circle", "the red star", "big square on the right")):
            box = [10 + 5 * index, 12, 20, 30]
            rows.append(about | {"image_id": image, "ann_id": 10 * image + index, "bbox": box, "sent": sentence})
    (folder / "refs.json").write_text(json.dumps(rows))


def write_encoders(folder: Path) -> list[str]:
    """Write small random encoders with the layers of the recipe; return the settings that select them."""
    torch.manual_seed(0)
    small = VISION | {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    for name, architecture in (("vision", small), ("text", TEXT)):
        AutoModel.from_config(AutoConfig.for_model(**architecture)).save_pretrained(folder / name)
    return [
        f"model.vision.id={folder / 'vision'}",
        "model.vision.mixed_width=48",
        f"model.text.id={folder / 'text'}",
        f"model.text.tokenizer={SMALL_VOCABULARY}",
    ]


def test_the_commands_of_the_header_work_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    (tmp_path / "configs").symlink_to(RECIPE.parents[1])
    monkeypatch.chdir(tmp_path)
    data = [
        f"data.{part}.{key}={value}"
        for part in ("train", "eval")
        for key, value in (("path", "refs.json"), ("dataset", "refcoco_unc"), ("image_root", "images"))
    ]
    small = ["model.image_size=64", "model.head.width=32", "model.head.heads=2", "model.head.feedforward=64"]
    small += ["data.batch_size=4", "data.workers=0", "train.epochs=2", "train.trackers=[]", *data]
    small += write_encoders(tmp_path)
    commands = [shlex.split(line, comments=True)[1:] for line in COMMENT.splitlines() if line.startswith("   vg ")]
    assert [words[0] for words in commands] == ["cache", "train", "eval", "table"]
    cache, train, evaluate, table = commands
    options = ["--data", str(tmp_path), "--workers", "0"]
    main([*cache, *small])
    main([*train, *small])
    main([*evaluate, *options])
    other = ["train.seed=1", "train.output=runs/refcoco_record_1"]
    assert " ".join(other) in COMMENT
    main([*train, *small, *other])
    assert len(list((tmp_path / "cache").glob("*/key.json"))) == 2, "train and val; the second seed encodes nothing"
    second = [word.replace("refcoco_record", "refcoco_record_1") for word in evaluate]
    main([*second, *options])
    (part,) = (tmp_path / "runs" / "refcoco_record" / "eval").glob("suite=refcoco,datasets=refcoco,precision=bf16")
    results = json.loads((part / "benchmark.json").read_text())
    assert [part["split"] for part in results["parts"]] == ["val", "testA", "testB"]
    assert (results["precision"], results["config"]["train"]["epochs"]) == ("bf16", 2)
    main([table[0], "runs/refcoco_record_1", *table[1:]])
    (row,) = [line for line in Path(table[-1]).read_text().splitlines() if line.startswith("refcoco")]
    cells = [cell.strip() for cell in row.removesuffix(r" \\").split("&")]
    assert cells[:4] == [r"refcoco\_record (2 runs)", "vision", "text", "64, aspect kept"]
    assert cells[6:9] == ["RefCOCO", "none", "2"]
    assert all(re.fullmatch(r"\$\d+\.\d\d \\pm \d+\.\d\d\^\{\*\}\$", cell) for cell in cells[9:])
    assert len(cells) == 9 + 3
