"""The history of a run: history.jsonl has one row per log entry, with the values that the trackers get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vg.files import write_bytes


class History:
    """Rows such as {"step": 20, "loss": 1.2, "loss/l1": 0.4, "lr": 1e-4} and {"step": 500, "miou": 0.61}.

    Keys of losses are "loss/<term>", keys of evaluations those of vg.evaluation.results.EvaluationResult.flat_metrics.
    """

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
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a crash may truncate the last one

    def cut(self, step: int) -> None:
        """Remove the rows after a step, because a resumed run logs them again."""
        rows = [row for row in self.rows() if row["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
