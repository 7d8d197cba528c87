"""What the loss makes of the same Grounding DINO: ours, with and without denoising, and that of transformers.

    python scripts/benchmarks/compare_losses.py [--steps N] [--seed N] [--threads N] [--only RUN ...]

Trains the model of the demo on drawn scenes, every image with its own prompt of 2 to 4 phrases. All runs start from the
same weights and see the same batches in the same order, with the same optimiser and schedule. They differ in:

    denoising     our loss with mmdetection's weights, and denoising queries
    ours          the same without denoising
    settings      ours with the settings of transformers: class weight 2 instead of 1 in the loss, and in the matching
                  the mean over the tokens of the phrase x 1 instead of the sum over those of the prompt x 2
    transformers  the code of transformers: the same as `settings` but for the tokens that it takes for the phrases
                  of a batch (see tests/losses/test_against_transformers.py)

`transformers` has it better here than when transformers trains. The model is ours: the box heads of all decoder layers
are trained through the next one. The losses of all decoder layers count (`auxiliary_loss`, off by default there). The
encoder loss is defined as there, but on what the encoder proposed, and so it trains the encoder's heads; there it is
about the learned queries and detached boxes, and those heads have no gradient at all. There is no dropout (0.1 there).

Prints the AP50 on the val scenes as training goes on, and a table of all runs.
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
DENOISING = "model.denoising={num_queries: 30, num_labels: 16}"  # built by all runs, so that they draw the same weights


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
    parser.add_argument("--steps", type=int, default=1200, help="of each run (default: %(default)s)")
    parser.add_argument("--points", type=int, default=6, help="evaluations of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help="one or more runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = load_config(DEMO, [DENOISING, f"train.max_steps={options.steps}", f"train.seed={options.seed}"])
    curves = {name: train(name, config, max(1, options.steps // options.points)) for name in options.only}

    print("\nAP50 at step | " + " | ".join(f"{name:>12}" for name in curves))
    for step in curves[options.only[0]]:
        print(f"{step:>12} | " + " | ".join(f"{curve[step]:12.3f}" for curve in curves.values()))


def train(name: str, config: RunConfig, every: int) -> dict[int, float]:
    """AP50 after every so many steps."""
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
        loss = torch.stack(list(model.loss(output, batch).values())).sum() if run.loss else theirs(output, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        schedule.step()
        if step % every == 0:
            numbers = evaluate(model, config)
            curve[step] = numbers["ap50"]
            print(
                f"{name:12} step {step:5}  loss {loss.item():6.2f}  AP50 {numbers['ap50']:.3f}  AP {numbers['ap']:.3f}"
                f"  {time.perf_counter() - started:4.0f} s",
                flush=True,
            )
    return curve


def theirs(output: Output, batch: Batch) -> Tensor:
    encoder = output.encoder_logits, output.encoder_boxes
    return transformers_loss(output.logits, output.boxes, batch.prompt_targets, batch.text, encoder=encoder)


def batches(model: GroundingDino, config: RunConfig) -> Iterator[Batch]:
    """Epoch after epoch without end."""
    data = GroundingDataset(config.data.train.build(), seed=config.train.seed)
    sampler = EpochSampler(len(data), config.train.seed)
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
