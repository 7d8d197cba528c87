"""Small datasets for `vg check`, and its issues by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data.detection.detection_files import annotation, write_image
from vg.data.check import Diagnosis, diagnose
from vg.data.detection.coco import CocoConfig
from vg.data.detection.issues import Issue
from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.voc import VocConfig
from vg.data.detection.yolo import YoloConfig


def valid_coco(num: int = 12, size: tuple[int, int] = (40, 60)) -> dict[str, Any]:
    """Images of one size, each with a different box of one of two classes."""
    height, width = size
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": height, "width": width} for i in range(num)],
        "annotations": [annotation(i, i, 1 + i % 2, [20 + i, 15, 10 + i, 20]) for i in range(num)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def write(folder: Path, document: Any, images: bool = True) -> CocoConfig:
    folder.mkdir(parents=True, exist_ok=True)
    for image in document["images"] if images else []:
        if isinstance(image, dict) and not (folder / str(image.get("file_name"))).exists():
            write_image(folder / image["file_name"])
    (folder / "set.json").write_text(json.dumps(document))
    return CocoConfig(path=str(folder / "set.json"))


def check(train: Any, **evaluation: Any) -> Diagnosis:
    return diagnose({"train": train, **evaluation}, max_tokens=256)


def found(diagnosis: Diagnosis, what: str, dataset: str = "train") -> Issue:
    """Return the only issue of a dataset whose text contains `what`."""
    matches = [issue for issue in diagnosis.issues if what in issue.what and issue.dataset == dataset]
    assert len(matches) == 1, [(issue.dataset, issue.what) for issue in diagnosis.issues]
    assert matches[0].fix
    return matches[0]


def errors(diagnosis: Diagnosis) -> list[str]:
    return [issue.what for issue in diagnosis.issues if issue.severity == "error"]


def odvg(folder: Path, *rows: Any, labels: Any = None) -> OdvgConfig:
    write_image(folder / "a.png")
    lines = [
        row if isinstance(row, str) else json.dumps({"filename": "a.png", "height": 40, "width": 60, **row})
        for row in rows
    ]
    (folder / "set.jsonl").write_text("\n".join(lines))
    if labels is not None:
        (folder / "label_map.json").write_text(json.dumps(labels))
    return OdvgConfig(path=str(folder / "set.jsonl"), label_map=labels and str(folder / "label_map.json"))


def instances(*items: Any) -> dict[str, Any]:
    return {"detection": {"instances": list(items)}}


def voc(folder: Path, objects: str, name: str = "a") -> VocConfig:
    write_image(folder / f"{name}.png")
    xml = f"<annotation><size><width>60</width><height>40</height></size>{objects}</annotation>"
    (folder / f"{name}.xml").write_text(xml)
    return VocConfig(path=str(folder))


def yolo(folder: Path, labels: str) -> YoloConfig:
    write_image(folder / "images" / "a.png")
    write_image(folder / "images" / "b.png")
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "labels" / "a.txt").write_text(labels)
    (folder / "data.yaml").write_text("{names: [cat, dog], train: images}")
    return YoloConfig(path=str(folder))
