"""What people read is written in the field's words: no entry of the glossary's left column comes back."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = sorted(path for folder in ("vg", "scripts", "tests") for path in (ROOT / folder).rglob("*.py"))
OTHER = sorted(
    path
    for pattern in ("*.md", "configs/**/*.md", "configs/**/*.yaml", "scripts/**/*.md", "vg/**/*.md", "csrc/*", "tests/**/*.md")
    for path in ROOT.glob(pattern)
    if path.is_file()
)

# What is not said -> what is said instead. Matched in strings, docstrings, comments and documents.
WORDS = {
    r"pictures?": "image",
    r"judg(?:e|es|ed|ing)": "evaluate, score",
    r"(?:is|are|was|were) worth|worth of": "metric, contribution",
    r"mend(?:s|ed|ing)?": "fix",
    r"put right": "fix",
    r"(?:is|are|was|were|been|be) told|tells?|saying|says": "report, give, log, state",
    r"no numbers?": "non-finite, missing",
    r"(?:is|are|was|were) none": "is missing, is not a ...",
    r"(?<!in )places?(?! of)": "index, position, path",
    r"spelling": "format",
    r"by heart": "memorize",
    r"anew": "again",
    r"the same again": "again, restart",
    r"take leave|takes leave": "shut down",
    r"(?:the )?door to": "wrapper around",
    r"lives|travels": "is in, is passed",
    r"publish|publishes|publishing": "export",
    r"voters?": "candidates",
    r"(?:is|are) asked|asked (?:for|of|about)": "prompted, queried, requested",
    r"shows? (?:a|the|no|which) box(?:es)?": "is matched with",
    r"kinds? of expressions?": "expression type",
    r"data sets?": "dataset",
    r"inside out": "inverted",
    r"so many": "that many",
    r"whoever": "",
    # US spelling
    r"\w*colou?r(?<=our)\w*": "color",
    r"cent(?:re|res|red)": "center",
    r"neighbour\w*": "neighbor",
    r"behaviour\w*": "behavior",
    r"grey": "gray",
    r"licence": "license",
    r"(?:un)?(?:initial|optim|normal|recogn|token|serial|general|summar|visual|synchron|real|organ|minim|maxim|penal|central)is(?:e|es|ed|er|ers|ing|ation|ations)": "-ize",
    r"(?:un)?labelled|labelling|cancelled|modelled": "labeled, ...",
}
NAMES = {"picture", "pictures", "judge", "judged", "told", "others", "each", "thing", "things", "kinds", "mend", "votes", "voters"}
# (file, text) that stays, each for a reason.
ALLOWED = {
    ("vg/cache", "pictures"): "a folder and key of the feature cache on disk",
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string, docstring and comment of a Python file."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every variable, argument, attribute, function and class that a Python file defines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def findings(path: Path) -> list[str]:
    found = []
    pieces = texts(path) if path.suffix == ".py" else enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    for line, text in pieces:
        for pattern, better in WORDS.items():
            for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
                around = text[max(0, match.start() - 30) : match.end() + 30].replace("\n", " ")
                found.append(f"{path.relative_to(ROOT)}:{line}: {match[0]!r} ({better}) in ...{around}...")
    if path.suffix == ".py":
        found += [f"{path.relative_to(ROOT)}:{line}: the name {name}" for line, name in names(path) if name in NAMES]
    return found


@pytest.mark.parametrize("path", [p for p in PYTHON + OTHER if p != Path(__file__)], ids=lambda p: str(p.relative_to(ROOT)))
def test_words_of_the_field(path: Path) -> None:
    found = findings(path)
    assert not found, "\n".join(found)


def test_the_word_list_finds_what_it_is_for() -> None:
    """The patterns are neither blind nor too eager."""
    def hits(text: str) -> list[str]:
        return [pattern for pattern in WORDS if re.search(rf"\b(?:{pattern})\b", text, re.IGNORECASE)]

    for bad in ("a picture", "is judged by", "mend it", "learns by heart", "the colour", "the centre", "initialised", "two data sets"):
        assert hits(bad), bad
    for good in ("an image", "in place", "published weights", "the color", "initialized", "dataset", "center", "a colored box"):
        assert not hits(good), (good, hits(good))
