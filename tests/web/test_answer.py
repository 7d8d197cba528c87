"""Boxes of the page: selections, corrections by hand, files."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from vg.errors import DataError
from vg.inference.result import Result
from vg.web.answer import BY_HAND, NUM_SHOWN, PREVIEW, Answer

BOXES = [(10, 10, 30, 30), (11, 10, 31, 30), (50, 20, 90, 40), (0, 0, 100, 50)]


def answer(height: int = 50, width: int = 100) -> Answer:
    boxes = np.array(BOXES, np.float32) * (width / 100)
    image = np.zeros((height, width, 3), np.uint8)
    scores = np.array([0.9, 0.8, 0.6, 0.1], np.float32)
    return Answer.of(Result("photo.jpg", image, ("dog", "cat"), boxes, scores, np.array([0, 0, 1, 0])))


def scores(shown: Answer, threshold: float = 0.3, iou: float = 1) -> list[float]:
    return [round(score, 2) for _, score, _ in shown.shown(threshold, iou).result]


def test_sliders_select() -> None:
    assert scores(answer()) == [0.9, 0.8, 0.6]
    assert scores(answer(), 0.7) == [0.9, 0.8]
    assert scores(answer(), 0.3, 0.5) == [0.9, 0.6]
    assert scores(answer(), 0) == [0.9, 0.8, 0.6, 0.1]


@pytest.mark.parametrize("value", [None, "a", [0.3]], ids=str)
def test_values_that_no_slider_has(value: Any) -> None:
    for selected in ((value, 0.5), (0.5, value)):
        with pytest.raises(DataError, match="threshold and IoU must be numbers"):
            answer().shown(*selected)


def test_at_most_some_boxes_are_shown() -> None:
    many = np.linspace(1, 0.5, 3 * NUM_SHOWN, dtype=np.float32)
    boxes = np.tile(np.array([[0, 0, 9, 9]], np.float32), (len(many), 1))
    image = np.zeros((9, 9, 3), np.uint8)
    shown = Answer.of(Result("x", image, ("dog",), boxes, many, np.zeros(len(many), np.int64))).shown(0, 1)
    assert (len(shown.result), shown.num_selected) == (NUM_SHOWN, len(many))


def test_boxes_with_equal_rows_are_kept() -> None:
    """Their sides agree to 0.1 pixel."""
    boxes = np.array([[10, 10, 50, 50], [10.01, 10, 50, 50]], np.float32)
    values = np.array([0.9, 0.8], np.float32), np.zeros(2, np.int64)
    both = Answer.of(Result("x", np.zeros((100, 100, 3), np.uint8), ("dog",), boxes, *values))
    assert scores(both.with_table(both.shown(0, 1).table(), 0, 1), 0) == [0.9, 0.8]


@pytest.mark.parametrize(("width", "longest"), [(100, PREVIEW[0]), (1000, 1000), (5000, PREVIEW[1])])
def test_preview_is_bounded(width: int, longest: int) -> None:
    shown = answer(width // 2, width).shown(0.7, 0.5)
    on_preview = shown.on_preview()
    assert on_preview.image.shape == (longest // 2, longest, 3)
    assert on_preview.boxes.tolist() == [pytest.approx([0.1 * longest, 0.1 * longest, 0.3 * longest, 0.3 * longest])]
    assert json.loads(shown.text("jsonl")[1])["width"] == width


def test_extreme_image() -> None:
    image = np.zeros((1, 100_000, 3), np.uint8)
    thin = Result("x", image, ("dog",), np.array([[0, 0, 50_000, 1]], np.float32), np.ones(1), np.zeros(1, np.int64))
    shown = Answer.of(thin).shown(0, 1)
    assert shown.on_preview().draw().shape == (1, PREVIEW[1], 3)


def edited(change: Any, threshold: float = 0.3) -> Answer:
    table = answer().shown(threshold, 1).table()
    change(table)
    return answer().with_table(table, threshold, 1)


def test_unchanged_table_changes_nothing() -> None:
    as_numbers = edited(lambda table: None)
    assert scores(as_numbers, 0) == [0.9, 0.8, 0.6, 0.1]
    assert as_numbers.result.phrase_ids.tolist() == [0, 0, 1, 0]


def test_rows_can_be_changed_deleted_and_added() -> None:
    deleted = edited(lambda table: table.pop(0))
    assert scores(deleted, 0) == [0.8, 0.6, 0.1]  # the one below the threshold stays
    moved = edited(lambda table: table[2].__setitem__(4, "95.5"))
    assert moved.result[0] == ("cat", BY_HAND, (50, 20, 95.5, 40))
    renamed = edited(lambda table: table[1].__setitem__(0, "  wild   cat "))
    assert renamed.result[0].phrase == "wild cat"
    assert renamed.result.phrases == ("dog", "cat", "wild cat")
    added = edited(lambda table: table.append(["bird", None, -5, 0, 500, 20]))
    assert added.result[0] == ("bird", BY_HAND, (0, 0, 100, 20))  # clipped
    empty = edited(lambda table: table.append(["", None, None, "", "", ""]))
    assert empty.result[0].box == pytest.approx((33.3, 16.7, 66.7, 33.3))
    assert scores(empty.original(), 0) == [0.9, 0.8, 0.6, 0.1]


def test_a_repeated_edit_changes_nothing() -> None:
    """The table of Gradio reports an edit twice."""
    table = answer().shown(0.3, 1).table()
    table[2][0] = "bird"
    table.append([None] * 6)
    once = answer().with_table(table, 0.3, 1)
    twice = once.with_table(table, 0.3, 1)
    assert sorted(twice.shown(0, 1).table()) == sorted(once.shown(0, 1).table())
    assert len(twice.result) == len(BOXES) + 1


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        (["dog", 0.9, 40, 10, 60, 30], [("dog", 1.0), ("cat", 0.6)]),
        (["bird", 0.9, 10, 10, 30, 30], [("bird", 1.0), ("cat", 0.6)]),
        (None, [("cat", 0.6)]),
    ],
    ids=["moved", "relabeled", "removed"],
)
def test_a_correction_does_not_bring_up_what_nms_dropped(row: list[Any] | None, shown: list[tuple[str, float]]) -> None:
    table = answer().shown(0.3, 0.7).table()
    assert [entry[1] for entry in table] == [0.9, 0.6]
    corrected = answer().with_table([*([row] if row else []), table[1]], 0.3, 0.7)
    assert [tuple(entry[:2]) for entry in corrected.shown(0.3, 0.7).table()] == shown
    assert len(corrected.shown(0, 0.7).result) == len(shown) + 1, "the box below the threshold stays"
    above = answer().with_table([row] if row else [], 0.85, 0.7)
    assert 0.8 in scores(above, 0), "also one that overlaps stays below the threshold"


def test_drawn_boxes_that_overlap_all_stay() -> None:
    drawn = answer(500, 1000).with_box("cat", [(100, 100), (200, 200)]).with_box("cat", [(105, 105), (205, 205)])
    table = drawn.shown(0.3, 0.7).table()
    assert [row[2:] for row in table[:2]] == [[105, 105, 205, 205], [100, 100, 200, 200]]
    assert len(json.loads(drawn.shown(0.3, 0.7).text("jsonl")[1])["boxes"]) == len(table) == 4
    table[3][0] = "bird"
    corrected = drawn.with_table(table, 0.3, 0.7)
    assert [row[0] for row in corrected.shown(0.3, 0.7).table()] == ["bird", "cat", "cat", "dog"]


@pytest.mark.parametrize("row", [["cat", 0.9, 51, 20, 90, 40], ["cat", 0.9, 50, 20, 90, 40]], ids=["near", "equal"])
def test_a_box_moved_onto_another_one_keeps_both(row: list[Any]) -> None:
    table = answer().shown(0.3, 0.7).table()
    corrected = answer()
    for _ in range(2):  # the table of Gradio reports an edit twice
        corrected = corrected.with_table([row, table[1]], 0.3, 0.7)
        assert [entry[:2] for entry in corrected.shown(0.3, 0.7).table()] == [["cat", 1], ["cat", 0.6]]


def test_a_box_relabeled_as_an_overlapping_one_keeps_both() -> None:
    boxes = np.array([[10, 10, 50, 50], [11, 10, 50, 50]], np.float32)
    values = np.array([0.9, 0.8], np.float32), np.array([0, 1])
    pair = Answer.of(Result("x", np.zeros((100, 100, 3), np.uint8), ("dog", "cat"), boxes, *values))
    table = pair.shown(0.3, 0.7).table()
    table[0][0] = "cat"
    corrected = pair
    for _ in range(2):  # the table of Gradio reports an edit twice
        corrected = corrected.with_table(table, 0.3, 0.7)
        assert [row[:2] for row in corrected.shown(0.3, 0.7).table()] == [["cat", 1], ["cat", 0.8]]


@pytest.mark.parametrize(("threshold", "iou"), [(0, 0), (1, 0), (1, 1), (1.1, 0.5)])
def test_sliders_keep_boxes_by_hand(threshold: float, iou: float) -> None:
    drawn = answer().with_box("dog", [(80, 80), (400, 200)]).with_box("dog", [(88, 80), (400, 200)])
    assert scores(drawn, threshold, iou)[:2] == [BY_HAND, BY_HAND]
    unchanged = drawn.with_table(drawn.shown(threshold, iou).table(), threshold, iou)
    assert scores(unchanged, 0) == scores(drawn, 0) == [BY_HAND, BY_HAND, 0.9, 0.8, 0.6, 0.1]


def test_a_drawn_box_that_is_removed_takes_no_other_along() -> None:
    drawn = answer().with_box("dog", [(84, 80), (244, 240)])  # overlaps the best two
    table = drawn.shown(0.3, 0.7).table()
    assert [row[1] for row in table] == [BY_HAND, 0.9, 0.6]
    assert scores(drawn.with_table(table[1:], 0.3, 0.7), 0) == [0.9, 0.8, 0.6, 0.1]
    assert scores(drawn.original(), 0) == [0.9, 0.8, 0.6, 0.1]


def test_boxes_by_hand_are_shown_first_and_limited() -> None:
    """They come before predicted boxes of equal score, and more than the page shows are refused."""
    boxes = np.tile(np.array([[0, 0, 9, 9]], np.float32), (2 * NUM_SHOWN, 1))
    values = np.ones(len(boxes), np.float32), np.zeros(len(boxes), np.int64)
    full = Answer.of(Result("x", np.zeros((9, 9, 3), np.uint8), ("dog",), boxes, *values))
    for _ in range(NUM_SHOWN):
        full = full.with_box("cat", [(0, 0), (400, 400)])
    assert full.shown(0, 1).result.labels == ["cat"] * NUM_SHOWN
    with pytest.raises(DataError, match=f"at most {NUM_SHOWN} boxes by hand"):
        full.with_box("cat", [(0, 0), (400, 400)])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, " ", "row 3 has no phrase"),
        (0, "a\x00", "control character"),
        (2, "left", "row 3: left, top, right and bottom must be numbers"),
        (2, None, "row 3: .* numbers"),
        (3, "nan", "row 3: .* numbers"),
        (3, "inf", "row 3: .* numbers"),
        (2, 95, "row 3: left must be less than right.* 100 x 50 pixels"),
        (5, 10, "row 3: .*top less than bottom"),
        (2, 120, "row 3: left must"),
    ],
)
def test_unusable_rows(column: int, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        edited(lambda table: table[2].__setitem__(column, value))


def test_columns_are_fixed() -> None:
    with pytest.raises(DataError, match="columns"):
        edited(lambda table: table[0].pop())


def test_box_between_two_clicks() -> None:
    drawn = answer().with_box("bird", [(400, 200), (80, 80)])  # the preview has 800 x 400 pixels
    assert drawn.result[0] == ("bird", BY_HAND, (10, 10, 50, 25))
    with pytest.raises(DataError, match="corners are on one line"):
        answer().with_box("bird", [(400, 200), (400, 200)])


def test_files() -> None:
    shown = answer().shown(0.3, 0.5)
    name, record = shown.text("jsonl")
    assert name == "photo.json"
    assert [box["box"] for box in json.loads(record)["boxes"]] == [[10, 10, 30, 30], [50, 20, 90, 40]]
    name, coco = shown.text("coco")
    assert name == "photo.coco.json"
    assert json.loads(coco)["images"] == [{"id": 1, "file_name": "photo.jpg", "height": 50, "width": 100}]
    assert json.loads(coco)["annotations"][1]["bbox"] == [50, 20, 40, 20]
    name, task = shown.text("label-studio")
    value = json.loads(task)[0]["predictions"][0]["result"][0]["value"]
    assert (name, value["x"], value["y"], value["width"]) == ("photo.label-studio.json", 10, 20, 20)
