"""The length of a run by the size of its data, and its batches by the size of the memory.

The memory of a step, in bytes:

    4 x parameters + 12 x trained parameters + batch_size x memory of a sample

in float32: a weight, and its gradient and the two moments of AdamW if it is trained.

A sample of a Grounding DINO needs 3 x width x layers x pixels of the largest resized image. The tensors of its
backward pass are 2.1 x width x (encoder + decoder layers) bytes per pixel in float32: measured as 6,416 for Swin-T
(width 256, 12 layers) at 480 x 480 pixels, and 782 for configs/own_small.yaml (width 96, 4 layers); the 3 leaves room
for temporary ones. By `vg config --memory`, it is at most 1.3 in mixed precision, counted as 2; 0.72 with gradient
checkpointing, counted as 1; and 0.35 with both, counted as 2 / 3. That estimate takes half a minute. For rec it takes
seconds, so it is made, and half of it added for temporary tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from accelerate import Accelerator
from accelerate.utils import gather_object

from vg.config import RunConfig
from vg.distributed import processes_per_machine
from vg.errors import ConfigError
from vg.finetuning.recipe import Recipe
from vg.machine import available_ram, size_text
from vg.models.grounding_dino.config import GroundingDinoConfig
from vg.models.rec.config import RecConfig
from vg.training.memory import MemoryEstimate
from vg.training.optim import count_parameters

LARGE, LARGE_EPOCHS = 2000, 12  # samples; epochs for more than that, as on COCO
MAX_EPOCHS = 1000
MANY_PARAMETERS = 50_000_000  # too many for a CPU


@dataclass(frozen=True)
class Resources:
    """What a run can use."""

    device: str
    memory: int  # bytes for each process
    num_processes: int = 1


def sized(recipe: Recipe, num_samples: int, resources: Resources) -> tuple[RunConfig, list[str]]:
    """Set batch size, accumulation, precision, epochs and evaluations; also return why, a sentence each."""
    device, memory, num_processes = resources.device, resources.memory, resources.num_processes
    config = recipe.config
    if device == "cpu":
        config = replace(config, train=replace(config.train, precision="no"))
    per_process = max(1, config.data.batch_size * config.train.accumulate // num_processes)
    per_step = per_process * num_processes
    total, trained = count_parameters(config)
    fixed, per_sample = 4 * total + 12 * trained, sample_bytes(config)
    sizes = [size for size in range(1, per_process + 1) if per_process % size == 0]
    fitting = [size for size in sizes if fixed + size * per_sample <= memory]
    batch_size = max(fitting, default=1)
    need = fixed + batch_size * per_sample
    batches = per_process // batch_size
    sharing, in_all = (f" by each of {num_processes} processes", " in all") if num_processes > 1 else ("", "")
    notes = [
        f"memory: {size_text(memory)} usable on {device}{sharing}; a batch of {batch_size} needs about "
        f"{size_text(need)} (4 bytes x {total / 1e6:.0f} M parameters + 12 bytes x {trained / 1e6:.0f} M trained + "
        f"{size_text(per_sample)} per sample), {batches} batch{'es' * (batches > 1)} per optimizer step "
        f"({per_step} sample{'s' * (per_step > 1)}{in_all})"
    ]
    if device == "cpu" and total > MANY_PARAMETERS:
        notes.append(
            f"WARNING: no GPU, so a step of {per_step} samples takes a minute or more; "
            "--model small trains a small network in minutes"
        )
    if not fitting:
        notes.append(
            "WARNING: a batch of one may not fit: use another machine, --model small, or --lora with published weights"
        )
    steps_per_epoch = max(1, num_samples // per_step)
    epochs = min(recipe.epochs, LARGE_EPOCHS) if num_samples > LARGE else recipe.epochs
    epochs = min(max(epochs, math.ceil(recipe.steps / steps_per_epoch)), MAX_EPOCHS)
    steps = epochs * steps_per_epoch
    notes.append(f"length: {epochs} epochs, {steps} steps; an evaluation per epoch, but at most {recipe.evaluations}")
    schedule = config.optim
    scale = epochs / config.train.epochs
    optim = replace(
        schedule,
        milestones=[max(1, round(scale * milestone)) for milestone in schedule.milestones],
        warmup_steps=min(schedule.warmup_steps, steps // 5),
    )
    train = replace(
        config.train,
        epochs=epochs,
        accumulate=batches,
        eval_first=True,
        eval_every=max(steps_per_epoch, math.ceil(steps / recipe.evaluations)),
    )
    return replace(config, optim=optim, train=train, data=replace(config.data, batch_size=batch_size)), notes


def available_resources(accelerator: Accelerator | None = None) -> Resources:
    """Return what each process can use, at least; the processes of an accelerator must all call it."""
    device, memory = available_memory()
    if accelerator is None:
        return Resources(device, memory)
    if device == "cpu":
        memory //= processes_per_machine(accelerator)
    return Resources(device, min(gather_object([memory])), accelerator.num_processes)


def available_memory() -> tuple[str, int]:
    """Return the device of a run and the bytes that it may use: 0.8 of a GPU or 0.5 of the RAM, of what is free."""
    import torch

    if torch.cuda.is_available():
        return "cuda", int(0.8 * torch.cuda.mem_get_info()[0])
    return "cpu", available_ram() // 2


def sample_bytes(config: RunConfig) -> int:
    """Return the memory that one sample needs in a step; raises ConfigError for a family without an estimate."""
    model = config.model
    if isinstance(model, RecConfig):
        estimate = MemoryEstimate(config)
        few, many = (estimate.step(batch_size, estimate.sizes[-1]) for batch_size in (8, 16))
        return 3 * (many - few) // 16
    if not isinstance(model, GroundingDinoConfig):
        raise ConfigError(
            f"the family {model.name} cannot be fine-tuned: vg/finetuning/sizes.py has no estimate for it"
        )
    pixels, layers = model.image.shortest * model.image.longest, model.encoder_layers + model.decoder_layers
    mixed, checkpointing = config.train.precision != "no", model.gradient_checkpointing
    return int(3 * model.width * layers * pixels * (2 / 3 if mixed else 1) * (1 / 3 if checkpointing else 1))
