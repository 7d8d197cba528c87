"""Measure the overhead of the trainer over a bare PyTorch loop that does the same training on the same data.

    python scripts/benchmarks/trainer.py [--config FILE] [KEY=VALUE ...]

One process runs a step of the loop after every step of the trainer. Prints milliseconds per step (CPU time, which other
programs change least, and wall-clock time) and the speed of the trainer relative to the loop (1.00: no overhead), as
medians over the rounds. A round is `train.log_every` steps, so that it has one log entry.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from scripts.benchmarks.machine import machine
from vg.config import RunConfig, load_config
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset
from vg.machine import reuse_freed_memory, use_fast_products
from vg.training.optim import Ema, build_optimizer, build_schedule
from vg.training.trainer import Trainer

DEMO = Path(__file__).parents[2] / "configs" / "demo_rec.yaml"


def bare_loop(config: RunConfig, steps: int) -> Iterator[None]:
    """Run the same training as Trainer in a plain loop, one step per item: no Accelerate, log, checks or IoU."""
    model = config.model.build().train()
    data = GroundingDataset(config.data.train.build(), seed=config.train.seed)
    collate = Collator(model.image_spec, model.text_spec)
    loader = DataLoader(
        data, config.data.batch_size, shuffle=True, num_workers=config.data.workers, drop_last=True, collate_fn=collate
    )
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, steps, len(loader))
    ema = Ema(model, config.train.ema) if config.train.ema else None
    while True:
        for batch in loader:
            loss = torch.stack(list(model.loss(model(batch), batch).values())).sum()
            loss.backward()
            if config.optim.clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            optimizer.step()
            schedule.step()
            if ema:
                ema.update()
            optimizer.zero_grad()
            yield


class AlternatingTrainer(Trainer):
    """Runs a step of the bare loop after every step.

    Attributes:
        times: (CPU, wall-clock) seconds of each step of the trainer and of the loop, in turn.
    """

    def fit(self) -> dict[str, object]:
        self.loop = bare_loop(self.config, self.num_steps)
        self.times: list[tuple[float, float]] = []
        self.clock = time.process_time(), time.perf_counter()
        return super().fit()

    def _after_step(self, bar: tqdm) -> bool:
        finished = super()._after_step(bar)
        self._measure()
        next(self.loop)
        self._measure()
        return finished

    def _measure(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        (cpu, wall), self.clock = self.clock, (time.process_time(), time.perf_counter())
        self.times.append((self.clock[0] - cpu, self.clock[1] - wall))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=DEMO, help="YAML file (default: the rec demo)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the config")
    parser.add_argument("--rounds", type=int, default=20, help="(default: %(default)s)")
    options = parser.parse_args()
    reuse_freed_memory()  # as `vg train`
    use_fast_products()
    machine("cuda" if torch.cuda.is_available() else "cpu")

    config = load_config(options.config, options.overrides)
    length = config.train.log_every
    config.train.max_steps = (options.rounds + 2) * length  # the first and the last round are not measured
    config.train.eval_every = config.train.max_steps  # in the last one: evaluation, checkpoint
    with tempfile.TemporaryDirectory() as folder:
        config.train.output = folder
        trainer = AlternatingTrainer(config)
        trainer.fit()

    times = torch.tensor(trainer.times, dtype=torch.float64)[2 * length : -2 * length]  # [steps of both, 2]
    rounds = times.unflatten(0, (options.rounds, length, 2)).mean(dim=1)  # [rounds, (trainer, loop), (CPU, wall)]
    for index, clock in enumerate(("CPU", "wall-clock")):
        ours, bare = rounds[..., index].mT.tolist()
        ratio = statistics.median(theirs / own for own, theirs in zip(ours, bare, strict=True))
        print(
            f"{clock} time per step: bare loop {1000 * statistics.median(bare):.1f} ms, "
            f"trainer {1000 * statistics.median(ours):.1f} ms; speed {ratio:.3f}"
        )


if __name__ == "__main__":
    main()
