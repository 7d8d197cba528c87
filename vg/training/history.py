"""The course of a run: one row per log entry in history.jsonl, the same numbers to the trackers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vg.files import write_bytes


class History:
    """Rows such as {"step": 20, "loss": 1.2, "loss/l1": 0.4, "lr": 1e-4} and {"step": 500, "miou": 0.61}."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be cut short by a crash

    def cut(self, step: int) -> None:
        """Forget what came after a step: a resumed run tells it anew."""
        rows = [row for row in self.rows() if row["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
