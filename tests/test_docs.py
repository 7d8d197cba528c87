"""The documentation is executed: its commands parse, its Python blocks run, its examples work, its links resolve."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from vg.cli import VERBS
from vg.config import RunConfig, load_config

ROOT = Path(__file__).parents[1]
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


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
EXAMPLES = [block for block in BLOCKS if block.document == "CONTRIBUTING.md" and block.file]


def commands() -> Iterator[tuple[str, int, str]]:
    """Document, line and text of every shell command; continued lines and quoted strings over lines are joined."""
    for block in BLOCKS:
        if block.language:
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
        text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for match in inline.finditer(text):
            yield document, 0, " ".join(match[1].split())


def words_of(command: str) -> list[str]:
    """Split a command as a shell does; environment variables before it are dropped, comments too."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return words


COMMANDS = [(document, line, words) for document, line, text in commands() if (words := words_of(text))]
PROGRAMS = {"vg", "python", "accelerate", "torchrun", "make", "pip", "pre-commit", "hf", "git", "cd", "g++", "nvcc"}
VG_COMMANDS = [(document, line, words[1:]) for document, line, words in COMMANDS if words[0] == "vg"]
SCRIPTS = sorted({word for _, _, words in COMMANDS for word in words if re.fullmatch(r"scripts/\S+\.py", word)})


def location(value: object) -> str | None:
    if isinstance(value, tuple):
        return f"{value[0]}:{value[1]}"
    return str(value)


def is_placeholder(words: list[str]) -> bool:
    """Whether it is a synopsis, such as `vg convert IN OUT --to official|mmdet`."""
    return any(re.fullmatch(r"\[?[A-Z_]{2,}\]?|\S+\|\S+|\[\S*|\S*\]|\.\.\.", word) for word in words if "=" not in word)


# ---- commands -----------------------------------------------------------------------------------------------------


def test_blocks_without_a_language_are_commands_or_output() -> None:
    """So that no command escapes these tests by a typing error in its name."""
    verbs = {words[0] for _, _, words in COMMANDS}
    assert {"vg", "python", "accelerate", "make"} <= verbs
    assert len(VG_COMMANDS) > 20
    assert len(SCRIPTS) > 6


@pytest.mark.parametrize("command", VG_COMMANDS, ids=location)
def test_vg_commands_parse_and_their_configurations_load(command: tuple[str, int, list[str]]) -> None:
    document, _, words = command
    if len(words) < 2 and words[0] in ("train", "eval", "predict", "check", "convert", "interpolate", "cache"):
        return  # the name of the verb alone
    parser, verbs = vg_parser()
    if is_placeholder(words):
        assert words[0] in verbs
        return
    options, rest = parser.parse_known_args(words)
    assert all("=" in word and not word.startswith("-") for word in rest), f"unrecognized arguments: {rest}"
    config = getattr(options, "config", None) or next((word for word in words if word.endswith(".yaml")), None)
    if config and not is_example(config):
        overrides = [*getattr(options, "overrides", []), *rest]
        if document == "CONTRIBUTING.md" and any("toy" in word or "center" in word for word in overrides):
            return  # belongs to the examples, which are run below
        assert isinstance(load_config(ROOT / config, overrides), RunConfig)


def vg_parser() -> tuple[argparse.ArgumentParser, Any]:
    """The parser of the command line, and its verbs."""
    parser = argparse.ArgumentParser(prog="vg")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in VERBS:
        verb.add_parser(verbs)
    return parser, verbs.choices


def is_example(path: str) -> bool:
    return any(block.file == path for block in EXAMPLES)


@pytest.mark.parametrize(
    "command",
    [command for command in COMMANDS if "scripts/train.py" in command[2]],
    ids=location,
)
def test_commands_of_the_training_script_load_their_configuration(command: tuple[str, int, list[str]]) -> None:
    words = command[2][command[2].index("scripts/train.py") + 1 :]
    if words and words[0] != "...":
        overrides = [word for word in words[1:] if not word.startswith("--")]
        assert isinstance(load_config(ROOT / words[0], overrides), RunConfig)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_exist_and_take_the_options_shown(script: str) -> None:
    source = (ROOT / script).read_text(encoding="utf-8")
    declared = set(re.findall(r"""add_argument\(\s*["'](--[\w-]+)["']""", source))
    for document, line, words in COMMANDS:
        if script in words and "train.py" not in script and "benchmark_refcoco" not in script:
            for word in words[words.index(script) + 1 :]:
                if word.startswith("--"):
                    assert word in declared, f"{document}:{line}: {script} has no option {word}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document, line, words in COMMANDS:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"{document}:{line}: make {words[1]}"


# Settings in running text and tables, such as `train.ema=0.999` or `data.drop_overlap=true`.
SETTING = re.compile(r"`'?((?:model|data|optim|train)\.[\w.]+=[^`]+?)'?`")
SETTINGS = sorted(
    {
        (document, match[1])
        for document in DOCUMENTS
        for match in SETTING.finditer((ROOT / document).read_text(encoding="utf-8"))
    }
)
BASES = ["configs/rec/refcoco.yaml", "configs/grounding_dino/finetune_own.yaml", "configs/rec/refcoco_cached.yaml"]


@pytest.mark.parametrize(("document", "setting"), SETTINGS)
def test_settings_in_the_text_are_valid(document: str, setting: str) -> None:
    """Each is accepted by at least one recipe."""
    words = [setting] if "{" in setting else setting.replace("'", "").split()
    errors = []
    for base in BASES:
        try:
            load_config(ROOT / base, words)
            return
        except Exception as error:
            errors.append(f"{base}: {error}")
    pytest.fail(f"{document}: {setting}\n" + "\n".join(errors))


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_listed(recipe: Path) -> None:
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    assert str(recipe.relative_to(ROOT)) in text


# ---- Python -------------------------------------------------------------------------------------------------------

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
            main(["train", str(ROOT / f"configs/{recipe}.yaml"), f"train.output={folder / 'runs' / run}", *tiny])
    for name in ("scene.png", "street.jpg", "image.jpg"):
        Image.new("RGB", (128, 128), "gray").save(folder / name)
    return folder


@pytest.mark.parametrize("block", PYTHON, ids=location)
def test_python_blocks_run(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny models in place of the ones named; blocks that go on from another program are only compiled."""
    code = compile(block.text, f"{block.document}:{block.line}", "exec")
    names = {node.id for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Name)}
    if "inputs" in names:  # a model of transformers and its inputs
        return
    monkeypatch.chdir(folder)
    replaced = block.text.replace("groundingdino_swint_ogc.pth", "runs/detector")
    if "Trainer(" in replaced:
        replaced = replaced.replace('"train.output=runs/mine"', TINY_OVERRIDES)
    exec(compile(replaced, code.co_filename, "exec"), {})


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


# ---- the examples of CONTRIBUTING.md ------------------------------------------------------------------------------


def apply_diff(path: Path, diff: str) -> None:
    """Replace the old lines of each hunk (separated by @@) by its new ones; the old lines must occur exactly once."""
    text = path.read_text(encoding="utf-8")
    for hunk in diff.split("\n@@\n"):
        lines = hunk.strip("\n").splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if line[:1] in ("", " ", "-"))
        new = "".join(f"{line[1:]}\n" for line in lines if line[:1] in ("", " ", "+"))
        assert text.count(f"\n{old}") == 1, f"{path}: expected exactly once:\n{old}"
        text = text.replace(f"\n{old}", f"\n{new}")
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with all examples of CONTRIBUTING.md in it."""
    folder = tmp_path_factory.mktemp("scratch")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("vg", "configs", "csrc", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("__init__.py", "conftest.py", "test_architecture.py", "conformance"):
        source = ROOT / "tests" / name
        if source.is_dir():
            shutil.copytree(source, folder / "tests" / name, ignore=ignored)
        elif source.exists():
            (folder / "tests").mkdir(exist_ok=True)
            shutil.copy(source, folder / "tests" / name)
    for block in EXAMPLES:
        assert block.file is not None
        path, text = folder / block.file, block.text.partition("\n")[2]
        if block.language == "diff":
            apply_diff(path, text)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            if path.parent.parent.name == "models":
                (path.parent / "__init__.py").touch()
    return folder


def run(folder: Path, *words: str) -> str:
    """Run a program on the scratch copy and return what it printed."""
    result = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def in_one_process(*commands: list[str]) -> str:
    """A program that runs several vg commands: torch is imported once."""
    return f"from vg.cli import main\nfor words in {list(commands)!r}:\n    main(words)\n"


SMALL = ["data.train.size=64", "data.workers=0", "data.eval_batch_size=8", "train.trackers=[]"]


def test_examples_follow_the_house_rules(scratch: Path) -> None:
    """Imports, length and first sentences, by the same tests as the package; and they are formatted."""
    added = "csv_expressions or toy or median or pairwise_l1 or import_each_other"
    run(scratch, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_architecture.py", "-k", added)
    files = [block.file for block in EXAMPLES if block.language == "python"]
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    for words in (["format", "--check", "--diff"], ["check"]):
        result = subprocess.run(
            [ruff, *words, "--config", str(ROOT / "pyproject.toml"), *files], cwd=scratch, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_example_dataset_and_family(scratch: Path) -> None:
    """Check, train and predict with the CSV dataset and the toy family, as the commands there say."""
    prepare = (
        "from pathlib import Path\nfrom vg.data.csv_expressions import CsvConfig\n"
        "Path('mine').mkdir()\nprint(CsvConfig.miniature(Path('mine')))\n"
    )
    shown = [words for document, _, words in VG_COMMANDS if document == "CONTRIBUTING.md" and "mine" in " ".join(words)]
    assert [words[0] for words in shown] == ["check", "train", "predict"]
    printed = run(scratch, "-c", prepare + in_one_process(*shown))
    assert "4 images" in printed or "4 pictures" in printed
    assert "0 errors" in printed
    assert (scratch / "runs/mine/best/model.safetensors").exists()
    assert (scratch / "prediction.png").exists()


def test_example_loss_term_and_metric(scratch: Path) -> None:
    """Both families log the term; the metric is in the results; the toy family trains on drawn scenes."""
    shown = [words for document, _, words in VG_COMMANDS if document == "CONTRIBUTING.md" and "demo_rec" in "".join(words)]
    assert len(shown) == 2
    detector = ["train", "configs/demo_grounding_dino.yaml", "model.loss.center=1", "train.max_steps=2"]
    detector += ["data.eval.size=8", "train.output=runs/detector", "data.batch_size=2"]
    run(scratch, "-c", in_one_process(*([*words, *SMALL, "train.log_every=1"] for words in (*shown, detector))))
    for name in ("center", "detector"):
        assert '"center"' in (history := (scratch / "runs" / name / "history.jsonl").read_text()) or "/center" in history
    assert "median_iou" in (scratch / "runs/center/history.jsonl").read_text()
    assert (scratch / "runs/toy/best/model.safetensors").exists()


def test_example_operator(scratch: Path) -> None:
    run(scratch, "check_operator.py")


def test_examples_pass_the_conformance_tests(scratch: Path) -> None:
    if not (scratch / "tests" / "conformance").exists():
        pytest.skip("there are no conformance tests")
    run(scratch, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance", "-k", "csv or toy")


# ---- links, images, length ----------------------------------------------------------------------------------------

LINKS = [
    (document, target)
    for document in DOCUMENTS
    for target in re.findall(
        r"!?\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.M | re.S)
    )
]


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


# Files visited on the two walks before the layout was made for them.
VISITED_BEFORE = {"RefCOCO": 27, "COCO": 27}


def test_walks_are_short_and_name_files_that_exist() -> None:
    """At most two thirds of the files that the same walks needed before."""
    text = (ROOT / "vg" / "README.md").read_text(encoding="utf-8")
    for name, before in VISITED_BEFORE.items():
        section = re.search(rf"^### Walk: [^\n]*{name}.*?(?=^##)", text, re.MULTILINE | re.DOTALL)
        assert section, name
        files = list(dict.fromkeys(re.findall(r"^\d+\. `([\w/.]+)`", section[0], re.MULTILINE)))
        assert all((ROOT / "vg" / file).exists() for file in files), files
        assert 5 < len(files) <= before * 2 // 3, f"{name}: {len(files)} files"


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
