"""The memory of this machine: what is free, and how the C library hands it out."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, from malloc.h


def available_ram(root: Path = Path("/")) -> int:
    """Return the bytes of RAM that are available without swapping, at most what a container or job has left."""
    import psutil  # not to delay `vg --help`

    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    own = next((groups / line[3:].strip("/") for line in lines if line.startswith("0::")), groups)
    files = [(folder / "memory.max", folder / "memory.current") for folder in (own, *own.parents)]
    files.append((groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"))
    pairs = [[file.read_text().strip() for file in pair] for pair in files if all(file.is_file() for file in pair)]
    free = [max(0, int(limit) - int(used)) for limit, used in pairs if limit.isdigit()]  # "max": no limit
    return min([psutil.virtual_memory().available, *free])


def reuse_freed_memory() -> bool:
    """Let this program keep the memory of freed tensors, for training on a CPU; call it before torch is imported.

    glibc returns each large tensor to the system when it is freed, and every page of the next one is a page fault: up
    to millions in a training step. Instead, freed memory stays in the heap, in pages of 2 MiB where the system has them
    (`scripts/benchmarks/page_faults.py` measures both). Variables MALLOC_* and THP_MEM_ALLOC_ENABLE of the environment
    take precedence.

    Returns:
        Whether the C library is glibc and accepted it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
