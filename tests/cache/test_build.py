"""The feature cache is built once, resumed after a kill, equal to live features, and never used when stale."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from tests.cache.feature_data import cached_config, write_encoders
from tests.conftest import HEAD, history
from vg.cache import format as cache_format
from vg.cache.build import build_cache
from vg.checkpoint import read_model
from vg.cli import main
from vg.config import RunConfig, dump_config
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset, RunDataset
from vg.data.refcoco import source as refcoco
from vg.datasets import training_dataset
from vg.errors import CacheError, ConfigError
from vg.models.rec.model import RecModel
from vg.training.trainer import Trainer
from vg.types import EncodedBatch

KILLED = """
import os, signal
from vg.cache.build import build_cache
from vg.config import load_config
from vg.cache import format as cache_format
from vg.models.rec.model import RecModel

cache_format.FORMAT |= {"images": 2, "expressions": 4}
encode, calls = RecModel.encode_images, []

def killed(self, images):
    calls.append(len(images))
    if sum(calls[2:]) > 2:  # two black images measure the sizes of both datasets; then the second shard follows
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, images)

RecModel.encode_images = killed
build_cache(load_config("config.yaml"))
"""


def forbid_encoders_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("an image is read or an encoder loaded")

    monkeypatch.setattr(refcoco, "read_image", forbidden)
    monkeypatch.setattr(AutoModel, "from_pretrained", forbidden)
    monkeypatch.setattr(AutoModel, "from_config", forbidden)


def cached_data(config: RunConfig) -> RunDataset:
    return training_dataset(config, config.model.build(), evaluations=[])


def test_cached_features_equal_live_ones_to_half_precision(folder: Path) -> None:
    config = cached_config(folder, {})
    build_cache(config)
    model = config.model.build().eval()
    collate = Collator(model.image_spec, model.text_spec)
    pixels = GroundingDataset(config.data.train.build())
    cached = cached_data(config)
    assert len(cached) == len(pixels) == 15
    live = collate([pixels[index] for index in range(15)])
    stored = cached.collate([cached[index] for index in range(15)])
    assert isinstance(stored, EncodedBatch)
    for one, other in zip(live.targets, stored.targets, strict=True):
        assert (one.id, one.size, one.phrases, one.expression_type) == (
            other.id,
            other.size,
            other.phrases,
            other.expression_type,
        )
        assert one.boxes.equal(other.boxes)
        assert one.phrase_ids.equal(other.phrase_ids)
    features = model.encode(live)
    assert stored.features.image.shape == (5, 1 + 4 + 2 * 2, 32)  # images, not expressions
    assert live.text.mask.equal(features.text_mask)
    assert features.text_mask.equal(stored.features.text_mask)
    assert features.grid == stored.features.grid
    half = {"rtol": 2**-10, "atol": 1e-4}
    image = stored.features.image.float()[stored.features.image_ids]
    torch.testing.assert_close(image, features.image, **half)
    mask = live.text.mask
    torch.testing.assert_close(stored.features.text.float()[mask], features.text[mask], **half)
    with torch.no_grad():
        outputs = [model(batch) for batch in (live, stored)]
        assert model.decode(features).boxes.equal(outputs[0].boxes)
    torch.testing.assert_close(outputs[1].boxes, outputs[0].boxes, rtol=0, atol=2e-3)


def test_cached_training_reads_no_image_and_loads_no_encoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = cached_config(folder, None, train={"output": str(folder / "live")})
    Trainer(live).fit()
    config = cached_config(folder, {})
    build_cache(config)
    with monkeypatch.context() as context:
        forbid_encoders_and_images(context)
        Trainer(config).fit()
        resumed = cached_config(folder, {}, train={"epochs": 3})
        assert Trainer(resumed, resume=True).fit()["miou"] >= 0
    for one, other in zip(history(live), history(config), strict=False):
        for name in ("loss", "miou"):
            assert one.get(name) == pytest.approx(other.get(name), abs=5e-3), one
    model, _ = read_model(folder / "run")
    assert isinstance(model, RecModel)
    source = AutoModel.from_pretrained(folder / "vision")
    for name, value in source.state_dict().items():
        assert model.vision.network.state_dict()[name].equal(value)


def test_evaluation_reads_the_cache_or_the_images(folder: Path) -> None:
    config = cached_config(folder, {}, model={"head": HEAD})
    build_cache(config)
    Trainer(config).fit()
    metrics = []
    for override in ("data.workers=0", "data.cache=null"):
        main(["eval", str(folder / "run"), override, "--output", str(folder / "out")])
        metrics.append(json.loads((folder / "out" / "metrics.json").read_text()))
    assert metrics[0]["miou"] == pytest.approx(metrics[1]["miou"], abs=5e-3)
    assert metrics[0]["num_expressions"] == metrics[1]["num_expressions"] == 6
    with pytest.raises(SystemExit, match=r"contains no features of .* \(train\).*vg cache CONFIG"):
        main(["eval", str(folder / "run"), "data.eval.split=train", f"data.cache.folder={folder}/other"])


def test_a_killed_build_continues_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cached_config(folder, {}, data={"eval_batch_size": 1})
    config.data.eval_batch_size = 1
    (folder / "config.yaml").write_text(dump_config(config))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", KILLED], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    with pytest.raises(CacheError, match="is incomplete: 1 of 3 image shards are written"):
        cached_data(config)

    written = sorted((folder / "cache").rglob("*.npy"))
    assert [file.name for file in written] == ["00000.npy"]
    before = written[0].stat().st_mtime_ns
    encode, encoded = RecModel.encode_images, []

    def counting(self: RecModel, images: torch.Tensor) -> Any:
        encoded.append(len(images) if images.any() else 0)  # black ones only measure sizes
        return encode(self, images)

    monkeypatch.setattr(RecModel, "encode_images", counting)
    build_cache(config)
    assert written[0].stat().st_mtime_ns == before
    assert sum(encoded) == 3 + 2  # two of five training images were done; two are for evaluation
    encoded.clear()
    build_cache(config)
    assert sum(encoded) == 0

    resumed = {file: file.read_bytes() for file in sorted((folder / "cache").rglob("*.np?"))}
    straight = cached_config(folder, {"folder": str(folder / "straight")})
    straight.data.eval_batch_size = 1
    build_cache(straight)
    for file, content in resumed.items():
        other = folder / "straight" / file.relative_to(folder / "cache")
        assert content == other.read_bytes() or file.suffix == ".npz", file


def other_weights(folder: Path) -> None:
    write_encoders(folder, seed=1)


def other_annotation(folder: Path) -> None:
    file = folder / "data" / "train.jsonl"
    file.write_text(file.read_text().replace("left circle", "left disc", 1))


def other_format(folder: Path) -> None:
    cache_format.FORMAT["version"] += 1


@pytest.mark.parametrize(
    ("change", "sections", "message"),
    [
        (other_weights, {}, "the vision.weights changed since the cache was written"),
        (other_annotation, {}, "the annotations changed since the cache was written"),
        (other_format, {}, "format.version is 2, the cache has 1"),
        (None, {"model": {"image_size": 64}}, "transform.height is 64, the cache has 32; transform.width is 64"),
        (None, {"model": {"text": {"id": "text", "tokenizer": "text/vocab.txt"}}}, "the text.tokenizer changed since"),
        (None, {"data": {"cache": {"views": ["plain", "flip"]}}}, r"views is \['plain', 'flip'\], the cache has"),
    ],
)
def test_a_stale_cache_is_rejected(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Any, sections: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(cache_format.FORMAT, "version", 1)
    build_cache(cached_config(folder, {}))
    if change:
        change(folder)
    (folder / "text" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n") if "model" in sections else None
    if "data" in sections:
        sections["data"]["cache"]["folder"] = str(folder / "cache")
    with pytest.raises(CacheError, match=message) as caught:
        Trainer(cached_config(folder, {}, **sections))
    assert "vg cache CONFIG" in str(caught.value)
    assert not (folder / "run" / "config.yaml").exists()


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shorten(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("index.npz", remove, "is incomplete: 3 of 3 image shards"),
        ("index.npz", cut, "index.npz cannot be read"),
        ("images/00001.npy", remove, "00001.npy cannot be read"),
        ("images/00001.npy", cut, "00001.npy cannot be read"),
        ("images/00002.npy", shorten, "00002.npy has 0 rows, expected 1;"),
        ("texts/00000.npy", shorten, "00000.npy has .* rows, expected .*;"),
    ],
)
def test_a_damaged_cache_is_rejected(folder: Path, name: str, damage: Any, message: str) -> None:
    config = cached_config(folder, {})
    build_cache(config)
    cached_data(config)
    damage(next((folder / "cache").glob("*train*")) / name)
    with pytest.raises(CacheError, match=message):
        cached_data(config)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"cache": None}}, "data.cache is not set"),
        ({"data": {"cache": {"folder": "cache", "views": ["plain", "crop", "plain"]}}}, "views lists plain twice"),
        ({"model": {"vision": {"id": "vision", "frozen": False}}}, "model.vision.frozen is false"),
        ({"model": {"vision": {"architecture": {"model_type": "resnet"}}}}, "model.vision has no id"),
        (
            {"data": {"augment": {"flip": 0.5}}},
            "augment changes pixels, but a cache holds features; use cache.views instead",
        ),
        (
            {"data": {"group_by_aspect_ratio": True, "one_size": True}},
            "one_size resizes images, but a cache holds their features; set one of the two only",
        ),
    ],
)
def test_what_cannot_be_cached_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(folder)
    if "data" in sections and "cache" not in sections["data"]:
        sections["data"]["cache"] = {"folder": str(folder / "cache")}

    def run() -> None:
        config = cached_config(folder, {}, **sections)
        (Trainer if config.data.cache else build_cache)(config)

    with pytest.raises(ConfigError, match=message):
        run()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("512 requested and 128 written")]
)
def test_a_full_disk_names_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def fail(*_: Any) -> None:
        raise error

    config = cached_config(folder, {})
    with monkeypatch.context() as context:
        context.setattr(np, "save", fail)
        message = rf"could not write the cache: .*{error.strerror or error}.*images/00000\.npy.*continues where"
        with pytest.raises(CacheError, match=message):
            build_cache(config)
    build_cache(config)


def test_the_required_space_is_printed_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = cached_config(folder, {})
    with monkeypatch.context() as context:
        context.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(CacheError, match=r"the features need .* MB, the disk of .* has 0\.00 MB left; free"):
            build_cache(config)
    assert not list((folder / "cache").iterdir())
    (folder / "config.yaml").write_text(dump_config(config))
    main(["cache", str(folder / "config.yaml"), "data.workers=0"])
    lines = capsys.readouterr().out.splitlines()
    assert "5 images (plain), 15 expressions" in lines[0]
    written = sum(file.stat().st_size for file in (folder / "cache").glob("*train*/images/*.npy"))
    assert 5 * 9 * 32 * 2 <= written <= 5 * 9 * 32 * 2 + 3 * 128  # with the headers of three files
