"""Measure the overhead of the trainer over a bare PyTorch loop on the same model and data, in steps per second.

    python scripts/benchmarks/trainer.py [--config FILE] [KEY=VALUE ...]

Both run in turn in one process. Prints the medians over the rounds and their ratio (1.00: the trainer has no overhead).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from scripts.benchmarks.machine import machine
from vg.config import RunConfig, load_config
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset
from vg.training.optim import build_optimizer
from vg.training.trainer import Trainer
from vg.types import Batch

DEMO = Path(__file__).parents[2] / "configs" / "demo_rec.yaml"
WARM_UP = 5  # steps that are not measured: memory is allocated, workers start


class TimedTrainer(Trainer):
    def step(self, batches: Sequence[Batch]) -> dict[str, Tensor] | None:
        terms = super().step(batches)
        self.times.append(time.perf_counter())
        return terms

    def fit(self) -> dict[str, object]:
        self.times: list[float] = []
        return super().fit()


def trainer_times(config: RunConfig) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        config.train.output = folder
        trainer = TimedTrainer(config)
        trainer.fit()
    return trainer.times


def bare_times(config: RunConfig) -> list[float]:
    """Run a plain training loop: no Accelerate, no logging, no learning rate schedule, no EMA."""
    torch.manual_seed(config.train.seed)
    model = config.model.build().train()
    data = GroundingDataset(config.data.train.build(), seed=config.train.seed)
    collate = Collator(model.image_spec, model.text_spec)
    loader = DataLoader(
        data, config.data.batch_size, shuffle=True, num_workers=config.data.workers, drop_last=True, collate_fn=collate
    )
    optimizer = build_optimizer(model, config.optim)
    times: list[float] = []
    for batch in loader:
        loss = torch.stack(list(model.loss(model(batch), batch).values())).sum()
        loss.backward()
        if config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        if len(times) == config.train.max_steps:
            break
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=DEMO, help="YAML file (default: the rec demo)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the config")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each loop per round (default: %(default)s)")
    options = parser.parse_args()
    machine("cuda" if torch.cuda.is_available() else "cpu")

    rates: dict[str, list[float]] = {"bare loop": [], "trainer": []}
    for _ in range(options.rounds):
        for name, run in (("bare loop", bare_times), ("trainer", trainer_times)):
            config = load_config(options.config, options.overrides)
            config.train.max_steps = options.steps
            times = run(config)[WARM_UP:]
            rates[name].append((len(times) - 1) / (times[-1] - times[0]))
            print(f"{name:10} {rates[name][-1]:6.2f} steps/s", flush=True)
    bare, trainer = (statistics.median(values) for values in rates.values())
    ratios = [ours / bare_rate for ours, bare_rate in zip(rates["trainer"], rates["bare loop"], strict=True)]
    print(f"median: bare loop {bare:.2f}, trainer {trainer:.2f} steps/s; ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
