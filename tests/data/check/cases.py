"""Small datasets for `vg check`, and its issues by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data.detection.detection_files import annotation, write_image
from vg.data.check import Diagnosis, diagnose
from vg.data.detection.coco import CocoConfig
from vg.data.detection.issues import Issue


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
