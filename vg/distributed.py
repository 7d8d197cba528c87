"""The processes of a run: their accelerator, seeds, means, errors, restarts, progress bar and stop signals."""

from __future__ import annotations

import functools
import gc
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec

import numpy as np
import torch

# Its functions hold the process group as a default argument if it is imported after the group was made; the group then
# outlives shut_down(), and a thread of gloo may abort the process at exit.
import torch.distributed.nn.functional
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    InitProcessGroupKwargs,
    KwargsHandler,
    LoggerType,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous
from tqdm.auto import tqdm

from vg.errors import ConfigError, UserError

P = ParamSpec("P")
# Of processes for the one that downloads, checks data or draws; without it, NCCL ends the run after ten minutes.
LONGEST_WAIT = timedelta(hours=2)
LOGS = "TORCHELASTIC_ERROR_FILE"  # environment variable of torchrun: LOGS/attempt_0/0/error.json


def new_accelerator(**options: Any) -> Accelerator:
    """Create an Accelerator; unlike Accelerate by default, later ones in a process may have other settings.

    Raises:
        ConfigError: the machine does not support the precision, a tracker is unknown or not installed, or Accelerate
            does not join the processes that torchrun started.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if num_processes > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # otherwise, each process would be a run of its own
    # The state of the processes remembers FSDP, but not its settings.
    sharded = PartialState._shared_state.get("distributed_type") == DistributedType.FSDP
    AcceleratorState._reset_state(reset_partial_state=sharded)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers would load weights in one process only
    for name in options.get("log_with") or ():
        if name.upper() in LoggerType.__members__ and LoggerType(name) not in get_available_trackers():
            raise ConfigError(f"train.trackers: {name} is not installed; install its package or leave it out")
    try:
        # Batches in page-locked memory (vg.training.data) are copied while the device computes. MPS, here and in other
        # copies, would read memory that may be freed by then.
        loading = DataLoaderConfiguration(non_blocking=not torch.backends.mps.is_available())
        accelerator = Accelerator(dataloader_config=loading, kwargs_handlers=[_joining()], **options)
    except ValueError as error:
        raise ConfigError(f"train.precision or train.trackers: {error}") from error
    if accelerator.num_processes < num_processes:
        raise ConfigError(
            f"{num_processes} processes were started, but Accelerate does not join them: each would be a run of its "
            "own; start one process, or set ACCELERATE_USE_CPU=true to use the CPU"
        )
    return accelerator


def _joining() -> KwargsHandler:
    """Return how processes find each other, also after torchrun has restarted them, and how long they wait.

    The addresses of the processes before them are still in the store of torchrun, and who reads these fails or waits
    for ever (pytorch issue 135712). The number of restarts becomes a prefix of the keys if all processes are on one
    machine; several machines may count differently.
    """
    restarts, machines = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("GROUP_WORLD_SIZE", "1")
    if restarts == "0" or machines != "1":
        return InitProcessGroupKwargs(timeout=LONGEST_WAIT)

    def join(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
        for store, rank, world_size in rendezvous("env://", **options):
            yield PrefixStore(f"restart_{restarts}", store), rank, world_size

    with suppress(RuntimeError):  # registered by an earlier call
        register_rendezvous_handler("restart", join)
    return InitProcessGroupKwargs(timeout=LONGEST_WAIT, init_method="restart://")


def shut_down() -> None:
    """Destroy the process group; call it last in a program."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # a trained model that is still referenced keeps the threads of the group alive
        torch.distributed.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed all random number generators, with the same seed in every process; only their data differs."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


def seed_batch(seed: int, step: int, batch: int) -> None:
    """Seed all random number generators for one of the batches of an optimizer step, which all processes share.

    Dropout then depends neither on the process that gets the batch nor on interruptions.
    """
    seed_everything(int(np.random.SeedSequence((seed, step, batch)).generate_state(1, np.uint64)[0]))


def dead_process(error: BaseException) -> str:
    """Return the message for the user if a collective failed because another process of the run ended, else ""."""
    if not isinstance(error, RuntimeError) or not re.search("(closed|reset) by peer", str(error)):
        return ""
    return "another process of this run ended, which the launcher names; repeat the command with --resume to continue"


def may_be_restarted() -> bool:
    """Whether torchrun has started this process, which repeats the command after a failure; no collective."""
    return LOGS in os.environ


def launches() -> dict[str, int]:
    """Return what identifies the programs that started the processes of this group, and how often each restarted them.

    The key is the log folder of a torchrun (or `accelerate launch`), one per machine: every program has a new one and
    keeps it when it restarts processes. The id of a job (`--rdzv-id`) would not do: many scripts always use the same.
    Empty if the processes were started in another way.
    """
    if not may_be_restarted():
        return dict(gather_object([]))
    attempt = Path(os.environ[LOGS]).parents[1]
    return dict(sorted(gather_object([(str(attempt.parent), int(attempt.name.removeprefix("attempt_")))])))


def processes_per_machine(accelerator: Accelerator) -> int:
    """Return how many processes share the cores and the memory of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def mean_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Return the element-wise mean of a tensor that all processes have in the same shape; all must call this."""
    return accelerator.reduce(values, reduction="mean") if accelerator.num_processes > 1 else values


@contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Make all processes raise what the main process raises in the block; they would wait for it in a collective."""
    failure: list[Exception | None] = [None]
    try:
        yield
    except (UserError, OSError, RuntimeError) as error:
        if not PartialState().is_main_process:
            raise
        failure = [error]
    broadcast_object_list(failure)  # other processes wait here
    if failure[0] is not None:
        raise failure[0]


def in_main_process(function: Callable[P, None]) -> Callable[P, None]:
    """Run a function, which all processes call, in the main process only; if it fails, all processes raise."""

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> None:
        with raise_on_all_processes():
            if PartialState().is_main_process:
                function(*args, **options)

    return run


def progress_bar(accelerator: Accelerator, **options: Any) -> tqdm:
    """Return a progress bar of the main process; in a log file it prints a line every 10 seconds at most."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(disable=not accelerator.is_main_process, mininterval=interval, dynamic_ncols=True, **options)


# Ctrl-C, the end of a job, and a closed terminal; Windows has the first two.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PREEMPTION_SIGNALS = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


def ignore_stop_signals() -> None:
    """Ignore all stop signals, and those that may be configured as a notice of preemption."""
    for number in STOP_SIGNALS + PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignal:
    """A signal that asks a run to stop (STOP_SIGNALS), received by any of its processes.

    All processes must check at the same step. Each check waits for the other processes (not for the device), so several
    processes check every `interval` steps; the interval of a single process is 1.

    Args:
        preemption: name of a further signal, with which a scheduler gives notice.

    Raises:
        ConfigError: the system has no such signal.
    """

    def __init__(self, accelerator: Accelerator, interval: int = 1, preemption: str | None = None):
        self.signals = STOP_SIGNALS + [number for number in PREEMPTION_SIGNALS if number.name == preemption]
        if preemption and self.signals == STOP_SIGNALS:
            raise ConfigError(f"train.preemption_signal: this system has no {preemption}; set it to null")
        self.accelerator = accelerator
        self.interval = interval if accelerator.num_processes > 1 else 1
        self.received: signal.Signals | None = None

    @functools.cached_property
    def _group(self) -> torch.distributed.ProcessGroup:
        """All processes, with tensors on the host: reading one from a GPU would wait for all work before it."""
        return torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def requested(self) -> bool:
        """Whether any process received a signal."""
        flag = torch.tensor(self.received is not None, dtype=torch.int32)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, self._group)
        return bool(flag)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the context, the first signal sets `received`, and the third one has its usual effect.

        The second one changes nothing, because schedulers and launchers send two. `nohup` is respected.
        """
        if threading.current_thread() is not threading.main_thread():  # only that one can install handlers
            yield
            return
        old = {number: signal.getsignal(number) for number in self.signals}
        if old.get(getattr(signal, "SIGHUP", None)) is signal.SIG_IGN:
            del old[signal.SIGHUP]

        def restore() -> None:
            for number, handler in old.items():
                signal.signal(number, handler)

        def receive(number: int, frame: FrameType | None) -> None:
            name = signal.Signals(number).name
            if self.received is None:
                self.received = signal.Signals(number)
                steps = "this step" if self.interval == 1 else f"at most {self.interval} steps"
                self._say(f"{name} received: saving after {steps}; a third signal ends the run at once, without saving")
            else:
                restore()
                self._say(f"{name} received again: still saving; one more signal ends the run at once")

        try:
            for number in old:
                signal.signal(number, receive)
            yield
        finally:
            restore()

    def _say(self, message: str) -> None:
        """Write to the file of standard error, because a handler may have interrupted its Python object."""
        if self.accelerator.is_main_process:
            with suppress(OSError):  # the terminal is closed
                os.write(2, f"\n{message}\n".encode())
