"""Small detection datasets on disk, for tests that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REAL = Path(__file__).resolve().parents[3] / ".." / "shared" / "data"
CATEGORIES = [{"id": 7, "name": "traffic_light"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "hot dog"}]


def write_image(file: Path, height: int = 40, width: int = 60, **options: Any) -> None:
    """Write a noisy image; its first pixel depends on the file name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    pixels[0, 0] = sum(file.stem.encode()) % 251
    Image.fromarray(pixels).save(file, **options)


def annotation(id: int, image: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {"id": id, "image_id": image, "category_id": category, "bbox": bbox, **more}


def coco_document() -> dict[str, Any]:
    """Three images: one with all unusual but allowed boxes, one without boxes, one in portrait format."""
    return {
        "images": [
            {"id": 25, "file_name": "a.png", "height": 40, "width": 60},
            {"id": 4, "file_name": "b.png", "height": 40, "width": 60},
            {"id": 139, "file_name": "c.png", "height": 60, "width": 40},
        ],
        "annotations": [
            annotation(1, 139, 3, [5, 10, 20, 30], area=300.5, iscrowd=0),
            annotation(2, 25, 7, [1.5, 2, 10, 20]),
            annotation(3, 25, 90, [10, 20, 30, 15], area=200, iscrowd=1),
            annotation(4, 25, 7, [1.5, 2, 10, 20]),  # a duplicate stays
            annotation(5, 25, 3, [50, 30, 30, 30]),  # clipped
            annotation(6, 25, 3, [60, 10, 5, 5]),  # outside
            annotation(7, 25, 3, [10, 10, 0.5, 5]),  # thinner than a pixel
            annotation(8, 25, 3, [10, 10, 0, 0]),
        ],
        "categories": CATEGORIES,
    }


def write_coco(folder: Path, document: Any = None) -> Path:
    """Write the json file and its images."""
    for name, height, width in (("a", 40, 60), ("b", 40, 60), ("c", 60, 40)):
        write_image(folder / f"{name}.png", height, width)
    file = folder / "instances_val.json"
    file.write_text(json.dumps(coco_document() if document is None else document))
    return file
