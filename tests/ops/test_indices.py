"""The order of queries and offsets beyond 2^31 elements in the CUDA kernels, by a program for the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_indices_of_tiles_and_of_large_tensors(tmp_path: Path) -> None:
    """64 and 192 images of 1,024 x 1,024 pixels; their tensors are reserved memory, of which few pages are used."""
    source, program = Path(__file__).with_name("indices.cpp"), tmp_path / "indices"
    flags = ["-O2", "-std=c++17", "-DVG_EMULATE", f"-I{source.parents[2] / 'csrc'}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    if done.returncode == 2:
        pytest.skip(f"this system does not reserve memory: {done.stderr}")
    assert done.returncode == 0, done.stdout
