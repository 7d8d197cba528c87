"""The tests of the operator pass with every implementation, not only the one of this process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILES = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("deform_attn", "edges", "layouts", "operator")]


@pytest.mark.parametrize("backend", ["reference", "emulate"])
def test_operator_tests_pass_with(backend: str) -> None:
    if backend == "emulate" and not shutil.which("g++"):
        pytest.skip("needs g++")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--noconftest"]
    command += ["-k", "not error", *FILES]
    environment = {**os.environ, "VG_DEFORM_ATTN": backend, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
