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

# Which part of vg may import which other parts, or single modules of them. Imports inside functions count as well.
# Entry points (cli, scripts) may import anything; everything may import what is in BASE.
BASE = {"errors", "files", "hub", "settings", "types", "boxes", "nms", "machine", "movable"}
ARROWS = """
finetuning -> checkpoint config data distributed evaluation inference models training
training   -> evaluation cache datasets checkpoint config data distributed losses models.base models.saved workers
evaluation -> datasets checkpoint config data distributed inference metrics models workers
datasets   -> cache config data models.base
cache      -> config data distributed models.base workers
export     -> datasets config evaluation inference models ops
inference  -> checkpoint config data metrics.result models.base models.saved models.grounding_dino.checkpoints
web        -> data inference
labeling   -> data inference
checkpoint -> config models.base models.saved
config     -> cache.settings data models training.optim training.settings
data       ->
models     -> losses ops
metrics    ->
losses     ->
workers    -> distributed
distributed ->
ops        ->
"""
ALLOWED = {
    part.strip(): set(needs.split()) for part, needs in (line.split("->") for line in ARROWS.split("\n") if line)
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
def test_imports_follow_the_arrows(path: Path) -> None:
    part = module_of(path).split(".")[0]
    if part in {"__init__", "__main__", "cli"}:
        return
    allowed = BASE if part in BASE else BASE | ALLOWED[part]
    for line, module in own_imports(path):
        same = module.split(".")[0] == part
        fits = any(module == entry or module.startswith(f"{entry}.") for entry in allowed)
        assert same or fits, f"{relative(path)}:{line} imports vg.{module}; vg.{part} may import {sorted(allowed)}"


def test_data_and_models_never_meet() -> None:
    assert not {"models", "config", "training"} & ALLOWED["data"]
    assert not {"data", "config", "training"} & ALLOWED["models"]


def eager_imports(path: Path) -> set[str]:
    """Modules of vg that are imported when this module is: not those inside functions or for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = {name for node in statements for _, name in imports(ast.Module([node], []))}
    return {"__init__" if name == "vg" else name.removeprefix("vg.") for name in found if name.split(".")[0] == "vg"}


def test_no_modules_import_each_other() -> None:
    needs = {module_of(path): eager_imports(path) - {"__init__"} for path in PACKAGE}
    while needs:
        bottom = {module for module, imported in needs.items() if not imported & needs.keys()}
        assert bottom, f"a cycle is among these: {sorted(needs)}"
        needs = {module: imported for module, imported in needs.items() if module not in bottom}


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
    if text.strip():  # an empty __init__.py has none
        sentence = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        assert re.search(r"[.?!]\)?$|:$", sentence), f"start with one sentence, got {sentence!r}"


def test_no_drawer_for_leftovers() -> None:
    names = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & {
        "utils",
        "util",
        "common",
        "core",
        "registry",
        "engine",
        "hooks",
        "helpers",
        "misc",
        "inputs",
        "parts",
    }


def test_test_files_are_found_under_names_of_their_own() -> None:
    """Folders of tests are packages, so that two files may share a name."""
    for folder in {path.parent for path in (ROOT / "tests").rglob("test_*.py")}:
        assert (folder / "__init__.py").exists(), f"{relative(folder)} needs an empty __init__.py"
