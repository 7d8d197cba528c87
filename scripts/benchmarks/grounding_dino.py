"""Measure the forward pass of Grounding DINO in vg and in transformers, with the same random weights.

    python scripts/benchmarks/grounding_dino.py [--threads 2] [--images 1 4] [--phrases 1 20 80]

Full size (Swin-T, BERT); nothing is downloaded. Prompts are made of token ids and are as long as those of COCO (80
phrases: 195 tokens). The outputs are compared first, for every number of images and phrases. The contenders then run in
turn in one process, after one warm-up call each, and medians are reported. transformers is used unmodified; bfloat16 is
autocast for both. vg caches encoded prompts: "vg, new prompt" gets another prompt in every call and for every image,
"vg, same prompt" always the same one. On a CPU, memory is measured in a separate process per contender.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection
from transformers.models.grounding_dino import modeling_grounding_dino
from transformers.utils.logging import disable_progress_bar

from scripts.benchmarks.deform_attn import DTYPES, Clock
from scripts.benchmarks.machine import machine
from scripts.benchmarks.text_positions import correct_text_positions
from vg.models.grounding_dino.checkpoints import read_checkpoint
from vg.models.grounding_dino.model import GroundingDino
from vg.ops import backend_info
from vg.types import Batch, PromptTargets, Text

TRANSFORMERS, NEW, SAME = "transformers", "vg, new prompt", "vg, same prompt"
SAME_QUERY = "same query at the same rank"  # share
TOLERANCE = 1e-4  # absolute for boxes in 0..1; relative to the largest entry for other outputs
SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
FIRST_WORD = 2000
WARM_UP_SIZE = (320, 320)  # of the call before memory is measured, which excludes what the first call loads

Forward = Callable[[Tensor, Tensor], Any]  # images [B, 3, H, W], token ids [B, T]


@dataclass(frozen=True)
class Case:
    images: int
    phrases: int
    dtype: str = "float32"
    compiled: bool = False
    size: tuple[int, int] = (800, 1066)  # height, width
    device: str = "cpu"

    def __str__(self) -> str:
        mode = "compiled" if self.compiled else "eager"
        return f"{self.images} x {self.size[0]}x{self.size[1]}, {self.phrases:2} phrases, {self.dtype}, {mode}"


# ---- contenders ---------------------------------------------------------------------------------------------------


def model_of_transformers(config: GroundingDinoConfig) -> GroundingDinoForObjectDetection:
    """Build the model of transformers with random weights, also those that are initialized to zero.

    Otherwise half of the model would not affect the outputs. Box updates are small because the images are noise: with
    large updates the features at a box would change so much that rounding errors double in each layer.
    """
    correct_text_positions(modeling_grounding_dino)
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(config)
    for name, weights in model.named_parameters():
        if weights.dim() > 1:
            nn.init.xavier_uniform_(weights, 0.1 if "bbox_embed.0.layers.2" in name else 1.0)
        elif not (weights == 1).all():  # 1 is the gain of a norm
            nn.init.uniform_(weights, -0.1, 0.1)
    return model.eval()


def model_of_vg(theirs: GroundingDinoForObjectDetection) -> GroundingDino:
    """Load the checkpoint that transformers writes into the model of vg."""
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        checkpoint = read_checkpoint(folder)
        vocabulary = Path(folder) / "vocab.txt"
        words = (SPECIAL.get(token_id, f"word{token_id}") for token_id in range(theirs.config.text_config.vocab_size))
        vocabulary.write_text("\n".join(words))
        text = replace(checkpoint.config.text, tokenizer=str(vocabulary))
        model = replace(checkpoint.config, text=text).build(pretrained=False)
        model.load_own_state_dict(checkpoint.weights)
        assert model.text_spec.delimiter_ids == (101, 102, 1012, 1029)  # reads the vocabulary before it is deleted
    return model.eval()


def forwards(theirs: GroundingDinoForObjectDetection | None, ours: GroundingDino | None) -> dict[str, Forward]:
    found: dict[str, Forward] = {}
    if theirs is not None:
        found[TRANSFORMERS] = lambda images, ids: theirs(images, ids, attention_mask=torch.ones_like(ids))
    if ours is not None:
        found |= dict.fromkeys((NEW, SAME), lambda images, ids: ours(batch_of(images, ids)))
    return found


def batch_of(images: Tensor, ids: Tensor) -> Batch:
    mask = torch.ones_like(ids, dtype=torch.bool)
    sizes = ((images.shape[-2], images.shape[-1]),) * len(images)
    text = Text(ids, mask, mask.unsqueeze(1), torch.arange(len(ids), device=ids.device))
    return Batch(images, sizes, text, [], PromptTargets.without_boxes(text), torch.arange(len(images)))


# ---- inputs -------------------------------------------------------------------------------------------------------


def pixels(case: Case) -> Tensor:
    return torch.randn(case.images, 3, *case.size, generator=torch.Generator().manual_seed(1)).to(case.device)


def prompts(case: Case, call_index: int = 0) -> Tensor:
    """Return token ids [B, T], with different words for each image and call.

    33 of 80 phrases have two words, so 80 phrases have 195 tokens.
    """
    word_counts = (2 if 33 * phrase % 80 < 33 else 1 for phrase in range(case.phrases))
    phrases = [token for count in word_counts for token in (*[FIRST_WORD] * count, 1012)]
    ids = torch.tensor([101, *phrases, 102], device=case.device)
    shifts = call_index * case.images + torch.arange(case.images, device=case.device)  # [B]
    return ids + (ids == FIRST_WORD) * shifts.unsqueeze(-1) % 1000


def call(case: Case, contender: str, forward: Forward) -> Callable[[], Any]:
    """Return a function that calls the contender, with new prompts in every call unless it is SAME."""
    images, calls = pixels(case), 0
    forward = torch.compile(forward, dynamic=False) if case.compiled else forward

    def run() -> Any:
        nonlocal calls
        calls += contender != SAME
        half = case.dtype != "float32"
        with torch.no_grad(), torch.autocast(case.device, DTYPES[case.dtype] if half else None, enabled=half):
            return forward(images, prompts(case, calls))

    return run


# ---- measuring ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def differences(case: Case, theirs: GroundingDinoForObjectDetection, ours: GroundingDino) -> dict[str, float]:
    """Return the largest differences of the float32 outputs for the same images and prompts; see `faults_of`.

    The selected image tokens and their order may differ if two scores are almost equal. The scores are therefore
    compared rank by rank, and our decoder starts from the queries that transformers selected.
    """
    images, ids = pixels(case), prompts(case)
    torch.backends.cudnn.allow_tf32 = False
    expected = theirs(images, ids, attention_mask=torch.ones_like(ids))
    batch = batch_of(images, ids)
    image, text = ours.encoder(ours.encode_image(batch), ours.encode_text(batch.text))
    queries = ours.queries(image, text)
    reference_logits = expected.init_reference_points.logit()  # [B, Q, 4]
    logits, boxes, _ = ours.decoder(queries.content, reference_logits, image, text)
    torch.backends.cudnn.allow_tf32 = True

    count, length = reference_logits.shape[1], ids.shape[1]
    top_scores = expected.enc_outputs_class.amax(dim=-1).topk(count, dim=1).values  # [B, Q]
    same = (queries.boxes - expected.init_reference_points).abs().amax(dim=-1) < TOLERANCE  # [B, Q]
    found = {
        "image tokens": relative(image.tokens, expected.encoder_last_hidden_state_vision),
        "text tokens": relative(text.tokens, expected.encoder_last_hidden_state_text),
        "scores of queries": relative(queries.logits.amax(dim=-1), top_scores),
        "logits": relative(logits[-1], expected.logits[..., :length]),
        "boxes": float((boxes[-1] - expected.pred_boxes).abs().max()),
    }
    summary = ", ".join(f"{name} {difference:.0e}" for name, difference in found.items())
    print(f"{case.images} images, {case.phrases} phrases, {length} tokens: largest differences: {summary}", flush=True)
    return found | {SAME_QUERY: float(same.float().mean())}


def faults_of(case: Case, found: dict[str, float]) -> list[str]:
    """Return a message per difference that is NaN or above TOLERANCE."""
    wrong = {name: x for name, x in found.items() if name != SAME_QUERY and not x < TOLERANCE}
    return [f"{case}: {name} differ by more than {TOLERANCE} from transformers: {x:.1e}" for name, x in wrong.items()]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def peak_bytes_alone(config: GroundingDinoConfig, case: Case, contender: str, threads: int) -> int | None:
    """Return the peak memory of a forward pass above the memory before it, in a process with only this model."""
    torch.set_num_threads(threads)
    theirs = model_of_transformers(config)
    alone = forwards(theirs, None) if contender == TRANSFORMERS else forwards(None, model_of_vg(theirs))
    del theirs
    call(replace(case, size=WARM_UP_SIZE, images=1, phrases=1, compiled=False), contender, alone[contender])()
    return Clock(case.device, False).peak_bytes(call(case, contender, alone[contender]))


def peak_bytes(config: GroundingDinoConfig, case: Case, contender: str, run: Callable[[], Any]) -> int | None:
    if case.device == "cuda":
        return Clock(case.device, False).peak_bytes(run)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(peak_bytes_alone, config, case, contender, torch.get_num_threads()).result()


def seconds(case: Case, run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if case.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    config: GroundingDinoConfig, case: Case, contenders: dict[str, Forward], rounds: int, memory: bool
) -> list[dict[str, Any]]:
    runs: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int | None] = {}
    for name, forward in contenders.items():
        if name == SAME and case.compiled:
            continue  # a compiled model reads every prompt
        try:
            runs[name] = call(case, name, forward)
            seconds(case, runs[name])
            if memory and name != SAME:
                peaks[name] = peak_bytes(config, case, name, runs[name])
        except Exception as error:  # transformers may fail, vg may not
            if name != TRANSFORMERS:
                raise
            print(f"{case}: {name} fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")
            del runs[name]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(case, run))
    about = asdict(case) | {"tokens": prompts(case).shape[1], "rounds": rounds}
    return [
        about | {"contender": name, "seconds": statistics.median(times[name]), "peak_bytes": peaks.get(name)}
        for name in runs
    ]


def print_table(case: Case, rows: list[dict[str, Any]]) -> None:
    base = next((row["seconds"] for row in rows if row["contender"] == TRANSFORMERS), None)
    for row in rows:
        ratio = "" if base is None else f"{base / row['seconds']:5.2f}x"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:7.0f} MiB"
        print(f"{case!s:48} {row['contender']:16} {row['seconds'] * 1e3:9.1f} ms {ratio:6} {peak}", flush=True)


# ---- options and models of both benchmarks of Grounding DINO ------------------------------------------------------


def parser_of(description: str | None, size: tuple[int, int]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=5, help="measured calls per contender (default: %(default)s)")
    height_width = f"image size in pixels (default: {size[0]} {size[1]})"
    parser.add_argument("--size", type=int, nargs=2, default=size, metavar=("HEIGHT", "WIDTH"), help=height_width)
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser


def set_up(
    options: argparse.Namespace, config: GroundingDinoConfig
) -> tuple[dict[str, Any], GroundingDinoForObjectDetection, GroundingDino]:
    """Return a description of the machine, and both models on the device."""
    if options.threads:
        torch.set_num_threads(options.threads)
    about = machine(options.device) | {"operator": backend_info()[options.device].name}
    print(f"operator {about['operator']}")
    theirs = model_of_transformers(config)
    ours = model_of_vg(theirs).to(options.device)
    return about, theirs.to(options.device), ours


def main(config: GroundingDinoConfig | None = None) -> None:
    parser = parser_of(__doc__, size=(800, 1066))
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4], help="batch sizes (default: 1 4)")
    parser.add_argument("--phrases", type=int, nargs="+", default=[1, 20, 80], help="phrases per prompt, at most 80")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, which takes minutes")
    options = parser.parse_args()
    config = config or GroundingDinoConfig()
    about, theirs, ours = set_up(options, config)
    contenders = forwards(theirs, ours)
    results, compared, faults = [], [], []
    for images, phrases in product(options.images, options.phrases):
        plain = Case(images, phrases, size=tuple(options.size), device=options.device)
        try:  # faults are reported at the end: the figures do not depend on them
            found = differences(plain, theirs, ours)
            compared.append(asdict(plain) | found)
            faults += faults_of(plain, found)
        except Exception as error:
            faults.append(f"{plain}: the comparison with transformers failed: {error!r}")
        for dtype, compiled in product(options.dtypes, (False, True) if options.compile else (False,)):
            case = replace(plain, dtype=dtype, compiled=compiled)
            torch.compiler.reset()
            rows = measure(config, case, contenders, options.rounds, not options.no_memory)
            print_table(case, rows)
            results += rows
            if options.json:  # after each case, so an interrupted run keeps its results
                everything = {"machine": about, "differences": compared, "faults": faults, "results": results}
                options.json.write_text(json.dumps(everything, indent=1) + "\n")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
