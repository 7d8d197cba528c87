"""What people read is written in the field's words: the replaced words of a glossary do not come back."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = [path for folder in ("vg", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
TEXT = [
    path
    for pattern in ("*.md", "Makefile", "*.toml", "configs/**/*", "scripts/**/*.md", "vg/**/*.md", "csrc/*")
    for path in ROOT.glob(pattern)
    if path.is_file()
]
FILES = sorted(path for path in PYTHON + TEXT if path != Path(__file__))

# Not used -> used instead. Patterns of whole words in strings, docstrings, comments and documents, in any case.
WORDS = {
    r"pictures?": "image",
    r"judg(?:e|es|ed|ing)": "evaluate, score",
    r"(?:is|are|was|were) worth|worth of": "metric, contribution",
    r"mend(?:s|ed|ing)?|put right": "fix",
    r"(?:is|are|was|were|been|be) told|tells?|saying|says": "report, give, log, state",
    r"no numbers?": "non-finite, missing",
    r"(?<!there )(?:is|are|was|were) (?-i:none)": "is missing, is not a ...",
    r"(?<!in )(?<!to )(?<!one )(?<!last )places?(?! of)": "index, position, path",
    r"spelling": "format",
    r"by heart": "memorize",
    r"anew|the same again": "again, restart",
    r"takes? leave": "shut down",
    r"door to": "wrapper around",
    r"lives|travels": "is in, is passed",
    r"publish|publishes|publishing": "export",
    r"voters?": "candidates",
    r"(?:is|are) asked|asked (?:for|of|about)": "prompted, queried, requested",
    r"shows? (?:a|the|no|which) box(?:es)?": "is matched with, predicts",
    r"kinds? of expressions?": "expression type",
    r"data sets?": "dataset",
    r"inside out": "inverted",
    r"so many": "that many",
    r"whoever": "for readers that",
    r"\w*colour\w*": "color",
    r"cent(?:re|res|red)": "center",
    r"neighbour\w*": "neighbor",
    r"behaviour\w*": "behavior",
    r"grey": "gray",
    r"licence": "license",
    r"\w*(?:initial|optim|normal|recogn|token|serial|general|summar|visual|synchron|organ|minim|maxim|penal|central)"
    r"is(?:e|es|ed|er|ers|ing|ation|ations)": "-ize",
    r"(?:un)?labelled|labelling|cancelled|modelled": "labeled, ...",
}
NAMES = {  # of variables, arguments, functions and classes
    *("picture", "pictures", "judge", "judged", "told", "others", "each", "thing", "things", "kinds"),
    *("mend", "votes", "voters", "colour", "centre"),
}
# (path, text that may stay there, reason)
ALLOWED = [
    ("vg/data/synthetic/world.py", r"^kinds$", "a configuration key"),
    ("vg/evaluation/benchmark/slices.py", r"center centre|gray grey", "words of people's expressions"),
]


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Return line and text of every string and comment of a Python file, or of every line of another file."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), start=1)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Return line and name of everything that a Python file defines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def matches(text: str) -> Iterator[tuple[re.Match[str], str]]:
    for pattern, better in WORDS.items():
        for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
            yield match, better


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_of_the_field(path: Path) -> None:
    file = path.relative_to(ROOT).as_posix()
    allowed = "|".join(pattern for prefix, pattern, _ in ALLOWED if file.startswith(prefix)) or "(?!)"
    found = []
    for line, text in texts(path):
        for match, better in matches(text := re.sub(allowed, "", text)):
            context = " ".join(text[max(0, match.start() - 40) : match.end() + 40].split())
            found.append(f"{file}:{line}: {match[0]!r} ({better}) in: {context}")
    if path.suffix == ".py":
        defined = [(line, name) for line, name in names(path) if name in NAMES and not re.search(allowed, name)]
        found += [f"{file}:{line}: the name {name}" for line, name in defined]
    assert not found, "\n".join(found)


def test_exceptions_are_needed() -> None:
    for prefix, allowed, _ in ALLOWED:
        files = [path for path in PYTHON if path.relative_to(ROOT).as_posix().startswith(prefix)]
        assert any(re.search(allowed, text) for path in files for _, text in (*texts(path), *names(path))), prefix


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a picture",
            "is judged by",
            "mend it",
            "by heart",
            "the colour",
            "the centre",
            "initialised",
            "two data sets",
        ),
        *("the loss is none", "weights that are no numbers", "what it is asked", "its place", "an error that says why"),
    ],
)
def test_words_to_avoid_are_found(text: str) -> None:
    assert any(matches(text))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "an image",
            "in place",
            "to place it",
            "published weights",
            "a colored box",
            "initialized",
            "dataset",
            "center",
        ),
        *("the split is None", "if there is none", "in one place", "a judgment", "commend", "displaces"),
    ],
)
def test_words_of_the_field_are_not_found(text: str) -> None:
    assert not any(matches(text))
