"""The command line: `vg train | eval | predict | check | convert | interpolate | cache | config | demo | ops`.

Every verb is a module with `add_parser`, which declares its arguments, and `run`, which imports what it needs, so that
`vg --help` starts without torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from vg import __version__
from vg.cli import cache, check, config, convert, demo, evaluate, interpolate, ops, predict, train
from vg.errors import UserError

VERBS = (train, evaluate, predict, check, convert, interpolate, cache, config, demo, ops)


def main(arguments: list[str] | None = None) -> None:
    """Run one verb. User errors print one message and exit with status 1, without a traceback."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse does not assign overrides that follow an option
        options.overrides += rest
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "accelerate", "albumentations"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    # On a CPU, torch's threads wait for each other by spinning. With the default count, one other busy program makes
    # training ten times slower; with this one, two times. Torch reads it at import.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    try:
        options.run(options)
    except (UserError, OSError) as error:
        sys.exit(f"error: {_message(error)}")
    finally:
        if "torch" in sys.modules:  # `vg config` does not need it
            from vg.distributed import shut_down

            shut_down()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vg", description="Train and run models that ground phrases in images.")
    parser.add_argument("--version", action="version", version=f"vg {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_parser(verbs)
    return parser


def _message(error: Exception) -> str:
    """The message without the traceback that a DataLoader adds for its worker."""
    text = str(error)
    return text.split(f"{type(error).__name__}: ")[-1].strip() if "Original Traceback" in text else text
