"""Compare variants of the rec family, each trained for the same time on crowded drawn scenes or on another recipe.

    python scripts/benchmarks/ablate_rec.py [--minutes 3] [--seeds 3] [--threads 1] [--only ROW ...]

Every row is the recipe (--config, configs/rec/crowded_scenes.yaml) at 64 px with overrides, and the script prints its
`vg train` command. A few steps of all rows are timed first, in turn, to choose `train.max_steps` for the given time,
which excludes evaluation; with one thread their CPU time counts, which other work on the machine changes little. Other
machines take other numbers of steps; the printed command repeats a row exactly on the same type of processor.

Prints mIoU, Acc@0.5, Acc@0.5 of each expression type, and mAP@50 beside the squared accuracy, which is about the mAP of
a head with one box and uninformative scores. With several seeds, means and standard deviations.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks.machine import machine
from vg.config import load_config
from vg.training.trainer import Trainer
from vg.types import Batch, LossName

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "rec" / "crowded_scenes.yaml"
CONVNEXT = (
    "model.vision.architecture={model_type: dinov3_convnext, hidden_sizes: [64, 128], depths: [1, 1], "
    "layer_scale_init_value: 1.0}"
)
SECOND_TEXT = (
    "model.extra_text={frozen: false, architecture: {model_type: bert, vocab_size: 400, hidden_size: 128, "
    "num_hidden_layers: 1, num_attention_heads: 4, intermediate_size: 256, max_position_embeddings: 64, "
    "hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}}"
)
WIDE = [
    "model.head={name: dense, width: 128, layers: 4, heads: 4, feedforward: 256, dropout: 0.0, loss: {token: 2.0}}",
    "model.vision.architecture={model_type: resnet, embedding_size: 64, hidden_sizes: [64, 128], depths: [1, 1], "
    "layer_type: basic}",
]
ONE_PER_SCENE = ["data.expressions_per_image=1", "data.train.expressions_per_scene=1"]
ADAMW = ["optim.algorithm=adamw", "optim.lr=1e-3"]
POOLED = "model.head={{name: pooled, width: 128, layers: 4, heads: 4, feedforward: 256, dropout: 0.0, loss: {{{}}}}}"
POOLED_RECIPE = [CONVNEXT, *ONE_PER_SCENE, "optim.algorithm=adamw", "optim.lr=3e-4"]
ROWS = {
    "the recipe": [],
    "one expression per scene": ONE_PER_SCENE,
    "AdamW": ADAMW,
    "ConvNeXt": [CONVNEXT],
    "no average of weights": ["train.ema=null"],
    "4 layers": ["model.head.layers=4"],
    "6 layers": ["model.head.layers=6"],
    "4 layers of width 128": WIDE,
    "DIoU only": ["model.head.loss={token: 2.0, l1: 0.0, giou: 0.0, diou: 2.0}"],
    "L1 + GIoU + DIoU": ["model.head.loss={token: 2.0, diou: 2.0}"],
    "two levels": ["model.vision.layers=[1, 2]"],
    "two text encoders": [SECOND_TEXT],
    "mirrored views": ["data.augment.flip=0.5"],
    "cropped views": ["data.augment.crop=0.5"],
    "bfloat16": ["train.precision=bf16"],
    "96 px": ["model.image_size=96"],
    "pooled, L1 + GIoU": [*POOLED_RECIPE, POOLED.format("diou: 0.0, l1: 5.0, giou: 2.0")],
    "pooled, DIoU, as published": [*POOLED_RECIPE, POOLED.format("diou: 1.0"), "train.ema=null"],
}
SMALL = "model.image_size=64"  # of all rows, unless they say otherwise
WARM_UP = 5  # steps that are not timed: memory is allocated
TIMED = 12  # steps
ROUNDS = 3


class TimedTrainer(Trainer):
    """Records when each step ends."""

    def fit(self) -> dict[str, Any]:
        self.times: list[float] = []
        self.clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        return super().fit()

    def step(self, batches: Sequence[Batch]) -> dict[LossName, Tensor] | None:
        terms = super().step(batches)
        self.times.append(self.clock())
        return terms


def seconds_per_step(config: Path, overrides: list[str]) -> float:
    """Time a few steps."""
    short = [*overrides, f"train.max_steps={WARM_UP + TIMED}", "data.eval.size=32"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(load_config(config, [*short, f"train.output={folder}"]))
        trainer.fit()
    return statistics.median(after - before for before, after in pairwise(trainer.times[WARM_UP - 1 :]))


def train(config: Path, name: str, overrides: list[str], steps: int, split: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one row with one seed; the result contains the overrides that repeat the run."""
    overrides = [*overrides, "train.epochs=1000", f"train.max_steps={steps}", f"train.eval_every={steps}"]
    overrides += [f"data.eval.split={split}", f"train.seed={seed}"]
    path = config.relative_to(ROOT) if config.is_relative_to(ROOT) else config
    command = shlex.join(["vg", "train", str(path), *overrides])
    print(f"{name}: OMP_NUM_THREADS={torch.get_num_threads()} {command}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        metrics = Trainer(load_config(config, [*overrides, f"train.output={folder}"])).fit()
    result = {"row": name, "seed": seed, "overrides": overrides, "steps": steps, **metrics}
    print(line([result]), flush=True)
    return result


def line(results: list[dict[str, Any]]) -> str:
    """Format a row of the table, in percent: the results of its seeds."""
    cells = [results[0]["row"], str(results[0]["steps"])]
    for name in ("acc@0.5", *(f"{name}/acc@0.5" for name in expression_types(results[0])), "miou", "map@50"):
        values = [100 * result[name] for result in results]
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.1f}{deviation}")
    cells.append(f"{statistics.mean(100 * result['acc@0.5'] ** 2 for result in results):.1f}")
    return "| " + " | ".join(cells) + " |"


def expression_types(result: dict[str, Any]) -> list[str]:
    return [name.removesuffix("/acc@0.5") for name in result if name.endswith("/acc@0.5")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="(default: crowded scenes)")
    parser.add_argument("--minutes", type=float, default=3.0, help="training time per row (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="(default: all)")
    parser.add_argument("--split", default="test", help="evaluation split (default: %(default)s); tune settings on val")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine("cpu")
    variants = {name: [SMALL, *ROWS[name]] for name in options.only}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, overrides in variants.items():
            seconds[name].append(seconds_per_step(options.config, overrides))
    rows = []
    for name, overrides in variants.items():
        steps = max(1, round(60 * options.minutes / statistics.median(seconds[name])))
        print(f"{name}: {1000 * statistics.median(seconds[name]):.0f} ms per step", flush=True)
        seeds = range(options.seeds)
        rows.append([train(options.config, name, overrides, steps, options.split, seed) for seed in seeds])
    columns = ["head", "steps", "Acc@0.5", *expression_types(rows[0][0]), "mIoU", "mAP@50", "Acc@0.5 squared"]
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    print("\n".join(map(line, rows)))
    if options.json:
        options.json.write_text(json.dumps([result for row in rows for result in row], indent=1) + "\n")


if __name__ == "__main__":
    main()
