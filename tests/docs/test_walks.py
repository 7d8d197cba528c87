"""The walks of vg/README.md list the files that an evaluation really runs through."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from PIL import Image

from tests.docs.pages import ROOT
from vg.config import RunConfig, parse_config
from vg.distributed import new_accelerator
from vg.evaluation.evaluator import Evaluator

WALKS = {"RefCOCO": 18, "COCO": 19}  # the most files that a walk may visit
# Called during an evaluation, but not on the way of a sample: definitions, progress bars, checks, other metrics.
BESIDE = {"types.py", "movable.py", "distributed.py", "evaluation/results.py", "metrics/result.py", "metrics/absent.py"}
BESIDE_MIOU = {"metrics/average_precision.py"}


def walk(name: str) -> tuple[list[str], list[str]]:
    """Files of a walk of vg/README.md, and the building blocks named below its list."""
    text = (ROOT / "vg" / "README.md").read_text(encoding="utf-8")
    section = re.search(rf"^### Walk: {name} .*?(?=^##)", text, re.MULTILINE | re.DOTALL)
    assert section, name
    files = re.findall(r"^\d+\. `([\w/.]+)`", section[0], re.MULTILINE)
    _, _, rest = section[0].partition("Building blocks")
    return files, re.findall(r"`([\w/.]+\.py)`", rest)


def called_files(function: Callable[[], Any]) -> set[str]:
    """Files of vg, relative to it, of which a function is called."""
    folder = f"{ROOT / 'vg'}{os.sep}"
    found: set[str] = set()

    def record(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(folder) and frame.f_code.co_name != "<module>":
            found.add(file.removeprefix(folder))

    sys.setprofile(record)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("name", WALKS)
def test_walks_are_short_and_complete(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They list the files that an evaluation of a miniature runs through, and no others."""
    files, blocks = walk(name)
    assert len(files) <= WALKS[name]
    assert len(set(files)) == len(files)
    config = miniature(name, tmp_path)
    model = config.model.build(pretrained=False)
    evaluator = Evaluator(config.data, model, new_accelerator(cpu=True))
    called = called_files(lambda: evaluator.run(model))
    beside = BESIDE | (BESIDE_MIOU if name == "RefCOCO" else {"ops/build.py", "models/base.py"})
    assert called - beside - set(blocks) == set(files)
    assert all((ROOT / "vg" / file).exists() for file in blocks)


def miniature(name: str, folder: Path) -> RunConfig:
    """A tiny model of the family and a dataset with one image and one box."""
    image, box = "COCO_train2014_000000000009.jpg", [5, 5, 20, 20]
    Image.new("RGB", (80, 64), "gray").save(folder / image)
    bert = {"model_type": "bert", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1}
    bert |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    if name == "RefCOCO":
        row = {"file_name": image, "ann_id": 1, "bbox": box, "sent": "red thing"}
        (folder / "mini_val.jsonl").write_text(json.dumps(row))
        data = {"name": "refcoco", "path": str(folder / "mini_val.jsonl"), "split": "val", "image_root": str(folder)}
        convnext = {"model_type": "dinov3_convnext", "hidden_sizes": [16, 32], "depths": [1, 1]}
        model: dict[str, Any] = {"name": "rec", "image_size": 32}
        model |= {
            "vision": {"frozen": False, "architecture": convnext},
            "text": {"frozen": False, "architecture": bert},
        }
        model["head"] = {"name": "dense", "width": 32, "layers": 1, "heads": 2, "feedforward": 64}
    else:
        annotation = {"id": 1, "image_id": 9, "category_id": 1, "bbox": box, "area": 400, "iscrowd": 0}
        document = {"images": [{"id": 9, "file_name": image, "width": 80, "height": 64}], "annotations": [annotation]}
        (folder / "instances.json").write_text(json.dumps(document | {"categories": [{"id": 1, "name": "person"}]}))
        data = {"name": "coco", "path": str(folder / "instances.json"), "image_root": str(folder)}
        swin = {"name": "swin", "width": 16, "depths": [1, 1, 1, 1], "heads": [1, 2, 4, 8], "window": 3}
        model = {"name": "grounding_dino", "backbone": swin, "text": {"architecture": bert}, "width": 64, "heads": 4}
        model |= {
            "image": {"shortest": 64, "longest": 120},
            "encoder_layers": 1,
            "decoder_layers": 1,
            "num_queries": 20,
        }
    train = {"output": str(folder / "run")}
    return parse_config({"model": model, "data": {"train": data, "eval": data, "workers": 0}, "train": train})
