"""Issues in the files of a dataset: strict loading raises the first error, `vg check` collects all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vg.errors import DataError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
NUM_EXAMPLES = 3


@dataclass
class Issue:
    """One type of problem in one dataset, with the number of its occurrences.

    An error stops a run or makes it learn the wrong thing; a warning loses data or makes a result unreliable; a note is
    for information.
    """

    severity: Severity
    dataset: str  # "train"
    what: str  # "boxes outside of their image"
    fix: str
    count: int = 0
    examples: list[str] = field(default_factory=list)  # the first few: file or row, and its content
    images: list[int] = field(default_factory=list)  # indices of the first few images with the problem


class Issues(list[Issue]):
    """The issues of one dataset; occurrences of the same problem are counted, not repeated."""

    def __init__(self, dataset: str = "") -> None:
        super().__init__()
        self.dataset = dataset

    def add(
        self,
        severity: Severity,
        what: str,
        fix: str,
        examples: Iterable[str],
        images: Sequence[int] = (),
        count: int | None = None,
    ) -> None:
        """Add occurrences of a problem.

        Args:
            examples: one text per occurrence; without any, nothing is added.
            images: indices of the images with the problem.
            count: number of occurrences, if `examples` are only the first of them.
        """
        examples = list(examples)
        if not examples:
            return
        issue = next((issue for issue in self if issue.what == what), None)
        known = issue or Issue(severity, self.dataset, what, fix)
        known.count += len(examples) if count is None else count
        known.examples = [*known.examples, *examples][:NUM_EXAMPLES]
        known.images = [*known.images, *images][:NUM_EXAMPLES]
        if issue is None:
            self.append(known)


class RaiseFirstError(Issues):
    """Raises the first error, with `file` in its message; ignores warnings and notes, as loading for training does."""

    def __init__(self, file: object, error: type[DataError] = DataError) -> None:
        super().__init__()
        self._file = file
        self._error = error

    def append(self, issue: Issue, /) -> None:
        if issue.severity == "error":
            total = f" ({issue.count} in all)" if issue.count > 1 else ""
            raise self._error(f"{self._file}: {issue.what}: {issue.examples[0]}{total}; {issue.fix}")
