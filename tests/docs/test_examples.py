"""The examples of CONTRIBUTING.md work: they are written to a copy of the package and run there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import CONTRIBUTING_COMMANDS, EXAMPLES, ROOT


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
    shutil.copytree(ROOT / "tests" / "conformance", folder / "tests" / "conformance", ignore=ignored)
    for name in ("__init__.py", "conftest.py", "test_architecture.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
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
    added = "sidecar or toy or median or pairwise_l1 or import_each_other"
    run(scratch, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_architecture.py", "-k", added)
    files = [block.file for block in EXAMPLES if block.language == "python"]
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    for words in (["format", "--check", "--diff"], ["check"]):
        result = subprocess.run(
            [ruff, *words, "--config", str(ROOT / "pyproject.toml"), *files],
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_example_dataset_and_family(scratch: Path) -> None:
    """Check, train and predict with the example dataset and the toy family, as the commands there say."""
    prepare = (
        "from pathlib import Path\nfrom vg.data.sidecar import SidecarConfig\n"
        "Path('mine').mkdir()\nprint(SidecarConfig.miniature(Path('mine')))\n"
    )
    shown = [words for words in CONTRIBUTING_COMMANDS if "mine" in " ".join(words)]
    assert [words[0] for words in shown] == ["check", "train", "predict"]
    printed = run(scratch, "-c", prepare + in_one_process(*shown))
    assert "4 images" in printed
    assert "0 errors" in printed
    assert (scratch / "runs/mine/best/model.safetensors").exists()
    assert (scratch / "prediction.png").exists()


def test_example_loss_term_and_metric(scratch: Path) -> None:
    """Both families log the term; the metric is in the results; the toy family trains on drawn scenes."""
    shown = [words for words in CONTRIBUTING_COMMANDS if "configs/demo_rec.yaml" in words]
    assert len(shown) == 2
    detector = ["train", "configs/demo_grounding_dino.yaml", "model.loss.center=1", "train.max_steps=2"]
    detector += ["data.eval.size=8", "train.output=runs/detector", "data.batch_size=2"]
    run(scratch, "-c", in_one_process(*([*words, *SMALL, "train.log_every=1"] for words in (*shown, detector))))
    for name in ("center", "detector"):
        assert "loss/center" in history_keys(scratch / "runs" / name), name
    assert "median_iou" in history_keys(scratch / "runs/center")
    assert (scratch / "runs/toy/best/model.safetensors").exists()


def history_keys(run: Path) -> set[str]:
    return {key for line in (run / "history.jsonl").read_text().splitlines() for key in json.loads(line)}


def test_example_operator(scratch: Path) -> None:
    run(scratch, "check_operator.py")


def test_examples_pass_the_conformance_tests(scratch: Path) -> None:
    run(scratch, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance", "-k", "sidecar or toy")
