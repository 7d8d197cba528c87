"""The sections of gpu_check.py: each builds, tests or measures something on a GPU and returns its results.

A section gets a folder. Benchmarks write to `measured.json` in it, which is kept if the section fails or is stopped. To
add a section, write a function that raises an error if a check fails, and add it to SECTIONS.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scripts.benchmarks.machine import machine as describe_machine
from vg.ops import backend_info, deform_attn, deform_attn_fused, reference

ROOT = Path(__file__).parents[2]
Results = dict[str, Any]
DEVICE = "cuda"
ENCODER = ((100, 167), (50, 84), (25, 42), (13, 21))  # levels of an 800 x 1333 image; each pixel is a query
GRAPH_SIZE = 800, 1066
# Relative to the largest entry. Half precision rounds inputs and outputs; sums are float32 for all dtypes.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MODELS = ("transformers", "pydantic", "accelerate", "scipy", "pillow")  # packages of vg.models, without those for data


class Section(NamedTuple):
    run: Callable[[Path], Results]
    part: int
    seconds: int  # limit; those of a part add up to less than 8 minutes
    needs: tuple[str, ...] = ()  # packages beside torch


# ---- the operator -------------------------------------------------------------------------------------------------


def machine(folder: Path) -> Results:
    properties = torch.cuda.get_device_properties(0)
    driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        **describe_machine(DEVICE),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30),
        "multiprocessors": properties.multi_processor_count,
        "python": platform.python_version(),
        "driver": driver.strip(),
    }


def build(folder: Path) -> Results:
    """Build both libraries, as on first use, and measure the time."""
    os.environ["XDG_CACHE_HOME"] = str(folder)  # empty; the other sections use the cache of the user
    start = time.perf_counter()
    info = backend_info()
    seconds = time.perf_counter() - start
    names = {device: backend.name for device, backend in info.items()}
    if names != {"cpu": "cpp", "cuda": "cuda"}:
        raise RuntimeError("\n".join(f"{device}: {backend.name}, {backend.reason}" for device, backend in info.items()))
    return {"seconds": round(seconds, 1), **names}


def op_tests_cuda(folder: Path) -> Results:
    """Run the tests of the operator on the GPU."""
    return _pytest("cuda")


def op_tests(folder: Path) -> Results:
    """Run the other tests of the operator: CPU kernels, emulation, builds."""
    return _pytest("not cuda")


def real_sizes(folder: Path) -> Results:
    """Measure the largest errors of outputs and gradients at the encoder's size; the tests use smaller inputs."""
    worst: dict[str, float] = {}
    for dtype, tolerance in TOLERANCE.items():
        for name, op, forward, backward in (
            ("plain", deform_attn, reference.forward, reference.backward),
            ("fused", deform_attn_fused, reference.fused_forward, reference.fused_backward),
        ):
            value, *rest = _encoder_inputs(dtype, fused=name == "fused")
            output = op(value, ENCODER, *rest)
            weight = torch.randn_like(output)  # [B, S, H * D]
            found = [output, *torch.autograd.grad(output, (value, *rest), weight)]
            exact, *exact_rest = (x.detach().float() for x in (value, *rest))
            expected = [forward(exact, ENCODER, *exact_rest)]
            expected += backward(weight.float(), exact, ENCODER, *exact_rest)
            tensors = ("output", "of value", "of 2nd", "of 3rd", "of 4th")
            for tensor, x, y in zip(tensors, found, expected, strict=False):
                error = ((x.float() - y).abs().max() / y.abs().max()).item()
                key = f"{name} {str(dtype).removeprefix('torch.')} {tensor}"
                worst[key] = float(f"{error:.1e}")
                if not error < tolerance:  # also raises for NaN
                    raise AssertionError(f"{key}: error {error:.1e} of the largest entry, allowed {tolerance:.1e}")
    return worst


def determinism(folder: Path) -> Results:
    """Check that gradients are bit-equal in deterministic mode, and measure its cost."""
    inputs = _encoder_inputs(torch.float32, fused=True)
    weight = torch.randn(1, inputs[0].shape[1], 256, device=DEVICE)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(deform_attn_fused(inputs[0], ENCODER, *inputs[1:]), inputs, weight)

    seconds = {}
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            runs = [gradients() for _ in range(5)]
            torch.cuda.synchronize()
            start = time.perf_counter()
            runs += [gradients() for _ in range(5)]
            torch.cuda.synchronize()
            seconds[deterministic] = (time.perf_counter() - start) / 5
        finally:
            torch.use_deterministic_algorithms(False)
    different = sum(not torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))
    if different:
        raise AssertionError(f"{different} gradients differ between runs")
    return {"runs": len(runs), "times_slower": round(seconds[True] / seconds[False], 1)}


def op_benchmark(folder: Path) -> Results:
    """Measure our kernels and every other implementation that is installed."""
    return _benchmark("deform_attn.py", folder, "--seconds", "1")


# ---- Grounding DINO -----------------------------------------------------------------------------------------------


def grounding_dino(folder: Path) -> Results:
    """Compare the full-size model with that of transformers, and measure both."""
    return _benchmark("grounding_dino.py", folder, "--images", "1", "8", "--phrases", "1", "80")


def grounding_dino_training(folder: Path) -> Results:
    """Measure a full-size bfloat16 training step of vg and transformers; the goal, which is not checked, is 2x."""
    return _benchmark("training_step.py", folder, "--size", "800", "1333", "--images", "4", "--dtype", "bfloat16")


@torch.no_grad()
def grounding_dino_parity(folder: Path) -> Results:
    """Return the largest differences between CPU and GPU, relative to the largest entry, for two images and prompts.

    The decoder starts from the CPU's queries, because the order of two almost equal scores may differ.
    """
    from vg.models.grounding_dino.config import BertConfig, GroundingDinoConfig, SwinConfig
    from vg.movable import map_tensors
    from vg.types import Batch, PromptTargets, Text

    torch.manual_seed(0)
    bert = {"model_type": "bert", "vocab_size": 1040, "hidden_size": 64, "num_hidden_layers": 2}
    bert |= {"num_attention_heads": 1, "intermediate_size": 64}
    swin = SwinConfig(width=16, depths=[1, 1, 2, 1], heads=[1, 2, 4, 8])
    config = GroundingDinoConfig(backbone=swin, text=BertConfig(architecture=bert), width=64, feedforward=128)
    model = config.build(pretrained=False).eval()
    for weights in model.parameters():  # weights that are initialized to zero
        if not weights.any():
            torch.nn.init.uniform_(weights, -0.1, 0.1)
    ids = torch.tensor([[101, 1035, 1036, 1012, 1037, 1012, 102], [101, 1038, 1012, 102, 0, 0, 0]])
    text = Text(ids, ids > 0, (ids > 0).unsqueeze(1), torch.arange(2))
    images = torch.randn(2, 3, 320, 416)
    images[1, :, :, 320:] = 0
    batch = Batch(
        images, ((320, 416), (320, 320)), text, [], PromptTargets.without_boxes(text), torch.arange(len(images))
    )

    def run(batch: Batch, reference_logits: Tensor | None = None) -> dict[str, Tensor]:
        text_features = model.text(batch.text.token_ids, batch.text.mask, (101, 102, 1012, 1029))
        image, encoded = model.encoder(model.encode_image(batch), text_features)
        queries = model.queries(image, encoded)
        if reference_logits is None:
            reference_logits = queries.reference_logits
        logits, boxes, _ = model.decoder(queries.content, reference_logits, image, encoded)
        outputs = {"image tokens": image.tokens[image.mask], "text tokens": encoded.tokens[text.mask]}
        # Logits of padding are -inf; a NaN must stay one.
        outputs |= {"logits": logits.where(logits != -torch.inf, 0), "boxes": boxes, "references": reference_logits}
        return {name: x.float().cpu() for name, x in outputs.items()}

    expected = run(batch)
    reference_logits = expected.pop("references").to(DEVICE)
    model, batch, text = model.to(DEVICE), batch.to(DEVICE), map_tensors(text, lambda tensor: tensor.to(DEVICE))
    torch.backends.cudnn.allow_tf32 = False
    found = run(batch, reference_logits)
    torch.backends.cudnn.allow_tf32 = True
    errors = {f"error of {name}": float((found[name] - x).abs().max() / x.abs().max()) for name, x in expected.items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        half = run(batch, reference_logits)
    half.pop("references")  # boxes proposed by image tokens at the border are infinite
    if wrong := [name for name, error in errors.items() if not error < 1e-4]:
        raise AssertionError(f"CPU and GPU differ: {', '.join(f'{name} {errors[name]:.1e}' for name in wrong)}")
    if wrong := [name for name, x in half.items() if not x.isfinite().all()]:
        raise AssertionError(f"non-finite in bfloat16: {', '.join(wrong)}")
    off = float((half["boxes"] - expected["boxes"]).abs().mean())
    return {name: float(f"{error:.1e}") for name, error in errors.items()} | {"bfloat16 boxes off by": round(off, 4)}


@torch.no_grad()
def cuda_graphs(folder: Path) -> Results:
    """Compare the full-size model replayed as a CUDA graph with an eager one, and measure calls of both in bfloat16."""
    from vg.inference.cuda_graphs import CALLS_BEFORE, CudaGraphs, Recorder
    from vg.models.grounding_dino.config import BertConfig, GroundingDinoConfig
    from vg.types import Batch, PromptTargets, Text

    torch.manual_seed(0)
    model = GroundingDinoConfig(text=BertConfig(architecture={"model_type": "bert"})).build(pretrained=False)
    model = model.eval().to(DEVICE)

    def batch(word: int) -> Batch:
        start, end, full_stop, *_ = model.text_spec.delimiter_ids
        ids = torch.tensor([[start, word, full_stop, end]], device=DEVICE)
        text = Text(ids, ids > 0, (ids > 0).unsqueeze(1), torch.zeros(1, dtype=torch.long, device=DEVICE))
        images = torch.randn(1, 3, *GRAPH_SIZE, device=DEVICE)
        return Batch(images, (GRAPH_SIZE,), text, [], PromptTargets.without_boxes(text), torch.arange(len(images)))

    graphs, half_graphs = (CudaGraphs(model, Recorder(model.device)) for _ in range(2))
    for word in range(200, 202 + CALLS_BEFORE):
        x = batch(word)
        found, expected = graphs(x), model(x)
    assert graphs.graphs
    errors = {
        name: float((getattr(found, name) - getattr(expected, name)).abs().max()) for name in ("boxes", "queries")
    }
    if wrong := [f"{name} {error:.1e}" for name, error in errors.items() if not error < 1e-4]:
        raise AssertionError(f"a replayed CUDA graph differs from the eager network: {', '.join(wrong)}")

    results = []
    for contender, network in (("eager", model), ("CUDA graph", half_graphs)):
        times = []
        for _ in range(CALLS_BEFORE + 11):
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast(DEVICE, torch.bfloat16):  # of every call, as in vg.Grounder
                network(x)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        results.append({"contender": contender, "seconds": statistics.median(times[CALLS_BEFORE + 1 :])})
    if not (graphs.graphs and half_graphs.graphs):
        raise AssertionError("the network could not be recorded: see the warning above")
    (folder / "measured.json").write_text(json.dumps({"results": results}))
    return {f"error of {name}": float(f"{error:.1e}") for name, error in errors.items()}


SECTIONS = {
    "machine": Section(machine, 1, 20),
    "build": Section(build, 1, 100),
    "op_tests_cuda": Section(op_tests_cuda, 1, 180, ("pytest",)),
    "real_sizes": Section(real_sizes, 1, 80),
    "determinism": Section(determinism, 1, 80),
    "op_benchmark": Section(op_benchmark, 2, 220),
    "op_tests": Section(op_tests, 2, 240, ("pytest",)),
    "grounding_dino_parity": Section(grounding_dino_parity, 3, 60, MODELS),
    "cuda_graphs": Section(cuda_graphs, 3, 40, MODELS),
    "grounding_dino": Section(grounding_dino, 3, 200, MODELS),
    "grounding_dino_training": Section(grounding_dino_training, 3, 175, MODELS),
}


# ---- inputs and processes -----------------------------------------------------------------------------------------


def _encoder_inputs(dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """Return the inputs of one encoder layer: offsets of every pixel are normal with a deviation of 2 pixels.

    Points keep a distance from the edges of cells, where gradients are discontinuous, so rounding cannot cross an edge.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, generator=generator)

    grids = [
        torch.cartesian_prod((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width).flip(-1)
        for height, width in ENCODER
    ]
    points = torch.cat(grids).to(DEVICE)[None, :, None]  # [1, S, 1, 2]
    S, H, L, P, D = points.shape[1], 8, 4, 4, 32
    sizes = points.new_tensor([(width, height) for height, width in ENCODER])[:, None]  # [L, 1, 2]
    start = points[:, :, None, None] * sizes - 0.5  # [1, S, 1, L, 1, 2] in pixels
    pixels = start + 2 * normal(1, S, H, L, P, 2)
    offsets = pixels.floor() + 0.1 + 0.8 * pixels.frac().abs() - start
    logits = normal(1, S, H, L * P)
    if fused:
        tensors = [points, offsets.to(dtype), logits.to(dtype)]
    else:
        locations = reference.sampling_locations(ENCODER, points, offsets)
        tensors = [locations, reference.attention_weights(logits, L).to(dtype)]
    return [x.detach().requires_grad_() for x in (normal(1, S, H, D).to(dtype), *tensors)]


def _pytest(words: str) -> Results:
    # No conftest: it imports the trainer, which needs packages that this check must work without.
    command = (sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-rs", "-k", words)
    return {"summary": _run(*command, "tests/ops").strip().splitlines()[-1]}


def _benchmark(script: str, folder: Path, *options: str) -> Results:
    path = str(ROOT / "scripts" / "benchmarks" / script)
    print(_run(sys.executable, path, "--device", DEVICE, "--json", str(folder / "measured.json"), *options), flush=True)
    return {}


def _run(*command: str) -> str:
    """Return the output of a command, which must succeed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
