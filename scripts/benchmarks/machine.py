"""The machine and the versions that a benchmark ran with: every benchmark prints them before its figures."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def machine(device: str) -> dict[str, Any]:
    """Return date, device, threads, load and versions, and print them."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    try:
        transformers = version("transformers")
    except PackageNotFoundError:
        transformers = "not installed"
    about = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else cpu,
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()],  # more than the number of cores: the machine was busy
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers,
    }
    print("  ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    return about
