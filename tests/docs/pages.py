"""The pages of the documentation, their code blocks and their commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "configs/README.md",
    "scripts/benchmarks/README.md",
    "vg/README.md",
    "csrc/README.md",
]


class Block(NamedTuple):
    """A fenced code block."""

    document: str
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """Name of the file that the block is an example of, from its first line."""
        match = re.match(r"(?:#|---) (\S+\.(?:py|yaml))\n", self.text)
        return match[1] if match else None


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    pattern = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(document, text[: match.start()].count("\n") + 1, match[1], match[2]) for match in pattern.finditer(text)
    ]


def section(document: str, line: int) -> str:
    """Return the heading of the second level above a line."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()[:line]
    return next((text.removeprefix("## ") for text in reversed(lines) if text.startswith("## ")), "")


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
EXAMPLES = [block for block in BLOCKS if block.document == "CONTRIBUTING.md" and block.file]


def prose(document: str) -> str:
    """Return the text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands() -> Iterator[tuple[str, int, str]]:
    """Document, line and text of every shell command; continued lines and quoted strings over lines are joined."""
    for block in BLOCKS:
        if block.language or "──" in block.text:  # a diagram
            continue
        command, start = "", block.line
        for number, line in enumerate(block.text.splitlines(), start=block.line + 1):
            start = start if command else number
            command += line.removesuffix("\\") + " "
            if line.endswith("\\") or command.count("'") % 2:
                continue
            yield block.document, start, command
            command = ""
    inline = re.compile(r"`((?:vg|python|accelerate|make|torchrun|pip) [^`]+)`")
    for document in DOCUMENTS:
        for match in inline.finditer(prose(document)):
            yield document, 0, " ".join(match[1].split())


def words_of(command: str) -> list[str]:
    """Split a command as a shell does; environment variables before it are dropped, comments too."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return words


COMMANDS = [(document, line, words) for document, line, text in commands() if (words := words_of(text))]
VG_COMMANDS = [(document, line, words[1:]) for document, line, words in COMMANDS if words[0] == "vg"]
CONTRIBUTING_COMMANDS = [(section(page, line), words) for page, line, words in COMMANDS if page == "CONTRIBUTING.md"]
SCRIPTS = sorted({word for _, _, words in COMMANDS for word in words if re.fullmatch(r"scripts/\S+\.py", word)})


def location(value: object) -> str | None:
    """Return the name of a test case: page and line."""
    if isinstance(value, tuple):
        return f"{value[0]}:{value[1]}"
    return str(value)


def is_placeholder(words: list[str]) -> bool:
    """Whether it is a synopsis, such as `vg convert IN OUT --to official|mmdet`."""
    return any(re.fullmatch(r"\[?[A-Z_]{2,}\]?|\S+\|\S+|\[\S*|\S*\]|\.\.\.", word) for word in words if "=" not in word)
