"""Print the peak memory of real training steps beside the estimate: CONFIG BATCH_SIZE [KEY=VALUE ...]; Linux only."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from vg.config import load_config
from vg.models.base import GroundingModel
from vg.training.memory import MemoryEstimate
from vg.training.optim import build_optimizer, select_trainable
from vg.types import Batch

MMAP_THRESHOLD = -3  # of mallopt: larger tensors are returned to the system when they are freed


def run_steps(model: GroundingModel, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    for _ in range(2):
        torch.stack(list(model.loss(model(batch), batch).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def status(name: str) -> int:
    """Return an entry of the state of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(MMAP_THRESHOLD, 2**15)
    config, batch_size = load_config(sys.argv[1], sys.argv[3:]), int(sys.argv[2])
    estimate = MemoryEstimate(config)
    expected = estimate.step(batch_size, estimate.sizes[-1])
    batches = [estimate.batch(count, estimate.sizes[-1]) for count in (1, batch_size)]
    before = 0
    for batch in batches:  # the first model loads the libraries
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
        model = config.model.build(pretrained=False).train()
        select_trainable(model, config.optim)
        optimizer = build_optimizer(model, config.optim)
        run_steps(model, optimizer, batch)
        found = status("VmHWM") - before
        del model, optimizer
    print(expected, found)


if __name__ == "__main__":
    main()
