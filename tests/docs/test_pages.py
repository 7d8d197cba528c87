"""Python blocks run, links resolve, files named in the text exist, and the README fits on a page."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

import vg
from tests.docs.pages import BLOCKS, DOCUMENTS, EXAMPLES, ROOT, Block, blocks, location, prose

PYTHON = [block for block in BLOCKS if block.language == "python" and not block.file]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and the images that the Python blocks name."""
    from PIL import Image

    from vg.cli import main

    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    tiny = ["train.max_steps=1", "data.train.size=8", "data.eval.size=4", "data.workers=0", "data.batch_size=4"]
    tiny += ["train.trackers=[]", "data.eval_batch_size=4"]
    for recipe, runs in (("demo_rec", ["demo", "mine"]), ("demo_grounding_dino", ["detector"])):
        for run in runs:
            verb = ["demo", "--config"] if run == "demo" else ["train"]
            main([*verb, str(ROOT / f"configs/{recipe}.yaml"), f"train.output={folder / 'runs' / run}", *tiny])
    for name in ("street.jpg", "image.jpg"):
        Image.new("RGB", (128, 128), "gray").save(folder / name)
    (folder / "photos").mkdir()
    Image.new("RGB", (128, 128), "gray").save(folder / "photos" / "1.jpg")
    return folder


@pytest.mark.parametrize("block", PYTHON, ids=location)
def test_python_blocks_run(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny models in place of the ones named; `vg` is imported by the first block of a page."""
    code = compile(block.text, f"{block.document}:{block.line}", "exec")
    names = {node.id for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Name)}
    if "inputs" in names:  # a model of transformers and its inputs
        return
    monkeypatch.chdir(folder)
    replaced = block.text.replace("groundingdino_swint_ogc.pth", "runs/detector")
    if "Trainer(" in replaced:
        replaced = replaced.replace('"train.output=runs/mine"', TINY_OVERRIDES)
    exec(compile(replaced, code.co_filename, "exec"), {"vg": vg})


TINY_OVERRIDES = (
    '"train.output=runs/trained", "train.max_steps=1", "data.train.size=8", "data.eval.size=4", "data.workers=0", '
    '"data.batch_size=4", "train.trackers=[]"'
)


def test_notebooks_show_valid_python() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and not source.startswith(("%", "!")):
                ast.parse(source)


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
LINKS = [(document, target) for document in DOCUMENTS for target in LINK.findall(prose(document))]


@pytest.mark.parametrize(("document", "target"), LINKS)
def test_relative_links_resolve(document: str, target: str) -> None:
    if target.startswith(("http://", "https://", "mailto:")):
        return
    path, _, anchor = target.partition("#")
    file = (ROOT / document).parent / path if path else ROOT / document
    assert file.exists(), f"{document}: {target}"
    if anchor:
        headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{document}: {target}"


PATH = re.compile(r"`((?:vg|tests|scripts|configs|csrc|notebooks)/[\w./-]*)`")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_the_text_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    new = {block.file for block in EXAMPLES}
    missing = [path for path in PATH.findall(text) if path not in new and not (ROOT / path).exists()]
    assert not missing, f"{document}: {missing}"


def test_readme_fits_on_a_page_and_shows_two_images() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    images = re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", text)
    assert len(images) == 2
    for image in images:
        assert (ROOT / image).stat().st_size <= 300_000, image


def test_changelog_and_project_description_are_there() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"', project, re.MULTILINE)
    assert version
    assert version[1] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["configs/README.md"])
def test_yaml_blocks_are_valid(document: str) -> None:
    for block in blocks(document):
        if block.language == "yaml":
            assert yaml.safe_load(block.text)
