"""Atomic writes keep what they cannot replace, and never replace a folder by a file, nor the reverse."""

from __future__ import annotations

from pathlib import Path

import pytest

from vg.files import read_json, replacing, write_bytes


@pytest.mark.parametrize("error", [OSError("busy"), KeyboardInterrupt()])
def test_a_folder_stays_if_the_new_one_cannot_take_its_name(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise error
        return rename(path, target)

    with monkeypatch.context() as context:
        context.setattr(Path, "rename", fail)
        with pytest.raises(type(error)), replacing(tmp_path / "model") as partial:
            (partial / "weights").write_text("new")
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_what_a_crash_left_is_kept_until_the_new_folder_is_complete(tmp_path: Path) -> None:
    (tmp_path / "model.old").mkdir()
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "model"):
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["model.old"]
    with replacing(tmp_path / "model") as partial:
        (partial / "weights").write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "kept.txt").write_text("mine")
    with pytest.raises(IsADirectoryError, match=r"Is a folder; name a file: '.*results'"):
        write_bytes(tmp_path / "results", b"content")
    assert (tmp_path / "results" / "kept.txt").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["results"]


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with (
        pytest.raises(NotADirectoryError, match=r"Is a file; name a folder: '.*model'"),
        replacing(tmp_path / "model"),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "model").read_text() == "mine"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_in_unicode(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.json").write_text('{"name": "caf\u00e9"}', encoding=encoding)
    assert read_json(tmp_path / "a.json", dict) == {"name": "caf\u00e9"}
