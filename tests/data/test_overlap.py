"""What is said of training and evaluation data that share no phrase."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from tests.data.detection.detection_files import annotation, coco_document, write_coco
from vg.data.detection.coco import CocoConfig
from vg.data.mixture import Mixture
from vg.data.overlap import warn_of_unknown_phrases
from vg.data.refcoco.source import RefcocoConfig
from vg.data.source import Source
from vg.data.synthetic.shapes import ShapesConfig


def detection(folder: Path, *names: str) -> Source:
    folder.mkdir()
    categories = [{"id": id, "name": name} for id, name in enumerate(names, 1)]
    document = coco_document() | {"annotations": [annotation(1, 25, 1, [1, 1, 5, 5])], "categories": categories}
    return CocoConfig(path=str(write_coco(folder, document))).build()


def expressions(folder: Path, *texts: str) -> Source:
    folder.mkdir()
    config = RefcocoConfig.miniature(folder)
    file = folder / "mini_val.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps(row | {"sent": texts[n % len(texts)]}) for n, row in enumerate(rows)))
    return config.build()


def test_no_shared_phrase_is_a_warning(tmp_path: Path) -> None:
    raccoons, dogs = detection(tmp_path / "a", "raccoon"), detection(tmp_path / "b", "dog", "wild dog")
    with pytest.warns(UserWarning, match=r"evaluated on 'dog', 'wild dog': not one of .* zero-shot"):
        warn_of_unknown_phrases(raccoons, [raccoons, dogs])
    with pytest.warns(UserWarning, match="evaluated on 'raccoon'"):
        warn_of_unknown_phrases(expressions(tmp_path / "c", "the left one"), [raccoons])


def test_shared_or_unlisted_phrases_are_not_a_warning(tmp_path: Path) -> None:
    raccoons, dogs = detection(tmp_path / "a", "raccoon"), detection(tmp_path / "b", "Dogs", "Raccoons")
    words = expressions(tmp_path / "c", "the left raccoon", "this")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unknown_phrases(raccoons, [dogs, words])
        warn_of_unknown_phrases(words, [raccoons])
        warn_of_unknown_phrases(Mixture([words, detection(tmp_path / "d", "cat")]), [dogs])
        warn_of_unknown_phrases(ShapesConfig().build(), [dogs])
        warn_of_unknown_phrases(dogs, [ShapesConfig().build()])
