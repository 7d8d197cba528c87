"""`vg table`: the table that a paper needs, from finished benchmark results."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """
Runs whose configurations differ by train.seed and train.output only share a row: mean and standard deviation. Every
other run has a row of its own. A split that is not the complete official one is marked, and so is one whose images the
training data may contain.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "results", nargs="+", metavar="RUN", help="folders with the benchmark.json of `vg eval --suite refcoco`"
    )
    parser.add_argument(
        "--output", type=Path, help="file.tex (booktabs), file.md or file.csv (default: print it as markdown)"
    )
    parser.add_argument("--only-ours", action="store_true", help="leave the published results out")


def run(options: argparse.Namespace) -> None:
    from vg.evaluation.benchmark.paper import paper_table
    from vg.evaluation.benchmark.typeset import format_of, markdown
    from vg.files import write_bytes

    typeset = format_of(options.output) if options.output else markdown
    text = typeset(paper_table(options.results, with_published=not options.only_ours))
    if options.output:
        write_bytes(options.output, text.encode())
        print(f"written to {options.output}")
    else:
        print(text, end="")
