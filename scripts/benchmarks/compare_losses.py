"""Train the same Grounding DINO with different losses: ours, with and without denoising, and that of transformers.

    python scripts/benchmarks/compare_losses.py [--steps N] [--seed N] [--threads N] [--only RUN ...]

Trains the model of the demo on drawn scenes; every image has its own prompt of 2 to 4 phrases. All runs start from the
same weights and use the same batches in the same order, the same optimizer and schedule. They differ in the loss:

    denoising     our loss with mmdetection's weights, and denoising queries
    ours          the same without denoising
    settings      our loss with the settings of transformers: class weight 2 instead of 1; as class cost of the matching
                  1 x the mean over the tokens of the phrase instead of 2 x the sum over the tokens of the prompt
    transformers  the code of transformers: equal to `settings` except for the tokens that it assigns to the phrases
                  of a batch (see tests/losses/test_against_transformers.py)

`transformers` has advantages here over training in transformers. The model is ours: the box heads of all decoder layers
get gradients through the next layer. The losses of all decoder layers are used (`auxiliary_loss`, off by default in
transformers). The encoder loss is computed from the encoder's proposals and trains its heads; transformers computes it
from learned queries and detached boxes, so those heads have no gradient. There is no dropout (0.1 in transformers).

Prints AP50 on the val scenes during training, and a table of all runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from scripts.benchmarks.machine import machine
from scripts.benchmarks.transformers_loss import SETTINGS, transformers_loss
from vg.config import RunConfig, load_config
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset
from vg.data.samplers import EpochSampler
from vg.losses.config import LossConfig
from vg.metrics.coco import CocoMetric
from vg.models.grounding_dino.model import GroundingDino, Output
from vg.training.optim import build_optimizer, build_schedule
from vg.types import Batch

DEMO = Path(__file__).parents[2] / "configs" / "demo_grounding_dino.yaml"
DENOISING = "model.denoising={num_queries: 30, num_labels: 16}"  # in all runs, so their initial weights are equal


class Run(NamedTuple):
    loss: LossConfig | None  # None: the code of transformers
    denoising: bool = False


RUNS = {
    "denoising": Run(LossConfig(), denoising=True),
    "ours": Run(LossConfig()),
    "settings": Run(SETTINGS),
    "transformers": Run(None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="training steps per run (default: %(default)s)")
    parser.add_argument("--points", type=int, default=6, help="evaluations per run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help="(default: all)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine("cpu")
    config = load_config(DEMO, [DENOISING, f"train.max_steps={options.steps}", f"train.seed={options.seed}"])
    curves = {name: train(name, config, max(1, options.steps // options.points)) for name in options.only}

    print("\nAP50 at step | " + " | ".join(f"{name:>12}" for name in curves))
    for step in curves[options.only[0]]:
        print(f"{step:>12} | " + " | ".join(f"{curve[step]:12.3f}" for curve in curves.values()))


def train(name: str, config: RunConfig, every: int) -> dict[int, float]:
    """Train one run and return AP50 after every `every` steps."""
    run = RUNS[name]
    torch.manual_seed(config.train.seed)
    model = config.model.build()
    assert isinstance(model, GroundingDino)
    model.config.loss = run.loss or LossConfig()
    if not run.denoising:
        model.denoising = None
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, config.train.max_steps)
    curve: dict[int, float] = {}
    started = time.perf_counter()
    for step, batch in enumerate(islice(batches(model, config), config.train.max_steps), start=1):
        model.train()
        output = model(batch)
        terms = model.loss(output, batch).values() if run.loss else [loss_of_transformers(output, batch)]
        loss = torch.stack(list(terms)).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        schedule.step()
        if step % every == 0:
            metrics = evaluate(model, config)
            curve[step] = metrics["ap50"]
            print(
                f"{name:12} step {step:5}  loss {loss.item():6.2f}  AP50 {metrics['ap50']:.3f}  AP {metrics['ap']:.3f}"
                f"  {time.perf_counter() - started:4.0f} s",
                flush=True,
            )
    return curve


def loss_of_transformers(output: Output, batch: Batch) -> Tensor:
    encoder = output.encoder_logits, output.encoder_boxes
    return transformers_loss(output.logits, output.boxes, batch.prompt_targets, batch.text, encoder=encoder)


def batches(model: GroundingDino, config: RunConfig) -> Iterator[Batch]:
    """Yield batches, epoch after epoch, without end."""
    data = GroundingDataset(config.data.train.build(), seed=config.train.seed)
    sampler = EpochSampler(data.source, config.train.seed)
    collate = Collator(model.image_spec, model.text_spec, one_prompt=True)
    loader = DataLoader(data, config.data.batch_size, sampler=sampler, collate_fn=collate, drop_last=True)
    for epoch in count():
        data.begin_epoch(epoch)
        sampler.begin_epoch(epoch)
        yield from loader


@torch.no_grad()
def evaluate(model: GroundingDino, config: RunConfig) -> dict[str, float]:
    model.eval()
    metric = CocoMetric()
    collate = Collator(model.image_spec, model.text_spec)
    for batch in DataLoader(GroundingDataset(config.data.eval.build()), batch_size=50, collate_fn=collate):
        metric.update(model.predict(model(batch), batch), batch.targets)
    return metric.compute().metrics


if __name__ == "__main__":
    main()
