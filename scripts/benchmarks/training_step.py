"""Times a training step of Grounding DINO: that of transformers, with its own loss, beside that of vg.

    python scripts/benchmarks/training_step.py [--threads 2] [--rounds 5] [--dtype float32] [--json results.json]

Full size (Swin-T, BERT), random weights, no network: a step is the forward pass, the loss, the backward pass, clipping
and AdamW. Both start from the same weights and see the same images, prompts and boxes; outputs and losses are compared
first. transformers is told to supervise all decoder layers (`auxiliary_loss`), as vg does and all published models did,
and vg to weigh and match as transformers does. Dropout is as each has it: that of BERT and the drop path in both, and
0.1 in the encoder and decoder layers of transformers, where published models and vg have none.

Contenders take turns in one process and medians are compared, one step that is not counted goes before. Memory is the
most in use during a step above weights and the state of AdamW, so gradients count; on a CPU in a process for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

from scripts.benchmarks.deform_attn import DTYPES, Clock, machine
from scripts.benchmarks.grounding_dino import (
    FIRST_WORD,
    TRANSFORMERS,
    WARM_UP_SIZE,
    Case,
    batch_of,
    differences,
    model_of_transformers,
    model_of_vg,
    pixels,
    prompts,
    seconds,
)
from scripts.benchmarks.transformers_loss import SETTINGS
from vg.data.prompt import prompt_targets
from vg.models.grounding_dino.model import GroundingDino
from vg.ops import backend_info
from vg.types import Batch, Target

VG, CHECKPOINTING = "vg", "vg, checkpointing"
NAMES = (TRANSFORMERS, VG, CHECKPOINTING)
FULL_STOP = 1012
BOXES = 5  # of each image
LEARNING_RATE, CLIP_NORM = 1e-5, 0.1
TOLERANCE = 0.01  # of losses, relative: which of two all but equal image tokens is a query makes a small difference


class Contender(NamedTuple):
    model: nn.Module
    loss: Callable[[Any, Batch], Tensor]
    optimizer: AdamW


def contenders(theirs: GroundingDinoForObjectDetection, ours: GroundingDino) -> dict[str, Contender]:
    """Those of vg share their weights and their optimiser."""
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
    """A second model around the same parameters."""
    model = replace(ours.config, gradient_checkpointing=True).build(pretrained=False)
    model.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    model.text_spec = ours.text_spec  # the file of its vocabulary is gone
    return model


def loss_of_transformers(model: GroundingDinoForObjectDetection, batch: Batch) -> Tensor:
    return answer_of_transformers(model, batch).loss


def answer_of_transformers(model: GroundingDinoForObjectDetection, batch: Batch) -> Any:
    labels = [{"class_labels": target.phrase_ids, "boxes": target.boxes} for target in batch.targets]
    return model(batch.images, batch.text.token_ids, attention_mask=batch.text.mask.long(), labels=labels)


def loss_of_vg(model: GroundingDino, batch: Batch) -> Tensor:
    return torch.stack(list(model.loss(model(batch), batch).values())).sum()


# ---- work ---------------------------------------------------------------------------------------------------------


def labelled(case: Case) -> Batch:
    """Images and prompts of the benchmark of the forward pass, with boxes that show its phrases in turn."""
    ids = prompts(case)
    batch = batch_of(pixels(case), ids)
    phrase = torch.where(ids >= FIRST_WORD, (ids == FULL_STOP).cumsum(dim=1), -1)  # [R, T], -1 = no word
    numbers = torch.arange(case.phrases, device=ids.device)
    generator = torch.Generator().manual_seed(2)
    targets = []
    for image in range(case.images):
        centers, sizes = torch.rand(2, BOXES, 2, generator=generator)
        boxes = torch.cat((0.25 + 0.5 * centers, 0.05 + 0.4 * sizes), dim=-1).to(ids.device)  # [N, 4]
        phrases = tuple(f"phrase {number}" for number in range(case.phrases))
        phrase_ids = torch.arange(BOXES, device=ids.device) % case.phrases
        targets.append(Target(str(image), case.size, phrases, boxes, phrase_ids))
    text = batch.text._replace(phrase_tokens=phrase.unsqueeze(1) == numbers.view(1, -1, 1))  # [R, P, T]
    return replace(batch, text=text, targets=targets, prompt_targets=prompt_targets(text, targets))


def call(case: Case, contender: Contender) -> Callable[[], Tensor]:
    """A training step, which returns its loss."""
    batch, half = labelled(case), case.dtype != "float32"
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
def losses(case: Case, theirs: GroundingDinoForObjectDetection, ours: GroundingDino) -> dict[str, float]:
    """The terms of the last decoder layer, of ours, where they are those of transformers.

    Raises:
        SystemExit: a term differs by more than TOLERANCE.
    """
    batch = labelled(case)
    terms = answer_of_transformers(theirs, batch).loss_dict
    wanted = {"class": SETTINGS.class_weight * terms["loss_ce"], "l1": SETTINGS.l1 * terms["loss_bbox"]}
    wanted |= {"giou": SETTINGS.giou * terms["loss_giou"]}
    found = {str(name): value for name, value in ours.loss(ours(batch), batch).items()}
    for name, value in wanted.items():
        if not abs(found[name] - value) < TOLERANCE * value:
            raise SystemExit(f"the {name} loss is {found[name]:.4f}, that of transformers {value:.4f}")
    return {name: float(found[name]) for name in wanted}


def peak_bytes_alone(config: GroundingDinoConfig, case: Case, name: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    theirs = model_of_transformers(config)
    contender = contenders(theirs, model_of_vg(theirs))[name]
    call(replace(case, size=WARM_UP_SIZE, images=1), contender)()  # after which AdamW has its state
    return Clock(case.device, False).peak_bytes(call(case, contender))


def peak_bytes(config: GroundingDinoConfig, case: Case, name: str, step: Callable[[], Tensor]) -> int | None:
    if case.device == "cuda":
        return Clock(case.device, False).peak_bytes(step)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        peak = process.submit(peak_bytes_alone, config, case, name, torch.get_num_threads()).result()
    if peak is not None:
        print(f"{name}: {peak / 2**20:.0f} MiB", flush=True)  # a run that is cut short leaves what it had found
    return peak


def measure(
    config: GroundingDinoConfig, case: Case, everyone: dict[str, Contender], rounds: int, memory: bool
) -> list[dict[str, Any]]:
    """One row for each contender; on a CPU memory comes first, while this process has none for gradients."""
    steps = {name: call(case, contender) for name, contender in everyone.items()}
    peaks: dict[str, int | None] = {}
    if memory and case.device == "cpu":
        peaks = {name: peak_bytes(config, case, name, steps[name]) for name in steps}
    for name, step in steps.items():
        if not step().isfinite():
            raise SystemExit(f"the loss of {name} is not finite")
    if memory and case.device == "cuda":
        peaks = {name: peak_bytes(config, case, name, steps[name]) for name in steps}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(case, step))
            print(f"{name}: {times[name][-1]:.3f} s", flush=True)
    medians = {name: statistics.median(times[name]) for name in steps}
    return [
        {
            **asdict(case),
            "boxes": BOXES,
            "rounds": rounds,
            "contender": name,
            "seconds": medians[name],
            "samples_per_second": case.images / medians[name],
            "times_as_fast": medians[TRANSFORMERS] / medians[name],
            "peak_bytes": peaks.get(name),
        }
        for name in steps
    ]


def print_table(case: Case, rows: list[dict[str, Any]]) -> None:
    base = next(row["peak_bytes"] for row in rows if row["contender"] == VG)
    for row in rows:
        speed = f"{row['samples_per_second']:8.3f} samples/s {row['times_as_fast']:5.2f}x"
        peak = "" if not base else f"{row['peak_bytes'] / 2**20:7.0f} MiB, {row['peak_bytes'] / base:4.0%} of vg"
        print(f"{case!s:42} {row['contender']:18} {row['seconds'] * 1e3:9.1f} ms {speed} {peak}", flush=True)


def main(config: GroundingDinoConfig | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2, help="in a batch")
    parser.add_argument("--phrases", type=int, default=3, help="in a prompt")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--json", type=Path, help="where results go")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    about = machine(options.device) | {"operator": backend_info()[options.device].name}
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    config = config or GroundingDinoConfig()
    theirs = model_of_transformers(config)
    ours = model_of_vg(theirs).to(options.device)
    everyone = contenders(theirs.to(options.device), ours)
    plain = Case(options.images, options.phrases, size=tuple(options.size), device=options.device)
    compared = differences(plain, theirs, ours) | losses(plain, theirs, ours)
    case = replace(plain, dtype=options.dtype)
    rows = measure(config, case, everyone, options.rounds, not options.no_memory)
    print_table(case, rows)
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "same": compared, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
