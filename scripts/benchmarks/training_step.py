"""Measure a training step of Grounding DINO in vg and in transformers, which uses its own loss.

    python scripts/benchmarks/training_step.py [--threads 2] [--rounds 5] [--dtype float32]

Full size (Swin-T, BERT) with random weights; nothing is downloaded. A step is the forward pass, loss, backward pass,
clipping and AdamW. Both models start from the same weights and get the same images, prompts and boxes; outputs and
losses are compared first. transformers supervises all decoder layers (`auxiliary_loss`), like vg and all published
models, and vg uses the loss weights and matching of transformers. Dropout keeps each implementation's defaults: BERT
dropout and drop path in both, and 0.1 in the encoder and decoder layers of transformers, where published models and vg
have none.

The contenders run in turn in one process, after one warm-up step each, and medians are reported. Memory is the peak
during a step above weights and AdamW state, so it includes gradients; on a CPU it is measured in separate processes.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

from scripts.benchmarks.deform_attn import DTYPES, Clock
from scripts.benchmarks.grounding_dino import (
    FIRST_WORD,
    TRANSFORMERS,
    WARM_UP_SIZE,
    Case,
    batch_of,
    differences,
    faults_of,
    model_of_transformers,
    model_of_vg,
    parser_of,
    pixels,
    prompts,
    set_up,
)
from scripts.benchmarks.transformers_loss import SETTINGS
from vg.data.collate import prompt_targets
from vg.models.grounding_dino.model import GroundingDino
from vg.types import Batch, Target

VG, CHECKPOINTING = "vg", "vg, checkpointing"
NAMES = (TRANSFORMERS, VG, CHECKPOINTING)
FULL_STOP = 1012
BOXES = 5  # per image
LEARNING_RATE, CLIP_NORM = 1e-5, 0.1
TOLERANCE = 0.01  # relative, of losses: the order of almost equal queries makes a small difference


class Contender(NamedTuple):
    model: nn.Module
    loss: Callable[[Any, Batch], Tensor]
    optimizer: AdamW


def contenders(theirs: GroundingDinoForObjectDetection, ours: GroundingDino) -> dict[str, Contender]:
    """Return all contenders; those of vg share their weights and their optimizer."""
    ours.config.loss = SETTINGS
    theirs.config.auxiliary_loss = True
    plain = Contender(ours, loss_of_vg, optimizer_of(ours))
    return {
        TRANSFORMERS: Contender(theirs, loss_of_transformers, optimizer_of(theirs)),
        VG: plain,
        CHECKPOINTING: plain._replace(model=with_checkpointing(ours)),
    }


def optimizer_of(model: nn.Module) -> AdamW:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def with_checkpointing(ours: GroundingDino) -> GroundingDino:
    """Build a second model with the same parameters, on the same device."""
    model = replace(ours.config, gradient_checkpointing=True).build(pretrained=False)
    model.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    model.text_spec = ours.text_spec  # its vocabulary file is deleted
    return model.to(next(ours.parameters()).device)  # buffers that a state dict lacks, such as the indices of Swin


def loss_of_transformers(model: GroundingDinoForObjectDetection, batch: Batch) -> Tensor:
    return outputs_of_transformers(model, batch).loss


def outputs_of_transformers(model: GroundingDinoForObjectDetection, batch: Batch) -> Any:
    labels = [{"class_labels": target.phrase_ids, "boxes": target.boxes} for target in batch.targets]
    return model(batch.images, batch.text.token_ids, attention_mask=batch.text.mask.long(), labels=labels)


def loss_of_vg(model: GroundingDino, batch: Batch) -> Tensor:
    return torch.stack(list(model.loss(model(batch), batch).values())).sum()


# ---- inputs -------------------------------------------------------------------------------------------------------


def labeled(case: Case) -> Batch:
    """Return the images and prompts of the forward benchmark, with boxes for the phrases in turn."""
    ids = prompts(case)
    batch = batch_of(pixels(case), ids)
    phrase = torch.where(ids >= FIRST_WORD, (ids == FULL_STOP).cumsum(dim=1), -1)  # [R, T], -1: not a word
    phrase_numbers = torch.arange(case.phrases, device=ids.device)
    generator = torch.Generator().manual_seed(2)
    targets = []
    for image in range(case.images):
        centers, sizes = torch.rand(2, BOXES, 2, generator=generator)
        boxes = torch.cat((0.25 + 0.5 * centers, 0.05 + 0.4 * sizes), dim=-1).to(ids.device)  # [N, 4]
        phrases = tuple(f"phrase {number}" for number in range(case.phrases))
        phrase_ids = torch.arange(BOXES, device=ids.device) % case.phrases
        targets.append(Target(str(image), case.size, phrases, boxes, phrase_ids))
    text = batch.text._replace(phrase_tokens=phrase.unsqueeze(1) == phrase_numbers.view(1, -1, 1))  # [R, P, T]
    return replace(batch, text=text, targets=targets, prompt_targets=prompt_targets(text, targets))


def call(case: Case, contender: Contender) -> Callable[[], Tensor]:
    """Return a function that runs a training step and returns its loss."""
    batch, half = labeled(case), case.dtype != "float32"
    model, loss_of, optimizer = contender

    def step() -> Tensor:
        with torch.autocast(case.device, DTYPES[case.dtype] if half else None, enabled=half):
            loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    model.train()
    return step


# ---- measuring ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses(case: Case, theirs: GroundingDinoForObjectDetection, ours: GroundingDino) -> dict[str, tuple[float, float]]:
    """Return the loss terms of the last decoder layer, ours and those of transformers; see `loss_faults`."""
    batch = labeled(case)
    terms = outputs_of_transformers(theirs, batch).loss_dict
    expected = {"class": SETTINGS.class_weight * terms["loss_ce"], "l1": SETTINGS.l1 * terms["loss_bbox"]}
    expected |= {"giou": SETTINGS.giou * terms["loss_giou"]}
    found = {str(name): value for name, value in ours.loss(ours(batch), batch).items()}
    return {name: (float(found[name]), float(value)) for name, value in expected.items()}


def loss_faults(terms: dict[str, tuple[float, float]]) -> list[str]:
    """Return a message per loss term that is NaN or differs by more than TOLERANCE."""
    return [
        f"the {name} loss is {ours:.4f}, that of transformers {theirs:.4f}"
        for name, (ours, theirs) in terms.items()
        if not abs(ours - theirs) < TOLERANCE * theirs
    ]


def peak_bytes_alone(config: GroundingDinoConfig, case: Case, name: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    theirs = model_of_transformers(config)
    contender = contenders(theirs, model_of_vg(theirs))[name]
    call(replace(case, size=WARM_UP_SIZE, images=1), contender)()  # creates the state of AdamW
    return Clock(case.device, False).peak_bytes(call(case, contender))


def peak_bytes(config: GroundingDinoConfig, case: Case, name: str, step: Callable[[], Tensor]) -> int | None:
    if case.device == "cuda":
        return Clock(case.device, False).peak_bytes(step)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        peak = process.submit(peak_bytes_alone, config, case, name, torch.get_num_threads()).result()
    if peak is not None:
        print(f"{name}: {peak / 2**20:.0f} MiB", flush=True)  # an interrupted run keeps its results
    return peak


def measure(
    config: GroundingDinoConfig, case: Case, everyone: dict[str, Contender], rounds: int, memory: bool
) -> Iterator[list[dict[str, Any]]]:
    """Yield one row per contender after every round; transformers may fail or lose its weights to NaN, vg may not.

    On a CPU memory is measured first, before this process allocates gradients.
    """
    steps = {name: call(case, contender) for name, contender in everyone.items()}
    peaks: dict[str, int | None] = {}
    if memory and case.device == "cpu":
        peaks = {name: peak_bytes(config, case, name, steps[name]) for name in steps}
    last_losses: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    for index in range(-1, rounds):
        for name in list(steps):
            try:
                start = time.perf_counter()
                last_losses[name] = float(steps[name]())  # waits for the GPU
                seconds = time.perf_counter() - start
                if index < 0 and memory and case.device == "cuda":
                    peaks[name] = peak_bytes(config, case, name, steps[name])
            except Exception as error:  # keeps the times of earlier rounds
                if name != TRANSFORMERS:
                    raise
                print(f"{name} fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}", flush=True)
                del steps[name]
                continue
            if index >= 0:  # the first round warms up
                times.setdefault(name, []).append(seconds)
                print(f"{name}: {seconds:.3f} s", flush=True)
        medians = {name: statistics.median(values) for name, values in times.items()}
        yield [
            {
                **asdict(case),
                "boxes": BOXES,
                "rounds": len(times[name]),
                "contender": name,
                "seconds": medians[name],
                "samples_per_second": case.images / medians[name],
                "times_as_fast": medians[TRANSFORMERS] / medians[name] if TRANSFORMERS in medians else None,
                "peak_bytes": peaks.get(name),
                "loss_is_finite": math.isfinite(last_losses[name]),
            }
            for name in times
        ]


def print_table(case: Case, rows: list[dict[str, Any]]) -> None:
    base = next(row["peak_bytes"] for row in rows if row["contender"] == VG)
    for row in rows:
        ratio = "" if row["times_as_fast"] is None else f"{row['times_as_fast']:5.2f}x"
        speed = f"{row['samples_per_second']:8.3f} samples/s {ratio:6}"
        peak = "" if not base else f"{row['peak_bytes'] / 2**20:7.0f} MiB, {row['peak_bytes'] / base:4.0%} of vg"
        note = "" if row["loss_is_finite"] else "  the loss is not finite"
        print(f"{case!s:42} {row['contender']:18} {row['seconds'] * 1e3:9.1f} ms {speed} {peak}{note}", flush=True)


def main(config: GroundingDinoConfig | None = None) -> None:
    parser = parser_of(__doc__, size=(640, 640))
    parser.add_argument("--images", type=int, default=2, help="batch size (default: %(default)s)")
    parser.add_argument("--phrases", type=int, default=3, help="phrases per prompt (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    options = parser.parse_args()
    config = config or GroundingDinoConfig()
    about, theirs, ours = set_up(options, config)
    everyone = contenders(theirs, ours)
    plain = Case(options.images, options.phrases, size=tuple(options.size), device=options.device)
    compared: dict[str, Any] = {}
    faults: list[str] = []  # reported at the end: the figures do not depend on them
    try:
        compared["differences"] = differences(plain, theirs, ours)
        compared["losses"] = losses(plain, theirs, ours)
        faults = faults_of(plain, compared["differences"]) + loss_faults(compared["losses"])
    except Exception as error:  # such as NaN in the matching costs of transformers
        faults = [f"the comparison with transformers failed: {error!r}"]
    rows: list[dict[str, Any]] = []
    for rows in measure(config, replace(plain, dtype=options.dtype), everyone, options.rounds, not options.no_memory):
        if options.json:  # after each round, so an interrupted run keeps its results
            found = {"machine": about, **compared, "faults": faults, "results": rows}
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    print_table(replace(plain, dtype=options.dtype), rows)
    faults += [
        f"the loss of {row['contender']} is not finite"
        for row in rows
        if not row["loss_is_finite"] and row["contender"] != TRANSFORMERS
    ]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
