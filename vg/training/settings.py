"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from vg.settings import Settings, no_from_yaml


@dataclass
class TrainConfig(Settings):
    """Training loop: length, precision, evaluation, checkpoints and logging."""

    output: str = "runs/default"
    """Folder of the run: configuration, checkpoints, history, curves."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    epochs: PositiveInt = 10
    max_steps: PositiveInt | None = None
    """Optimizer steps after which the run ends, if the epochs have not ended it before."""
    minutes: PositiveFloat | None = None
    """Minutes of training, with its evaluations and checkpoints, instead of `epochs`: the time of the first steps gives
    their number, and the learning rate is fitted to it. `max_steps` remains a limit. A resumed run keeps the number."""
    accumulate: PositiveInt = 1
    """Batches per optimizer step (gradient accumulation)."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do if the loss or a gradient is not finite. stop: raise at the next log entry. skip: skip the optimizer
    step (abort after 10 consecutive skips); non-finite weights are restored from the last checkpoint. Skipping needs a
    device synchronization in every step."""
    precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(no_from_yaml)] = "no"
    """Mixed precision; use bf16 on GPUs that support it: with "no", products are computed in float32, not in TF32.
    (YAML reads a bare `no` as false, which is accepted.)"""
    compile: bool = False
    """Compile the layers that take most of the time with torch.compile, at the first step and evaluation."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights; if given, the average is evaluated and exported."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; by default after every epoch."""
    eval_first: bool = False
    """Evaluate also before the first step, as a baseline for fine-tuning."""
    save_every: PositiveInt | None = None
    """Steps between checkpoints; by default with every evaluation."""
    keep: PositiveInt = 2
    """Number of resumable checkpoints to keep, besides the best one."""
    best_metric: str | None = None
    """Metric that selects the best checkpoint (higher is better); by default miou for expressions, ap for detection."""
    patience: PositiveInt | None = None
    """Early stopping: end after this many evaluations without a better `best_metric`; by default never."""
    interpolate: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)] | None = None
    """At the end, evaluate interpolations between the initial weights (0) and the best ones (1) at these values, and
    save the best one in the folder `interpolated`; reduces forgetting in fine-tuning (WiSE-FT).
    [0.0, 0.25, 0.5, 0.75, 1.0] is a good choice."""
    log_every: PositiveInt = 10
    """Steps between log entries."""
    preemption_signal: Literal["SIGUSR1", "SIGUSR2"] | None = None
    """Notice of a scheduler that the job will end: the run saves and stops, as it always does on SIGTERM. null: these
    signals have their usual effect, which is to end the program at once."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers of Accelerate: tensorboard, wandb, mlflow, comet_ml, ..."""
