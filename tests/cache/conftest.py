"""Data and encoders for the tests of feature caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cache.feature_data import write_encoders, write_expressions
from vg.cache import format as cache_format


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data and encoders; shards of two images and of four expressions."""
    write_expressions(tmp_path)
    write_encoders(tmp_path)
    monkeypatch.setitem(cache_format.FORMAT, "images", 2)
    monkeypatch.setitem(cache_format.FORMAT, "expressions", 4)
    return tmp_path
