"""The history of a run, a file of JSON lines: a row for the losses since the row before, or for an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vg.errors import CheckpointError
from vg.files import read_text, sync, write_bytes


class History:
    """Rows such as {"step": 20, "loss": 1.2, "loss/l1": 0.4, "lr": 1e-4}.

    Keys of evaluations are those of vg.evaluation.results.EvaluationResult.flat_metrics.
    """

    def __init__(self, file: Path):
        self.file = file

    def append(self, row: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows, none without a file; raises CheckpointError for a line that is not a row."""
        if not self.file.exists():
            return []
        lines = read_text(self.file).splitlines(keepends=True)
        rows = []
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):  # a crash may truncate the last one
                continue
            try:
                rows.append({**json.loads(line)})
                int(rows[-1]["step"])
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise CheckpointError(f"{self.file}, line {number}: not a row of a history; remove it") from error
        return rows

    def cut(self, step: int, evaluated: bool, logged: bool) -> None:
        """Remove the rows that a resumed run logs again: those after a step, and those of the step itself.

        Its evaluation is kept if it is `evaluated`, its loss if that is `logged`.
        """
        rows = [row for row in self.rows() if row["step"] <= step]
        rows = [row for row in rows if row["step"] < step or (logged if "loss" in row else evaluated)]
        write_bytes(self.file, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def sync(self) -> None:
        """Write the file from the caches of the system to the disk."""
        if self.file.exists():
            sync(self.file)
