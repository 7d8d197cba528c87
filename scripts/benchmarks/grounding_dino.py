"""Times a whole Grounding DINO: that of transformers beside that of vg, with the same random weights.

    python scripts/benchmarks/grounding_dino.py [--threads 2] [--images 1 4] [--phrases 1 20 80] [--json results.json]

Full size (Swin-T, BERT), forward pass, no network and no vocabulary needed: prompts are made of numbers and as long as
those of COCO (80 phrases: 195 tokens). First the outputs are compared, for each number of images and phrases. Then the
contenders take turns in one process and medians are compared, one call that is not counted goes before. transformers
stays as it comes; bfloat16 is autocast for both. vg remembers prompts: "vg, new prompt" is told another one on every
call and for every image, "vg, same prompt" always the same. On a CPU, memory is measured in a process for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
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
from transformers.utils.logging import disable_progress_bar

from scripts.benchmarks.deform_attn import DTYPES, Clock, machine
from vg.models.grounding_dino.checkpoints import read_checkpoint
from vg.models.grounding_dino.model import GroundingDino
from vg.ops import backend_info
from vg.types import Batch, PromptTargets, Text

TRANSFORMERS, NEW, SAME = "transformers", "vg, new prompt", "vg, same prompt"
TOLERANCE = 1e-4  # of boxes in 0..1; of other outputs relative to the largest number
SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
FIRST_WORD = 2000
WARM_UP_SIZE = (320, 320)  # of an image before memory is measured: what is loaded at the first call does not count

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
    """Random also where training starts from zeros, or half of the model would make no difference.

    Boxes move little from layer to layer: in noise, what lies under a box changes from pixel to pixel, so that large
    moves would let an error of rounding grow twofold in each layer.
    """
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(config)
    for name, weights in model.named_parameters():
        if weights.dim() > 1:
            nn.init.xavier_uniform_(weights, 0.1 if "bbox_embed.0.layers.2" in name else 1.0)
        elif not (weights == 1).all():  # else the factor of a norm
            nn.init.uniform_(weights, -0.1, 0.1)
    return model.eval()


def model_of_vg(theirs: GroundingDinoForObjectDetection) -> GroundingDino:
    """The same weights, by way of the files that transformers writes."""
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        checkpoint = read_checkpoint(folder)
        vocabulary = Path(folder) / "vocab.txt"
        words = (SPECIAL.get(number, f"word{number}") for number in range(theirs.config.text_config.vocab_size))
        vocabulary.write_text("\n".join(words))
        text = replace(checkpoint.config.text, tokenizer=str(vocabulary))
        model = replace(checkpoint.config, text=text).build(pretrained=False)
        model.load_own_state_dict(checkpoint.weights)
        assert model.text_spec.delimiter_ids == (101, 102, 1012, 1029)  # read while the file is there
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
    return Batch(images, sizes, text, [], PromptTargets.without_boxes(text))


# ---- work ---------------------------------------------------------------------------------------------------------


def pixels(case: Case) -> Tensor:
    return torch.randn(case.images, 3, *case.size, generator=torch.Generator().manual_seed(1)).to(case.device)


def prompts(case: Case, number: int = 0) -> Tensor:
    """[B, T] token ids, other words for each image and number; 33 of 80 phrases have two words, so that T is 195."""
    words = (2 if 33 * place % 80 < 33 else 1 for place in range(case.phrases))
    phrases = [token for count in words for token in (*[FIRST_WORD] * count, 1012)]
    ids = torch.tensor([101, *phrases, 102], device=case.device)
    shifts = number * case.images + torch.arange(case.images, device=case.device)  # [B]
    return ids + (ids == FIRST_WORD) * shifts.unsqueeze(-1) % 1000


def call(case: Case, contender: str, forward: Forward) -> Callable[[], Any]:
    """A call of the contender; the words of its prompts are others than at the last call, if that is what it shows."""
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
    """Largest differences of the outputs in float32, from the same images and prompts.

    Which image tokens become queries, and in which order, may differ where two fit all but equally well. So their
    scores are compared rank by rank, and our decoder starts from the queries that transformers has chosen.

    Raises:
        SystemExit: a difference is above TOLERANCE.
    """
    images, ids = pixels(case), prompts(case)
    torch.backends.cudnn.allow_tf32 = False
    wanted = theirs(images, ids, attention_mask=torch.ones_like(ids))
    batch = batch_of(images, ids)
    image, text = ours.encoder(ours.encode_image(batch), ours.encode_text(batch.text))
    queries = ours.queries(image, text)
    references = wanted.init_reference_points.logit()  # [B, Q, 4]
    logits, boxes, _ = ours.decoder(queries.content, references, image, text)
    torch.backends.cudnn.allow_tf32 = True

    count, length = references.shape[1], ids.shape[1]
    fit = wanted.enc_outputs_class.amax(dim=-1).topk(count, dim=1).values  # [B, Q]
    same = (queries.boxes - wanted.init_reference_points).abs().amax(dim=-1) < TOLERANCE  # [B, Q]
    found = {
        "image tokens": relative(image.tokens, wanted.encoder_last_hidden_state_vision),
        "text tokens": relative(text.tokens, wanted.encoder_last_hidden_state_text),
        "scores of queries": relative(queries.logits.amax(dim=-1), fit),
        "logits": relative(logits[-1], wanted.logits[..., :length]),
        "boxes": float((boxes[-1] - wanted.pred_boxes).abs().max()),
    }
    text_of = ", ".join(f"{name} {difference:.0e}" for name, difference in found.items())
    print(f"{case.images} images, {case.phrases} phrases, {length} tokens: largest differences: {text_of}", flush=True)
    if not all(difference < TOLERANCE for difference in found.values()):  # NaN is wrong too
        raise SystemExit(f"the outputs differ by more than {TOLERANCE}")
    return found | {"same query at the same rank": float(same.float().mean())}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def peak_bytes_alone(config: GroundingDinoConfig, case: Case, contender: str, threads: int) -> int | None:
    """Most memory in use during a forward pass above what was in use before, in a process with just this model."""
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
        except Exception as error:  # what transformers cannot do must not end the others' race; ours must work
            if name != TRANSFORMERS:
                raise
            print(f"{case}: {name} cannot: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")
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


def main(config: GroundingDinoConfig | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4], help="in a batch")
    parser.add_argument("--phrases", type=int, nargs="+", default=[1, 20, 80], help="in a prompt; 80 are at most")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--compile", action="store_true", help="with torch.compile as well, which takes minutes")
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
    contenders = forwards(theirs.to(options.device), ours)
    results, compared = [], []
    for images, phrases in product(options.images, options.phrases):
        plain = Case(images, phrases, size=tuple(options.size), device=options.device)
        compared.append(asdict(plain) | differences(plain, theirs, ours))
        for dtype, compiled in product(options.dtypes, (False, True) if options.compile else (False,)):
            case = replace(plain, dtype=dtype, compiled=compiled)
            torch.compiler.reset()
            rows = measure(config, case, contenders, options.rounds, not options.no_memory)
            print_table(case, rows)
            results += rows
            if options.json:  # after each case: a run that is cut short leaves what it had found
                found = {"machine": about, "differences": compared, "results": results}
                options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
