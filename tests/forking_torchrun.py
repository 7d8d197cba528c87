"""torchrun whose processes are forked from one that has imported vg: starting Python takes most of a short run.

Everything else is that of torchrun: rendezvous, environment, restarts, and the end of all processes if one dies.

    python -m tests.forking_torchrun --standalone --nproc_per_node=2 script.py
"""

from __future__ import annotations

import runpy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - as the trainer imports it later
from torch.distributed import run as torchrun

import vg.cli.train
import vg.models.grounding_dino.model
import vg.models.rec.model
import vg.training.trainer  # noqa: F401

own_config = torchrun.config_from_args


def config_from_args(args: Namespace) -> tuple[Any, Any, list[str]]:
    config, _, _ = own_config(args)
    config.start_method = "fork"
    return config, run_file, [args.training_script, *args.training_script_args]


def run_file(*command: str) -> None:
    """Run a script in this process, as Python does."""
    sys.argv, sys.path[0] = list(command), str(Path(command[0]).parent.resolve())
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    torchrun.config_from_args = config_from_args
    torchrun.main()
