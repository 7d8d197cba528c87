"""The GPU check with sections that need no GPU: processes, time limits, merged results, tables and requirements."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks import gpu_sections, gpu_tables
from scripts.benchmarks.gpu_sections import SECTIONS
from tests.inference.test_cuda_graphs import Rerun
from tests.models.grounding_dino.tiny import tiny_config
from vg.models.grounding_dino.decoder import CrossModalityDecoder

ROOT = Path(__file__).parents[2]

FAKE = """
import json, subprocess, sys, time
from pathlib import Path
import torch
from scripts import gpu_check
from scripts.benchmarks.gpu_sections import Section

def fails(folder):
    (folder / "measured.json").write_text(json.dumps({"results": [1, 2]}))
    raise AssertionError("a | b")

def hangs(folder):
    (folder / "measured.json").write_text('{"results": [3]}')
    child = subprocess.Popen(["sleep", "60"])
    Path("child").write_text(str(child.pid))
    time.sleep(60)

def crashes(folder):
    import ctypes
    ctypes.string_at(0)

def unfinished(folder):
    (folder / "measured.json").write_text('{"results": [')
    raise ValueError(Path("unfinished").read_text())

gpu_check.SECTIONS = {
    "fine": Section(lambda folder: {"speed": 2}, 1, 60),
    "fails": Section(fails, 1, 60),
    "crashes": Section(crashes, 1, 60),
    "hangs": Section(hangs, 2, 15),
    "unfinished": Section(unfinished, 2, 60),
    "skipped": Section(fails, 3, 60, ("torch", "no_such_package", "pillow")),
}
torch.cuda.is_available = lambda: True
gpu_check.main()
"""


def check(folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Run the fake check; return its exit status, its results and its tables."""
    (folder / "fake.py").write_text(FAKE)
    (folder / "unfinished").write_text("once")
    command = [sys.executable, "fake.py", "--output", "out.json", *options]
    done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    return done.returncode, json.loads((folder / "out.json").read_text()), (folder / "out.md").read_text()


def test_sections_fail_crash_and_hang_alone_and_results_are_merged(tmp_path: Path) -> None:
    status, found, _ = check(tmp_path, "--part", "1")
    assert status == 1
    assert {name: result["passed"] for name, result in found.items()} == {
        "fine": True,
        "fails": False,
        "crashes": False,
    }
    assert found["fine"]["speed"] == 2
    assert found["fails"]["error"] == "AssertionError: a | b"
    assert found["fails"]["measured"] == {"results": [1, 2]}
    assert found["crashes"]["error"] == "the process ended with -11"

    status, found, table = check(tmp_path, "--part", "2")
    assert list(found) == ["fine", "fails", "crashes", "hangs", "unfinished"]
    assert found["hangs"]["error"] == "stopped after 15 s"
    assert found["hangs"]["measured"] == {"results": [3]}
    assert "measured" not in found["unfinished"]
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    assert not child.exists() or child.read_text().split()[2] == "Z", "a process of the section survives"
    assert "| fails | NO |" in table
    assert "AssertionError: a / b" in table

    status, found, table = check(tmp_path, "--part", "3")
    assert status == 0
    assert found["skipped"] == {"passed": None, "install": "no_such_package", "section_seconds": 0.0}
    assert "| skipped | skipped | 0.0 | install no_such_package |" in table
    assert len(found) == 6


def test_a_failed_repetition_keeps_earlier_measurements(tmp_path: Path) -> None:
    earlier = {"unfinished": {"passed": True, "section_seconds": 1.0, "measured": {"results": [7]}}}
    (tmp_path / "out.json").write_text(json.dumps(earlier))
    _, found, _ = check(tmp_path, "--only", "unfinished")
    assert found["unfinished"]["passed"] is False
    assert found["unfinished"]["measured"] == {"results": [7]}


def test_every_part_ends_within_eight_minutes() -> None:
    for part in (1, 2, 3):
        assert 0 < sum(section.seconds for section in SECTIONS.values() if section.part == part) < 480


def op_row(case: str, step: str, contender: str, milliseconds: float) -> dict[str, Any]:
    return {"case": case, "pass": step, "contender": contender, "milliseconds": milliseconds, "milliseconds_cold": 0.5}


def test_tables_have_the_measured_values() -> None:
    forward = {"images": 8, "phrases": 80, "dtype": "bfloat16", "compiled": False, "peak_bytes": 3 << 20}
    step = {"samples_per_second": 40.0, "peak_bytes": 5 << 30}
    results = {
        "op_benchmark": [
            op_row("800x1333 encoder core bfloat16", "forward", "vg cuda", 0.0784),
            op_row("800x1333 encoder core bfloat16", "forward", "transformers", 12.3),
        ],
        "grounding_dino": [
            forward | {"contender": "transformers", "seconds": 0.6},
            forward | {"contender": "vg, new prompt", "seconds": 0.2},
            forward | {"contender": "vg, same prompt", "seconds": 0.19},
        ],
        "cuda_graphs": [{"contender": "eager", "seconds": 0.05}, {"contender": "CUDA graph", "seconds": 0.02}],
        "grounding_dino_training": [
            step | {"contender": "transformers", "seconds": 0.25, "times_as_fast": 1.0},
            step | {"contender": "vg", "seconds": 0.1, "times_as_fast": 2.5},
            step | {"contender": "vg, checkpointing", "seconds": 0.15, "times_as_fast": None},
        ],
    }
    table = gpu_tables.measurements({name: {"measured": {"results": rows}} for name, rows in results.items()})
    assert "| encoder, bfloat16, forward | 45-60 | 78.4 | 500 | 12,300 |  |  |" in table
    assert "| 8 images, 80 phrases, bfloat16 | 600 | 200 | 190 | 3.0x | 3 / 3 |" in table
    assert "| CUDA graph | 20 |" in table
    assert "| vg | 105-125 | 100 | 40 | 2.5x | 5,120 |" in table
    assert "| vg, checkpointing |  | 150 | 40 |  | 5,120 |" in table


def test_the_readme_has_the_rows_and_estimates_of_the_tables() -> None:
    lines = (ROOT / "scripts" / "benchmarks" / "README.md").read_text().splitlines()
    for table in gpu_tables.measurements({}).split("\n\n"):
        header, _, *rows = table.splitlines()
        assert header in lines
        cells = 3 if "estimated" in header else 2
        for row in rows:
            start = "|".join(row.split("|")[:cells]) + "|"
            assert any(line.startswith(start) for line in lines), start


def test_nan_on_the_gpu_fails_the_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forward, calls = CrossModalityDecoder.forward, []

    def broken(*inputs: Any) -> Any:
        calls.append(1)
        logits, *rest = forward(*inputs)
        return logits * float("nan") if len(calls) == 2 else logits, *rest

    monkeypatch.setattr(gpu_sections, "DEVICE", "cpu")
    monkeypatch.setattr(CrossModalityDecoder, "forward", broken)
    with pytest.raises(AssertionError, match="CPU and GPU differ: error of logits nan"):
        gpu_sections.grounding_dino_parity(tmp_path)


def test_a_cuda_graph_is_compared_with_the_eager_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_sections, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_sections, "GRAPH_SIZE", (64, 96))
    monkeypatch.setattr("vg.models.grounding_dino.config.GroundingDinoConfig", lambda **_: tiny_config())
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("vg.inference.cuda_graphs.Recorder", lambda device: Rerun())
    assert gpu_sections.cuda_graphs(tmp_path) == {"error of boxes": 0.0, "error of queries": 0.0}
    results = json.loads((tmp_path / "measured.json").read_text())["results"]
    assert [row["contender"] for row in results] == ["eager", "CUDA graph"]
    broken: Any = lambda function: (lambda: None, function())  # noqa: E731  # never reads its input again
    monkeypatch.setattr("vg.inference.cuda_graphs.Recorder", lambda device: broken)
    with pytest.raises(AssertionError, match=r"a replayed CUDA graph differs from the eager network: boxes"):
        gpu_sections.cuda_graphs(tmp_path)


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""
DATA = ["datasets", "albumentations", "pycocotools", "torchmetrics"]
WITHOUT_DATA = """
from pathlib import Path
from scripts.benchmarks import gpu_sections, grounding_dino, training_step
from scripts import gpu_check
gpu_sections.DEVICE = "cpu"
found = gpu_sections.grounding_dino_parity(Path("."))
assert found.pop("bfloat16 boxes off by") < 0.02
assert len(found) == 4 and all(error <= 1e-6 for error in found.values()), found
"""
TORCH_ONLY = """
import torch, vg.ops
from scripts import gpu_check
from scripts.benchmarks import deform_attn
shapes = ((3, 4),)
vg.ops.deform_attn(torch.ones(1, 12, 2, 4), shapes, torch.rand(1, 5, 2, 1, 3, 2), torch.rand(1, 5, 2, 1, 3))
vg.ops.backend_info()
"""


@pytest.mark.parametrize(
    ("packages", "code"),
    [
        (DATA, WITHOUT_DATA),
        (
            [*DATA, "transformers", "pydantic", "accelerate", "scipy", "PIL", "yaml", "tqdm", "huggingface_hub"],
            TORCH_ONLY,
        ),
    ],
    ids=["without packages for data", "torch only"],
)
def test_packages_that_are_not_needed(packages: list[str], code: str) -> None:
    command = [sys.executable, "-c", f"PACKAGES = {packages}{WITHOUT}{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
