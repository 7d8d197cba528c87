"""`vg web` where Gradio is not installed."""

from __future__ import annotations

import sys

import pytest

from vg.cli import main


def test_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vg.web.page", raising=False)
    with pytest.raises(SystemExit, match=r"vg web needs gradio: pip install gradio"):
        main(["web", "runs/demo"])
