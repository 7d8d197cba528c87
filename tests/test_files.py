"""Atomic writes never replace a folder by a file, nor the reverse."""

from __future__ import annotations

from pathlib import Path

import pytest

from vg.files import replacing, write_bytes


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
