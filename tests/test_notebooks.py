"""The notebooks run with small models and little data, and their committed outputs are clean.

A notebook has one cell with the tag "parameters", whose values are replaced here, as papermill does.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from vg.checkpoint import write_model
from vg.config import load_config

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
MAX_BYTES = 400_000
POOLED = "model.head={name: pooled, width: 32, layers: 1, heads: 2, feedforward: 64}"
QUICK = ["train.trackers=[]", "model.image={shortest: 64, longest: 64}", "data.batch_size=4"]
# (notebook, values of its parameters, number of images in its outputs); {folder} has the checkpoints of `models`.
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("predict_and_crop", {"MODEL": "{folder}/dense"}, 4),
    ("predict_and_crop", {"MODEL": "{folder}/pooled"}, 4),
    (
        "finetune_own_images",
        {"FOLDER": "{out}/data", "OUTPUT": "{out}/run", "NUM_IMAGES": 10, "OVERRIDES": ["train.max_steps=2", *QUICK]},
        3,
    ),
    (
        "train_rec_on_own_expressions",
        {
            **{"WEIGHTS": "{folder}/dense", "FOLDER": "{out}/data", "OUTPUT": "{out}/run"},
            **{"NUM_TRAIN": 32, "NUM_VAL": 6, "STEPS": 2},
        },
        3,
    ),
    ("inside_grounding_dino", {"MODEL": "{folder}/detector"}, 8),
    ("edit_with_diffusion", {"MODEL": "{folder}/detector", "PIPELINE": None, "SIDE": 64, "STEPS": 2}, 1),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the demos, with random weights, as checkpoints in a folder."""
    folder = tmp_path_factory.mktemp("models")
    for name, recipe, overrides in (
        ("dense", "demo_rec", []),
        ("pooled", "demo_rec", [POOLED]),
        ("detector", "demo_grounding_dino", []),
    ):
        (folder / name).mkdir()
        config = load_config(ROOT / "configs" / f"{recipe}.yaml", overrides)
        write_model(folder / name, config.model.build(), config)
    return folder


def parameters(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


@pytest.mark.parametrize(("name", "values", "num_images"), CASES, ids=[name for name, *_ in CASES])
def test_notebook_runs(name: str, values: dict[str, Any], num_images: int, models: Path, tmp_path: Path) -> None:
    if name == "edit_with_diffusion":
        pytest.importorskip("diffusers", reason="the notebook needs the extra `diffusion`")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cell = parameters(notebook)
    defined = {target.id for line in ast.parse(cell.source).body for target in line.targets}  # type: ignore[attr-defined]
    assert defined == values.keys()
    folders = {"folder": models, "out": tmp_path}
    filled = {key: value.format(**folders) if isinstance(value, str) else value for key, value in values.items()}
    cell.source = "\n".join(f"{key} = {value!r}" for key, value in filled.items())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)}
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(NOTEBOOKS), env=environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == num_images


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_outputs_are_complete_and_clean(path: Path) -> None:
    assert path.stem in {name for name, *_ in CASES}, "add the notebook to CASES"
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run all cells in order"
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", "warnings and progress bars do not belong in the file"
        text = output.get("text", "") or output["data"].get("text/plain", "")
        assert not re.search(r"/(?:home|tmp|root|Users)/|Warning|it/s", text), text


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_title_is_above_the_sections(path: Path) -> None:
    """The first cell begins with the only title; all other headings are one level below it."""
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    assert re.match(r"# \w", sources[0]), sources[0][:80]
    _, *sections = (line for source in sources for line in source.splitlines() if line.lstrip().startswith("#"))
    assert sections
    assert all(section.startswith("## ") for section in sections), sections
