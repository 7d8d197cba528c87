"""Data workers: processes that load batches; their trouble ends the run with a message, never with a wait."""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from vg.distributed import ignore_stop_signals
from vg.errors import ConfigError, DataError

# Open files of a program, and those of each data worker: two batches in training and two in evaluation, of which every
# tensor is an open file, and its pipes. Rounded up from measurements with both families.
OPEN_FILES, OPEN_FILES_PER_WORKER = 64, 48


def new_loader(
    data: Dataset[Any], workers: int, kind: Callable[..., DataLoader[Any]] | None = None, **options: Any
) -> DataLoader[Any]:
    """Return a DataLoader, or one of the subclass `kind`, whose workers end and fail as described above.

    Args:
        workers: processes that load batches; 0 loads in this one.
        options: further arguments of the DataLoader.

    Raises:
        ConfigError: the limit of open files is too low for that many workers, which would wait for ever.
    """
    if workers and sys.platform != "win32":
        _allow_open_files(workers)
    # With a generator of its own, a loader does not advance the global one, from which a resumed run would differ.
    options |= {"num_workers": workers, "worker_init_fn": start_worker, "generator": torch.Generator()}
    return kind(data, **options) if kind else DataLoader(data, **options)


def _allow_open_files(workers: int) -> None:
    import resource

    needed = OPEN_FILES + OPEN_FILES_PER_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"data.workers={workers} needs about {needed} open files, but the limit is {hard}: run `ulimit -n "
            f"{max(4096, needed)}` before, or use fewer data.workers (0 loads in the main process)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def start_worker(_: int) -> None:
    """Initialize a data worker (`worker_init_fn`): only its main process, which needs the data to stop, may end it.

    Schedulers, containers and terminals send a stop signal to all processes of a run.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = _report  # type: ignore[attr-defined]
    ignore_stop_signals()
    if not hasattr(signal, "sigwaitinfo"):
        return

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=wait, daemon=True).start()


def _report(queue: Any, error: Exception, item: Any) -> None:
    """Send an error in place of a batch that cannot be sent; Python prints it, and the main process waits for ever."""
    advice = "raise its limit (ulimit -n, or --shm-size of a container), or set data.workers=0"
    failure = DataError(f"a data worker cannot send a batch: {error}; {advice}")
    with suppress(TypeError):  # not a batch
        queue.put((item[0], ExceptionWrapper((DataError, failure, None), "in a data worker")))


def dead_worker(error: BaseException) -> str:
    """Return the message for the user if torch raised an error because a data worker was killed, else ""."""
    found = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
    reason = str(error).strip().splitlines()[-1].rstrip(".") if found else ""
    return reason and (
        f"{reason}: often because memory or shared memory was short; use fewer data.workers (0 loads in the main "
        "process) or a smaller data.batch_size. A training continues with --resume"
    )
