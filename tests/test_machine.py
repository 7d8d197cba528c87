"""The memory of the machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from vg.machine import available_ram


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available

    def limited(name: str, limit: str) -> int:
        file = tmp_path / "sys/fs/cgroup" / name
        used = file.with_name({"memory.max": "memory.current"}.get(file.name, "memory.usage_in_bytes"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
        used.write_text("300\n")
        found = available_ram(tmp_path)
        file.unlink()
        return found

    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/job\n0::/slurm/job\n")
    for name in ("memory.max", "slurm/memory.max", "slurm/job/memory.max", "memory/memory.limit_in_bytes"):
        assert limited(name, "1000") == 700
        assert limited(name, "200") == 0
    assert limited("memory.max", "max") > free / 2
    assert available_ram(tmp_path / "missing") > free / 2


STEPS = """
import resource, sys
from vg.machine import reuse_freed_memory

if sys.argv[1] == "reuse":
    assert reuse_freed_memory()
import torch

for _ in range(8):  # the heap grows at first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**24) for _ in range(4)]
    tensors.clear()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are settings of glibc")
def test_freed_memory_is_used_again() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", STEPS, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("plain") > 10 * faults("reuse")
