"""`vg config`: print a configuration, or the memory that training with it needs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vg.cli.arguments import add_config
from vg.machine import size_text

if TYPE_CHECKING:
    from vg.config import RunConfig

EPILOG = """
--memory runs training steps on tensors without values, in a minute and without data: nothing of that size is allocated.
Prompts are eight phrases and images have sixteen boxes; more of either need more.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_config(parser)
    parser.add_argument("--memory", action="store_true", help="print the memory of a training step instead")


def run(options: argparse.Namespace) -> None:
    from vg.config import dump_config, load_config

    config = load_config(options.config, options.overrides)
    if options.memory:
        print_memory(config)
    else:
        print(dump_config(config), end="")


def print_memory(config: RunConfig) -> None:
    """Print a row per image size, with the memory of one sample, of a batch, and of twice the batch."""
    from vg.finetuning.sizes import available_memory
    from vg.training.memory import MemoryEstimate

    estimate = MemoryEstimate(config)
    counts = (1, config.data.batch_size, 2 * config.data.batch_size)
    print(f"{'images':>11}" + "".join(f"{f'batch of {count}':>16}" for count in counts))
    for height, width in estimate.sizes:
        steps = [estimate.step(count, (height, width)) for count in counts]
        print(f"{height:>4} x {width:4}" + "".join(f"{size_text(step):>16}" for step in steps), flush=True)
    device, usable = available_memory()
    print(
        f"of these, weights are {size_text(estimate.weights)} and the state of the optimizer "
        f"{size_text(estimate.moments)}; the rest are gradients, activations and temporary tensors.\n"
        f"The allocator adds up to a third on a CPU. {size_text(usable)} are usable on this machine ({device})."
    )
