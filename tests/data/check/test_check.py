"""`vg check` finds every type of error, names file and row, continues after it, and reports nothing on valid data."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.check.cases import check, errors, found, valid_coco, write
from tests.data.detection.detection_files import REAL, annotation, coco_document, write_coco, write_image
from vg.cli import main
from vg.data.check import diagnose
from vg.data.detection.coco import CocoConfig
from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.voc import VocConfig
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.detection.yolo import YoloConfig
from vg.data.expressions import CsvConfig
from vg.data.mixture import MixtureConfig
from vg.data.refcoco.source import RefcocoConfig
from vg.errors import DataError

Change = tuple[str, int, str | None, Any]  # list of the document, row, key, value


def load_all(config: CocoConfig) -> None:
    """Load everything, as training does."""
    source = config.build()
    for index in range(len(source)):
        source.load(index, 0)


def test_valid_data_has_no_errors_and_no_warnings(tmp_path: Path) -> None:
    diagnosis = check(write(tmp_path, valid_coco()))
    assert [issue.what for issue in diagnosis.issues] == ["classes with fewer than 10 boxes"]


@pytest.mark.parametrize(
    ("change", "what", "example"),
    [
        (("annotations", 3, "bbox", [1, 2, 3]), "not four finite numbers", "annotation 3: bbox [1, 2, 3]"),
        (("annotations", 3, "bbox", [1, 2, float("nan"), 4]), "not four finite numbers", "annotation 3"),
        (("annotations", 3, "bbox", "1 2 3 4"), "not four finite numbers", "annotation 3: bbox '1 2 3 4'"),
        (("annotations", 3, "bbox", [30, 15, -10, 20]), "inverted boxes", "annotation 3 (3.png, dog)"),
        (("annotations", 3, "image_id", 99), "image_id is not in images", "annotation 3: image_id 99"),
        (("annotations", 3, "image_id", "3"), "image_id is not in images", "annotation 3: image_id '3'"),
        (("annotations", 3, "image_id", [3]), "image_id is not in images", "annotation 3: image_id [3]"),
        (("annotations", 3, "category_id", 0), "category_id is not in categories", "annotation 3: category_id 0"),
        (("annotations", 3, None, "text"), "entries that are not objects", "annotations[3]: text"),
        (("images", 3, "id", 2), "duplicate ids in images", "images[3]: {'id': 2, 'file_name': '3.png'"),
        (("images", 3, "file_name", None), "without id or file_name", "images[3]: "),
        (("images", 3, "width", 90), "another size than annotated", "image 3 (3.png): 60 x 40, annotation 90"),
        (("images", 3, None, 7), "entries that are not objects", "images[3]: 7"),
        (("categories", 1, "id", 1), "duplicate ids in categories", "categories[1]"),
        (("categories", 1, "name", ""), "categories without id or name", "categories[1]"),
        (("categories", 1, "name", "Cat_"), "invalid vocabulary", "have the same phrase"),
        (("categories", 1, "name", "?!"), "without letter or digit", "?!"),
    ],
)
def test_errors_in_rows_of_coco(change: Change, what: str, example: str, tmp_path: Path) -> None:
    key_of_list, row, key, value = change
    document = valid_coco()
    config = write(tmp_path, document)
    if key is None:
        document[key_of_list][row] = value
    else:
        document[key_of_list][row][key] = value
    write(tmp_path, document, images=False)
    issue = found(check(config), what)
    assert (issue.severity, issue.count) == ("error", 1) or key_of_list == "categories"
    assert example in issue.examples[0]
    if what != "without letter or digit":  # an error of the model's prompt, not of loading
        with pytest.raises(DataError):
            load_all(config)


@pytest.mark.parametrize(
    ("bbox", "what"),
    [
        ([10, 10, 0.5, 5], "a side below 1 pixel"),
        ([70, 10, 5, 5], "outside of their image"),
        ([50, 10, 30, 20], "extend beyond their image"),
        ([22, 15, 12, 20], "duplicate boxes"),
    ],
)
def test_boxes_that_training_leaves_out_or_clips_are_warnings(bbox: list[float], what: str, tmp_path: Path) -> None:
    document = valid_coco()
    document["annotations"].append(annotation(77, 2, 1, bbox))
    diagnosis = check(write(tmp_path, document))
    issue = found(diagnosis, what)
    assert (issue.severity, issue.count) == ("warning", 1)
    assert "annotation 77 (2.png, cat)" in issue.examples[0]
    assert not errors(diagnosis)


def test_unusual_but_allowed_coco_entries_are_not_errors(tmp_path: Path) -> None:
    assert not errors(check(CocoConfig(path=str(write_coco(tmp_path, coco_document())))))


def test_coco_boxes_in_xyxy_are_detected(tmp_path: Path) -> None:
    document = valid_coco()
    for row in document["annotations"]:
        left, top, width, height = row["bbox"]
        row["bbox"] = [left, top, left + width, top + height]
    diagnosis = check(write(tmp_path, document))
    issue = found(diagnosis, "boxes that are not xywh (left, top, width, height)")
    assert issue.severity == "error"
    assert "fit as xyxy (left, top, right, bottom)" in issue.fix
    assert [issue.severity for issue in diagnosis.issues if "extend beyond" in issue.what] == []
    drawn = diagnosis.images(1)[0]
    assert drawn[2].tolist() == [[20, 15, 30, 35]], "drawn in the format that fits"


def relative(document: Any, width: float = 60, height: float = 40) -> Any:
    for row in document["annotations"]:
        row["bbox"] = [side / scale for side, scale in zip(row["bbox"], [width, height] * 2, strict=True)]
    return document


def test_boxes_in_fractions_of_the_image_are_detected(tmp_path: Path) -> None:
    config = write(tmp_path, relative(valid_coco()))
    diagnosis = check(config)
    issue = found(diagnosis, "boxes in 0..1 of the image instead of pixels")
    assert (issue.severity, issue.count) == ("error", 12)
    assert "annotation 0 (0.png, cat): [0.33" in issue.examples[0]
    assert "multiply x and width by the width of the image" in issue.fix
    assert errors(diagnosis) == [issue.what], "no second diagnosis of the same cause"
    assert diagnosis.images(1)[0][2].round(3).tolist() == [[20, 15, 30, 35]], "drawn where they are meant"
    for min_side in (0, 1):  # evaluation drops none of them, training all
        with pytest.raises(DataError, match=r"set\.json: boxes in 0\.\.1 .*annotation 0 \(0\.png.*\(12 in all\)"):
            replace(config, min_side=min_side).build()


def test_boxes_in_thousandths_of_the_image_are_detected(tmp_path: Path) -> None:
    document = relative(valid_coco(), width=60 / 1000, height=40 / 1000)
    document["annotations"][0]["bbox"] = [950, 100, 50, 50]
    config = write(tmp_path, document)
    diagnosis = check(config)
    issue = found(diagnosis, "boxes in 0..1000 instead of pixels, many beyond their image")
    assert (issue.severity, issue.count) == ("error", 12)
    assert errors(diagnosis) == [issue.what]
    assert diagnosis.images(1)[0][2].round(3).tolist() == [[57, 4, 60, 6]], "drawn where they are meant"
    with pytest.raises(DataError, match=r"set\.json: boxes in 0\.\.1000 .*annotation 0 \(0\.png.*\(12 in all\)"):
        config.build()


def test_odvg_and_voc_boxes_in_fractions_of_the_image_are_detected(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    instances = [{"bbox": [0.1, 0.2, 0.3 + i / 20, 0.9], "label": 0} for i in range(4)]
    line = {"filename": "a.png", "height": 40, "width": 60, "detection": {"instances": instances}}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(line)}\n")
    (tmp_path / "map.json").write_text('{"0": "cat"}')
    sides = "<xmin>0.1</xmin><ymin>0.2</ymin><xmax>0.5</xmax><ymax>0.9</ymax>"
    (tmp_path / "a.xml").write_text(
        f"<annotation><object><name>cat</name><bndbox>{sides}</bndbox></object></annotation>"
    )
    odvg = OdvgConfig(path=str(tmp_path / "a.jsonl"), label_map=str(tmp_path / "map.json"))
    for config in (odvg, VocConfig(path=str(tmp_path))):
        assert found(check(config), "boxes in 0..1").severity == "error"
        with pytest.raises(DataError, match=r"boxes in 0\.\.1 of the image"):
            config.build()


def test_losing_more_than_a_few_boxes_is_an_error(tmp_path: Path) -> None:
    document = valid_coco(60)
    lost = [[70, 10, 5, 5], [10, 10, 5, 0], [10, 10, 0.5, 5]]
    for number, row in enumerate(document["annotations"]):
        row["bbox"] = lost[number] if number < 3 else [number % 20, 10, 30, 20]
    config = replace(write(tmp_path, document), min_side=1)
    assert len(config.build()) == 60, "3 of 60 are 5 %"
    assert not errors(check(config))
    document["annotations"][3]["bbox"] = [10, 50, 10, 10]
    write(tmp_path, document, images=False)
    message = r"set\.json: .*left out.*annotation 0 \(0\.png, cat\): \[70, 10, 5, 5\] \(4 in all\).* 60 boxes"
    with pytest.raises(DataError, match=message):
        config.build()
    assert len(replace(config, min_side=0).build()) == 60, "one of them is thin, but has an area"
    assert any(re.search(message, issue.examples[0]) for issue in check(config).issues)


def test_missing_damaged_resized_and_rotated_images(tmp_path: Path) -> None:
    document = valid_coco()
    config = write(tmp_path, document)
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:500])
    (tmp_path / "2.png").write_bytes(b"not an image")
    write_image(tmp_path / "3.png", 80, 120)
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "4.png", 60, 40, exif=exif)
    write_image(tmp_path / "5.png", 40, 60, exif=exif)
    exif[0x0112] = 3
    write_image(tmp_path / "6.png", 40, 60, exif=exif)
    diagnosis = check(config)
    assert "0.png" in found(diagnosis, "missing").examples[0]
    assert found(diagnosis, "cannot be read").count == 2
    assert "120 x 80, annotation 60 x 40" in found(diagnosis, "resized after").examples[0]
    turned = found(diagnosis, "viewers turn or mirror")
    assert (turned.severity, [example[:7] for example in turned.examples]) == ("warning", ["image 5", "image 6"])
    assert "4.png" not in str(diagnosis.issues), "its annotated size is that of the upright image"
    assert len(diagnosis.images(12)) == 9, "all readable images are drawn"
    diagnosis = check(replace(config, upright=True))
    assert "5.png" in found(diagnosis, "upright, unlike their annotations").examples[0]
    assert not any("viewers" in issue.what for issue in diagnosis.issues)
    assert "4.png" in found(check(replace(config, upright=False)), "not upright, unlike").examples[0]


@pytest.mark.parametrize("member", [CsvConfig, YoloConfig])
def test_images_with_an_orientation_are_named_and_drawn_if_no_size_is_annotated(tmp_path: Path, member: Any) -> None:
    """Their boxes are taken as those of the upright image, but a tool may have ignored the orientation."""
    config = member.miniature(tmp_path)
    assert not any("EXIF" in issue.what for issue in check(config).issues)
    exif = Image.Exif()
    exif[0x0112] = 3
    file = config.build().image_files()[-1]
    write_image(file, 64, 64, exif=exif)
    turned = found(diagnosis := check(config), "as viewers show them")
    assert (turned.severity, turned.count) == ("note", 1)
    assert file.name in turned.examples[0]
    assert f"train: {turned.what}" in [caption for caption, *_ in diagnosis.images(2)]


def test_limit_of_images(tmp_path: Path) -> None:
    config = write(tmp_path, valid_coco())
    (tmp_path / "1.png").unlink()
    diagnosis = diagnose({"train": config}, 256, limit=2)
    assert len(diagnosis.datasets[0].image_files) == 2
    assert not errors(diagnosis)


@pytest.mark.parametrize(
    "content", ["", "[1", "[]", "null", '{"images": 3}', '{"annotations": [{}], "images": [null]}']
)
def test_files_that_are_not_coco(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert errors(check(CocoConfig(path=str(tmp_path / "a.json"))))
    assert errors(check(CocoConfig(path=str(tmp_path / "none.json"))))


def test_identical_boxes_and_boxes_of_whole_images(tmp_path: Path) -> None:
    for name, bbox, what in (
        ("a", [5, 5, 20, 20], "all boxes are the same"),
        ("b", [0, 0, 60, 40], "all boxes are the same"),
        ("c", None, "as large as the image"),
    ):
        document = valid_coco()
        for number, row in enumerate(document["annotations"]):
            row["bbox"] = bbox or [0, 0, 60 - number % 3, 40]
        assert found(check(write(tmp_path / name, document)), what).severity == "warning"


def test_names_of_classes(tmp_path: Path) -> None:
    names = ["traffic light", "traffic-lights", "dog", "hot dog", "class_3", "RBC", "st. bernard", "TV"]
    document = valid_coco()
    document["categories"] = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    config = write(tmp_path, document)
    diagnosis = check(config)
    assert found(diagnosis, "differ only in case").examples == ["'traffic light' = 'traffic-lights'"]
    assert found(diagnosis, "contained in another").examples == ["'dog' in 'hot dog'"]
    assert found(diagnosis, "a number or an abbreviation").examples == ["class 3", "RBC"]
    assert found(diagnosis, '"." or "?"').examples == ["st. bernard"]
    assert found(diagnosis, "without any box").count == 6
    config.vocabulary = VocabularyConfig(only=["dog", "RBC"])
    assert found(check(config), "without any box").count == 2, "of the classes that are used"
    config.vocabulary = VocabularyConfig(phrases={"RBC": "red blood cell", "class_3": "bird"})
    assert not [issue for issue in check(config).issues if "abbreviation" in issue.what]


def test_prompts_that_are_too_long(tmp_path: Path) -> None:
    document = valid_coco()
    document["categories"] = [{"id": number, "name": f"name{number} of thing"} for number in range(1, 90)]
    config = write(tmp_path, document)
    issue = found(check(config), "more than 256 tokens")
    assert issue.examples == ["89 classes: at least 358 tokens"]
    assert issue.severity == "note"
    exact = diagnose({"train": config}, 256, lambda phrases: [7] * len(phrases))
    assert found(exact, "more than 256 tokens").examples == ["89 classes: 714 tokens"]
    config.vocabulary = VocabularyConfig(negatives=20)
    assert not [issue for issue in check(config).issues if "256" in issue.what]


def test_a_class_name_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    document = valid_coco()
    document["categories"][1]["name"] = "long " * 300
    issue = found(check(write(tmp_path, document)), "class names that are too long")
    assert issue.severity == "error"
    assert issue.examples[0].endswith("': at least 301 tokens")


@pytest.mark.parametrize("name", [False, None, [], ""])
def test_images_without_a_name_are_errors(name: Any, tmp_path: Path) -> None:
    document = valid_coco()
    document["images"][0]["file_name"] = name
    (tmp_path / "set.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="images without id or file_name"):
        CocoConfig(path=str(tmp_path / "set.json")).build()


def test_a_class_listed_twice_is_one_class_if_only_one_has_boxes(tmp_path: Path) -> None:
    document = valid_coco()
    document["categories"] = [
        {"id": id, "name": name, "supercategory": "none"} for id, name in enumerate(["cat", "cat", "dog", "0", "0"])
    ]
    document["categories"][4]["name"] = 0
    config = write(tmp_path, document)
    diagnosis = check(config)
    assert found(diagnosis, "listed twice, once without boxes").examples == ["cat", "0"]
    assert not errors(diagnosis)
    source = config.build()
    assert source.category_ids == {"cat": 1, "dog": 2, "0": 3}
    document["annotations"][0]["category_id"] = 0
    with pytest.raises(DataError, match="the classes 'cat' and 'cat' have the same phrase"):
        write(tmp_path, document).build()


def test_images_in_both_training_and_evaluation(tmp_path: Path) -> None:
    train = write(tmp_path / "train", valid_coco())
    other = valid_coco()
    for number, image in enumerate(other["images"]):
        image["file_name"] = f"other{number}.png"
    config = write(tmp_path / "val", other)
    for number in range(12):
        write_image(tmp_path / "val" / f"other{number}.png", compress_level=1)  # other bytes
    (tmp_path / "val" / "other3.png").write_bytes((tmp_path / "train" / "5.png").read_bytes())
    copies = found(check(train, val=config), "under another name", "val")
    assert (copies.severity, copies.examples) == ("warning", ["other3.png is 5.png of train"])
    same = found(check(train, val=train), "images that are also in train,", "val")
    assert same.count == 12
    assert "data.drop_overlap" in same.fix
    (tmp_path / "train" / "7.png").write_bytes((tmp_path / "train" / "5.png").read_bytes())
    assert found(check(train), "under several names").examples == ["5.png = 7.png"]


def test_coco_file_names_of_different_years_are_the_same_image(tmp_path: Path) -> None:
    one, two = valid_coco(1), valid_coco(1)
    one["images"][0]["file_name"], two["images"][0]["file_name"] = "COCO_train2014_000000000009.jpg", "000000000009.jpg"
    train, val = write(tmp_path / "a", one), write(tmp_path / "b", two)
    write_image(tmp_path / "b" / "000000000009.jpg", quality=50)  # other bytes
    assert found(check(train, val=val), "images that are also in train,", "val").count == 1


def test_classes_that_only_the_evaluation_has(tmp_path: Path) -> None:
    other = valid_coco()
    other["categories"][1]["name"] = "Dogs"
    issue = found(
        check(write(tmp_path / "a", valid_coco()), val=write(tmp_path / "b", other)),
        "without any box in training",
        "val",
    )
    assert (issue.severity, issue.examples) == ("warning", ["Dogs ('dog' in training)"])
    more = valid_coco()
    more["categories"][0]["name"] = "Dogs"
    mixture = MixtureConfig(datasets=[write(tmp_path / "a", valid_coco()), write(tmp_path / "c", more)])
    known = check(mixture, val=write(tmp_path / "b", other))
    assert not [issue for issue in known.issues if "without any box in" in issue.what], "one component is enough"
    for category, name in zip(other["categories"], ("car", "bus"), strict=True):
        category["name"] = name
    issue = found(
        check(write(tmp_path / "a", valid_coco()), val=write(tmp_path / "b", other)),
        "without any box in training",
        "val",
    )
    assert (issue.severity, issue.what, issue.count) == ("warning", "all classes are without any box in training", 2)
    assert "nothing if zero-shot evaluation is intended" in issue.fix


@pytest.mark.parametrize(("phrase", "is_reported"), [("red CIRCLE", True), ("the furry dogs", False)])
def test_phrases_without_a_word_of_the_training_data(phrase: str, is_reported: bool, tmp_path: Path) -> None:
    expressions = RefcocoConfig.miniature(tmp_path)
    file = Path(expressions.path, "mini_val.jsonl")
    rows = [json.loads(line) | {"sent": phrase} for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "coco").mkdir()
    train = write(tmp_path / "coco", valid_coco())  # cats and dogs
    issues = [issue for issue in check(train, val=expressions).issues if "any word of the training" in issue.what]
    assert [(issue.severity, issue.examples[0]) for issue in issues] == [("warning", "red circle")] * is_reported


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = write(tmp_path / "mine", valid_coco()), tmp_path / "out"
    main(["check", config.path, "--output", str(out), "vocabulary={phrases: {cat: gray cat}}"])
    assert "0 errors, 0 warnings, 1 note" in capsys.readouterr().out
    assert Image.open(out / "images.png").size[0] > 400
    document = valid_coco()
    document["annotations"][2]["category_id"] = 7
    write(tmp_path / "mine", document, images=False)
    with pytest.raises(SystemExit) as stopped:
        main(["check", config.path, "--output", str(out)])
    assert stopped.value.code == 1
    text = capsys.readouterr().out
    assert text.index("NOTE") < text.index("ERROR train: annotations whose category_id")
    report = json.loads((out / "report.json").read_text())
    assert report["errors"] == 1
    assert report["issues"][0]["examples"] == ["annotation 2: category_id 7"]
    assert report["datasets"]["train"]["classes"] == {"dog": 6, "cat": 5}
    with pytest.raises(SystemExit, match="--quick 0"):
        main(["check", config.path, "--quick", "0"])
    with pytest.raises(SystemExit, match="did you mean `image_root`"):
        main(["check", config.path, "image_rot=x"])


@pytest.mark.skipif(not REAL.exists(), reason=f"no real data in {REAL}")
def test_known_issues_of_real_data(tmp_path: Path) -> None:
    train, val = (CocoConfig(path=str(REAL / "raccoon120" / f"instances_{split}.json")) for split in ("train", "val"))
    diagnosis = check(train, val=val)
    assert found(diagnosis, "under several names").examples == [
        "raccoon-65.jpg = raccoon-98.jpg",
        "raccoon-120.jpg = raccoon-83.jpg",
    ]
    assert [issue.severity for issue in diagnosis.issues if issue.dataset == "val"] == []
    bccd = check(CocoConfig(path=str(REAL / "bccd" / "instances_val.json")))
    assert found(bccd, "abbreviation").examples == ["WBC", "RBC"]
    coco = check(CocoConfig(path=str(REAL / "coco_permissive" / "instances_permissive.json")))
    assert found(coco, "contained in another").examples == ["'dog' in 'hot dog'", "'bear' in 'teddy bear'"]
    assert not errors(coco)
