"""Small data sets for the doctor, and its findings by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data.detection.detection_files import annotation, write_picture
from vg.data.check import Diagnosis, diagnose
from vg.data.check.findings import Finding
from vg.data.detection.coco import CocoConfig


def sound(num: int = 12, size: tuple[int, int] = (40, 60)) -> dict[str, Any]:
    """Pictures of one size with a box of its own each, of two classes."""
    height, width = size
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": height, "width": width} for i in range(num)],
        "annotations": [annotation(i, i, 1 + i % 2, [20 + i, 15, 10 + i, 20]) for i in range(num)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def write(folder: Path, document: Any, pictures: bool = True) -> CocoConfig:
    folder.mkdir(parents=True, exist_ok=True)
    for image in document["images"] if pictures else []:
        if isinstance(image, dict) and not (folder / str(image.get("file_name"))).exists():
            write_picture(folder / image["file_name"])
    (folder / "set.json").write_text(json.dumps(document))
    return CocoConfig(path=str(folder / "set.json"))


def check(train: Any, **others: Any) -> Diagnosis:
    return diagnose({"train": train, **others}, max_tokens=256)


def found(diagnosis: Diagnosis, what: str, set: str = "train") -> Finding:
    """The only finding whose text has this in it."""
    named = [finding for finding in diagnosis.findings if what in finding.what and finding.set == set]
    assert len(named) == 1, [(finding.set, finding.what) for finding in diagnosis.findings]
    assert named[0].mend
    return named[0]


def errors(diagnosis: Diagnosis) -> list[str]:
    return [finding.what for finding in diagnosis.findings if finding.severity == "error"]
