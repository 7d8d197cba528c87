"""The benchmark of shards at a tiny size."""

from __future__ import annotations

import sys

import pytest

from scripts.benchmarks import shards


def test_the_tables_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--samples=20000", "--copies=45", "--rounds=1", "--cold-rounds=1"]
    monkeypatch.setattr(sys, "argv", ["shards.py", *sizes])
    monkeypatch.setattr(shards, "drawn_images", lambda number, draw=shards.drawn_images: draw(2))
    shards.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("index of 20,000 samples: ")
    assert lines[2].startswith("45 samples, ")
    assert [line.split(" | ")[0] for line in lines[3:]] == ["| read from", "|---|---:|---:|---:|---:|", *_rows(lines)]
    assert _rows(lines) == ["| image files", "| tar", "| parquet"]


def _rows(lines: list[str]) -> list[str]:
    return [line.split(" | ")[0] for line in lines[-3:]]


def test_the_order_has_every_sample_once() -> None:
    order = shards.training_order(45, 4, 0)
    assert sorted(order) == list(range(45))
    assert order != sorted(order)
    blocks = [{index // 4 for index in order[start : start + 16]} for start in (0, 16)]
    assert [len(block) for block in blocks] == [4, 4] or 11 in blocks[0] | blocks[1]
