"""What processes agree on: seeds, the state of random numbers, means over processes, and when to stop."""

from __future__ import annotations

import gc
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch import Tensor
from tqdm.auto import tqdm

from vg.errors import ConfigError


def new_accelerator(**options: Any) -> Accelerator:
    """An Accelerator with settings of its own, where Accelerate would insist on those of the first one in a process.

    Raises:
        ConfigError: the machine has no such precision, or a tracker is unknown or not installed.
    """
    AcceleratorState._reset_state()
    for name in options.get("log_with") or ():
        if name.upper() in LoggerType.__members__ and LoggerType(name) not in get_available_trackers():
            raise ConfigError(f"train.trackers: {name} is not installed; install its package or leave it out")
    try:
        return Accelerator(**options)
    except ValueError as error:
        raise ConfigError(f"train.precision or train.trackers: {error}") from error


def shut_down() -> None:
    """End the conversation between processes, at the very end of a program."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # what was trained keeps the threads of the group alive, until the interpreter ends
        torch.distributed.destroy_process_group()


def seed_everything(seed: int) -> None:
    """The same start in every process; what differs between them is the data they get."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The random number generators of this process, as plain values that torch.load reads with weights_only=True."""
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def progress_bar(accelerator: Accelerator, **options: Any) -> tqdm:
    """A bar with an ETA on the main process; in a log file a line now and then instead of a moving bar."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(disable=not accelerator.is_main_process, mininterval=interval, dynamic_ncols=True, **options)


def mean_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    return accelerator.reduce(values, reduction="mean") if accelerator.num_processes > 1 else values


class StopSignal:
    """True once any process was asked to stop (SIGTERM, as schedulers send, or Ctrl-C)."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: signal.Signals | None = None

    def __bool__(self) -> bool:
        """All processes must ask at the same step, for they agree on the answer here."""
        received = self.received is not None
        if self.accelerator.num_processes == 1:
            return received
        flag = torch.tensor(int(received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first signal only sets the flag; a second Ctrl-C interrupts at once as usual."""
        old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def receive(number: int, frame: FrameType | None) -> None:
            self.received = signal.Signals(number)
            signal.signal(number, old[signal.Signals(number)])

        try:
            for number in old:
                signal.signal(number, receive)
        except ValueError:  # not the main thread, as in a notebook server: no signals to listen to
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
