"""The examples of CONTRIBUTING.md work: they are written to copies of the package and run there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.pages import CONTRIBUTING_COMMANDS, EXAMPLES, ROOT, Block, section


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
    return copy_with(EXAMPLES, tmp_path_factory.mktemp("scratch"))


def copy_with(examples: list[Block], folder: Path) -> Path:
    """Copy the package to a folder and write the examples there."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("vg", "configs", "csrc", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copytree(ROOT / "tests" / "conformance", folder / "tests" / "conformance", ignore=ignored)
    for name in ("__init__.py", "conftest.py", "test_architecture.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
    for block in examples:
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
    """Imports, length and first sentences, by the same tests as the package; and they pass `make lint`."""
    added = "sidecar or toy or median or pairwise_l1 or import_each_other"
    run(scratch, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_architecture.py", "-k", added)
    files = sorted({str(block.file) for block in EXAMPLES if block.language in ("python", "diff")})
    lint(scratch, "ruff", "format", "--check", "--diff", "--config", str(ROOT / "pyproject.toml"), *files)
    lint(scratch, "ruff", "check", "--config", str(ROOT / "pyproject.toml"), *files)


def test_examples_pass_the_type_check(scratch: Path) -> None:
    lint(scratch, "mypy", "--config-file", str(ROOT / "pyproject.toml"))


def lint(folder: Path, program: str, *words: str) -> None:
    found = shutil.which(program, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{program} is not installed")
    result = subprocess.run([found, *words], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def commands_of(title: str) -> list[list[str]]:
    """Return the commands of a section of CONTRIBUTING.md."""
    return [words for found, words in CONTRIBUTING_COMMANDS if found == title]


def test_the_section_on_datasets_can_be_followed_on_its_own(tmp_path: Path) -> None:
    """Its files and commands, in their order, in a copy of the package without the other examples."""
    own = [block for block in EXAMPLES if section(block.document, block.line) == "A dataset"]
    folder = copy_with(own, tmp_path)
    write, *shown = (words for words in commands_of("A dataset") if len(words) > 2 or words[0] == "python")
    assert write == ["python", "write_mine.py"]
    assert [words[:2] for words in shown] == [["vg", verb] for verb in ("check", "train", "predict")]
    run(folder, *write[1:])
    printed = run(folder, "-c", in_one_process(*(words[1:] for words in shown)))
    assert "4 images" in printed
    assert "0 errors" in printed
    assert (folder / "runs/mine/best/model.safetensors").exists()
    assert (folder / "prediction.png").exists()


def test_example_family(scratch: Path) -> None:
    """Train and evaluate the toy family as the command there shows; what does not support it refuses it by name."""
    (train,) = commands_of("A model family")
    train = [*train[1:], *SMALL]
    run(scratch, "-c", in_one_process(train, ["eval", "runs/toy", "--output", "evaluated"]))
    assert (scratch / "runs/toy/best/model.safetensors").exists()
    table = "image,phrase,left,top,right,bottom\n" + "a.png,red dog,1,1,20,20\nb.png,cat,1,1,20,20\n" * 5
    (scratch / "table").mkdir()
    (scratch / "table" / "table.csv").write_text(table)
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 48), color).save(scratch / "table" / f"{name}.png")
    assert "the family Toy cannot be exported" in refused(scratch, "export", "runs/toy", "toy.pt2")
    assert "the family toy cannot be fine-tuned" in refused(scratch, "finetune", "table", "--model", "runs/toy")


def refused(folder: Path, *words: str) -> str:
    """Run a vg command that ends with one message, and return it."""
    result = subprocess.run(
        [sys.executable, "-m", "vg", *words], cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    assert result.returncode == 1, result.stdout
    assert "Traceback" not in result.stderr
    return result.stderr


def test_example_loss_term_and_metric(scratch: Path) -> None:
    """Both families log the term; the metric is in the results."""
    (shown,) = commands_of("A loss term")
    detector = ["train", "configs/demo_grounding_dino.yaml", "model.loss.center=1", "train.max_steps=2"]
    detector += ["data.eval.size=8", "train.output=runs/detector", "data.batch_size=2"]
    run(scratch, "-c", in_one_process(*([*words, *SMALL, "train.log_every=1"] for words in (shown[1:], detector))))
    for name in ("center", "detector"):
        assert "loss/center" in history_keys(scratch / "runs" / name), name
    assert "median_iou" in history_keys(scratch / "runs/center")


def history_keys(run: Path) -> set[str]:
    return {key for line in (run / "history.jsonl").read_text().splitlines() for key in json.loads(line)}


def test_example_operator(scratch: Path) -> None:
    run(scratch, "check_operator.py")


def test_examples_pass_the_conformance_tests(scratch: Path) -> None:
    run(scratch, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance", "-k", "sidecar or toy")
