"""What the command line prints: log messages and warnings in one line, errors without a traceback."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from vg.errors import UserError, out_of_memory, printable


class PrintableFormatter(logging.Formatter):
    """Escapes control characters of names from data, see `printable`."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return "\n".join(map(printable, super().formatMessage(record).split("\n")))


def set_up_messages() -> None:
    """Log to standard error, without the routine messages of libraries and the lines of code that warn."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    for noisy in ("httpx", "datasets", "accelerate", "albumentations"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextmanager
def short_errors(trains: bool) -> Iterator[None]:
    """Print an error that the user can fix as one message and exit with status 1; other errors have a traceback.

    Args:
        trains: the command trains; after it was stopped, further stop signals are ignored.
    """
    try:
        yield
    except SystemExit:
        if trains:  # stopped and saved; a further signal would only replace the message
            from vg.distributed import ignore_stop_signals

            ignore_stop_signals()
        raise
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            sys.exit(0)
        text = str(error)
        if "Original Traceback" in text:  # a DataLoader adds that of its worker
            text = text.split(f"{type(error).__name__}: ")[-1].strip()
        sys.exit("error: " + "\n".join(map(printable, text.split("\n"))))
    except (RuntimeError, MemoryError) as error:
        from vg.distributed import dead_process
        from vg.workers import dead_worker

        if not (message := dead_worker(error) or dead_process(error) or out_of_memory(error)):
            raise
        sys.exit(f"error: {message}")
    finally:
        if distributed := sys.modules.get("vg.distributed"):  # no process group was made without it
            distributed.shut_down()


def _is_output_closed() -> bool:
    """Whether the reader of standard output has ended, as in `vg config x.yaml | head -1`; the rest is discarded."""
    try:
        print(flush=True)
        return False
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it again at exit
        return True
