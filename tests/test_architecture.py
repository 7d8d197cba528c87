"""Who may import whom, and what every file looks like."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "vg").rglob("*.py"))
FILES = PACKAGE + sorted((ROOT / "scripts").rglob("*.py"))

# Part of vg -> what of vg it may import: a part with everything in it ("models"), or one module of a part
# ("models.base"). Imports inside functions count as well. Entry points stand above; scripts may import anything.
ALLOWED = {
    "__init__": {"config", "trainer", "inference", "types"},  # the public names, imported when they are first used
    "__main__": {"__init__", "commands"},
    "commands": {
        "benchmark",
        "caching",
        "config",
        "trainer",
        "evaluation",
        "checkpoint",
        "distributed",
        "inference",
        "interpolation",
        "data.dataset",
        "data.source",
        "data.doctor",
        "models",
        "models.base",
        "models.grounding_dino.checkpoints",
        "metrics.table",
        "ops",
        "types",
    },
    # The trainer and what sits beside it: no network and no data set by name.
    "trainer": {
        "config",
        "inputs",
        "interpolation",
        "optim",
        "evaluation",
        "training_data",
        "training_state",
        "loss_log",
        "run_folder",
        "distributed",
        "types",
    },
    "training_data": {
        "config",
        "inputs",
        "data.collate",
        "data.dataset",
        "data.overlap",
        "data.source",
        "models.base",
        "types",
    },
    "training_state": {"config", "checkpoint", "lora", "models.base", "optim"},
    "loss_log": {"distributed"},
    "interpolation": {"checkpoint", "config", "evaluation", "models.base", "types"},
    "evaluation": {
        "config",
        "data.collate",
        "data.dataset",
        "data.source",
        "metrics",
        "models.base",
        "distributed",
        "inputs",
        "types",
    },
    "benchmark": {  # judges finished models of every family on data sets by name
        "__init__",
        "config",
        "checkpoint",
        "data",
        "distributed",
        "evaluation",
        "inference",
        "metrics",
        "models",
        "types",
    },
    "inputs": {"config", "data", "models.base", "types"},
    "caching": {"config", "data", "distributed", "evaluation", "inputs", "models.base", "types"},
    "run_folder": {"config", "checkpoint", "history"},
    "checkpoint": {"config", "models.base", "types"},
    "history": set(),
    "inference": {
        "config",
        "checkpoint",
        "models.base",
        "models.grounding_dino.checkpoints",
        "data.collate",
        "data.source",
        "types",
        "boxes",
    },
    # Only the classes of settings: tests/test_config.py proves that no network and no torch comes with them.
    "config": {"data", "models", "optim", "types"},
    "optim": {"lora", "models.base", "types"},
    "lora": {"models.base", "types"},
    "data": {"types", "boxes"},
    "models": {"losses", "ops", "distributed", "types", "boxes"},
    "losses": {"types", "boxes"},
    "metrics": {"types", "boxes"},
    "distributed": {"types"},
    "ops": set(),
    "types": set(),
    "boxes": set(),
}


def module_of(path: Path) -> str:
    """vg/models/rec/config.py -> "models.rec.config"; vg/data/__init__.py -> "data"; vg/__init__.py -> "__init__"."""
    parts = path.relative_to(ROOT / "vg").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in PACKAGE} | {".".join(p.relative_to(ROOT / "vg").parent.parts) for p in PACKAGE}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported, `from vg import boxes` as "vg.boxes"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write where it comes from"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = name.removeprefix("vg.") in MODULES
                yield node.lineno, name if is_module else str(node.module)


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of what a file imports of vg: "types", "models.base", or "__init__" for the package itself."""
    for line, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if name == "vg":
            yield line, "__init__"
        elif name.startswith("vg."):
            yield line, name.removeprefix("vg.")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_imports_point_down(path: Path) -> None:
    part = module_of(path).split(".")[0]
    assert part in ALLOWED, f"vg/{part} is new: say in the table of this test what it may import"
    for line, module in own_imports(path):
        same = module.split(".")[0] == part
        allowed = any(module == entry or module.startswith(f"{entry}.") for entry in ALLOWED[part])
        assert same or allowed, f"{relative(path)}:{line} imports vg.{module}; vg.{part} may import {ALLOWED[part]}"


def test_data_and_models_never_meet() -> None:
    assert not {"models", "config", "trainer"} & ALLOWED["data"]
    assert not {"data", "config", "trainer"} & ALLOWED["models"]


def test_the_table_has_no_circle() -> None:
    parts = {part: {entry.split(".")[0] for entry in entries} for part, entries in ALLOWED.items()}
    while parts:
        bottom = {part for part, needs in parts.items() if not needs & parts.keys()}
        assert bottom, f"these import one another: {sorted(parts)}"
        parts = {part: needs for part, needs in parts.items() if part not in bottom}


def test_one_file_knows_albumentations_and_none_knows_torchvision() -> None:
    users = {
        (relative(path), name.split(".")[0])
        for path in FILES
        for _, name in imports(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert {path for path, name in users if name == "albumentations"} == {"vg/data/augment.py"}
    assert not [path for path, name in users if name == "torchvision"]
    of_ops = {(path, name) for path, name in users if path.startswith("vg/ops/") and name not in ("vg", "torch")}
    assert {pair for pair in of_ops if pair[1] not in sys.stdlib_module_names} == {("vg/ops/patch.py", "transformers")}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_fits_in_one_sitting_and_starts_with_one_sentence(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 320, "split it: about 300 lines are the most that one reads in one sitting"
    if text.strip():  # an empty __init__.py says nothing
        sentence = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        assert re.search(r"[.?!]\)?$|:$", sentence), f"start with one sentence, got {sentence!r}"


def test_no_drawer_for_leftovers() -> None:
    names = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & {"utils", "util", "common", "core", "registry", "engine", "hooks", "helpers", "misc"}


def test_test_files_are_found_under_names_of_their_own() -> None:
    """Folders of tests are packages, so that two files may share a name."""
    for folder in {path.parent for path in (ROOT / "tests").rglob("test_*.py")}:
        assert (folder / "__init__.py").exists(), f"{relative(folder)} needs an empty __init__.py"
