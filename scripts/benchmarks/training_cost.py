"""Calculate what a recipe of rec costs on a GPU: operations, bytes and minutes; nothing is measured.

    python scripts/benchmarks/training_cost.py configs/rec/refcoco_record.yaml

The encoders, a training step of the head with its optimizer, and an evaluation run on tensors that have sizes but no
values, and every operator is counted: its floating-point operations (those of torch.utils.flop_counter), and the bytes
of the tensors that it reads and writes. An operator takes the longer of two times: its operations at a share of the
GPU's peak, or its bytes at a share of the memory bandwidth. Not included: reading and decoding images, a disk that is
slower than the printed rate, pauses between kernels, and writing checkpoints.

An encoder that is not on this machine can be described: 'model.vision={id: null, architecture: {model_type: ...}}'.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers.initialization import no_init_weights

from vg.config import RunConfig, load_config
from vg.errors import ConfigError
from vg.models.rec.config import RecConfig
from vg.models.rec.model import RecModel
from vg.training.memory import DTYPES, StorageCounter, positions_not_kept
from vg.training.optim import Ema, build_optimizer, select_trainable
from vg.types import Features, Text

# NVIDIA H100 SXM, data sheet: dense tensor cores, float32 without them, and HBM3.
PEAKS = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12}
BANDWIDTH = 3.35e12
IMAGE = 480, 640  # pixels, the most frequent size in COCO
BYTES_PER_VALUE = 2  # in a cache
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # stands for the GPU's, which has these shapes
TB, GB, MB = 1e12, 1e9, 1e6


@dataclass
class Cost:
    """Of a piece of work."""

    flops: float = 0.0
    bytes: float = 0.0  # read and written by operators
    seconds: float = 0.0  # of operators one after another, each limited by its operations or its bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times, self.seconds * times)


class OperatorCounter(TorchDispatchMode):
    """Adds up the cost of all operators within the context."""

    def __init__(self, compute_share: float, bandwidth_share: float):
        super().__init__()
        self.shares = compute_share, bandwidth_share
        self.cost = Cost()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        written = [value.alias_info.is_write if value.alias_info else None for value in function._schema.returns]
        is_view = bool(written) and all(value is False for value in written)
        if is_view or function.namespace == "prim" or "empty" in function.__name__:  # prim: of sizes and devices
            return result
        inputs, outputs = ([x for x in tree_leaves(y) if isinstance(x, Tensor)] for y in ((args, kwargs), result))
        num_bytes = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in (*inputs, *outputs))
        count = OPERATIONS.get(function._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        dtype = next((x.dtype for x in inputs if x.is_floating_point()), torch.float32)
        seconds = max(flops / (self.shares[0] * PEAKS[dtype]), num_bytes / (self.shares[1] * BANDWIDTH))
        self.cost += Cost(flops, num_bytes, seconds)
        return result


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


OPERATIONS = flop_registry | {
    ATTENTION: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class RecCost:
    """Runs a model of rec on tensors without values.

    Args:
        num_tokens: T of a batch of expressions, padding included.

    Raises:
        ConfigError: another family, train.minutes, or an encoder cannot be found.
    """

    def __init__(self, config: RunConfig, num_tokens: int, compute_share: float, bandwidth_share: float):
        if not isinstance(config.model, RecConfig):
            raise ConfigError(f"model.name={config.model.name}: the cost is calculated for rec only")
        if config.train.minutes:
            raise ConfigError(f"train.minutes={config.train.minutes:g} is the duration already: set train.epochs")
        self.config, self.num_tokens, self.shares = config, num_tokens, (compute_share, bandwidth_share)
        self.memory = StorageCounter()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake, self.memory, no_init_weights():
            self.model: RecModel = config.model.build(pretrained=False).train()
            select_trainable(self.model, config.optim)
            self.optimizer = build_optimizer(self.model, config.optim)
            self.average = Ema(self.model, config.train.ema) if config.train.ema else None
        self.size = self.model.image_spec.resized(1, 1)
        _, self.stored_shape, _ = self.encode_images(1, "no")  # a cache pads all images to the tokens of a square
        self.size = self.model.image_spec.resized(*IMAGE)
        _, self.image_shape, self.grid = self.encode_images(1, "no")
        with self.counting("no"), torch.no_grad():
            self.text_shape = self.model.encode_text(self._text(1))[0].shape[1:]  # T, D; of both text encoders

    @contextmanager
    def counting(self, precision: str) -> Iterator[OperatorCounter]:
        """Count within the context, in mixed precision unless it is "no"."""
        dtype, counter = DTYPES.get(precision), OperatorCounter(*self.shares)
        # On a CPU, dropout would make attention materialize its weights, which it does not on a GPU.
        replacement = partial(_without_dropout, F.scaled_dot_product_attention)
        attention = patch.object(F, "scaled_dot_product_attention", replacement)
        autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
        with attention, self.fake, self.memory, counter, autocast, positions_not_kept():
            yield counter

    def encode_images(self, number: int, precision: str) -> tuple[Cost, torch.Size, tuple[int, int]]:
        """Return the cost, and the shape and grid of the tokens of one image, [S, D]."""
        with self.counting(precision) as counter, torch.no_grad():
            tokens, grid = self.model.encode_images(torch.zeros(number, 3, *self.size))
        return counter.cost, tokens.shape[1:], grid

    def encode_text(self, number: int, precision: str) -> Cost:
        with self.counting(precision) as counter, torch.no_grad():
            self.model.encode_text(self._text(number))
        return counter.cost

    def _text(self, number: int) -> Text:
        shape = number, self.num_tokens
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)
        text = Text(ids, mask, mask.unsqueeze(1), torch.arange(number))
        return text if self.model.extra_text is None else text._replace(extra=text)

    def _features(self, num_images: int, num_texts: int, cached: bool) -> Features:
        text = self._text(num_texts)
        together = -(-num_texts // num_images)
        image_ids = torch.arange(num_texts) // together
        if cached:
            image = torch.zeros(num_images, *self.image_shape, dtype=torch.float16).float()
        else:
            image, _ = self.model.encode_images(torch.zeros(num_images, 3, *self.size))
        if cached and self.model.caches_text:
            tokens = torch.zeros(num_texts, *self.text_shape, dtype=torch.float16).float()
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        else:
            tokens, mask = self.model.encode_text(text)
        return Features(image, self.grid, tokens, mask, image_ids, together)

    def step(self, num_images: int, num_texts: int, cached: bool) -> tuple[Cost, int]:
        """Return the cost of a training step, and the bytes that exist at its worst moment."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for _ in range(2):  # the first step makes the moments of the optimizer
            self.memory.peak = self.memory.now
            with self.counting(self.config.train.precision) as counter:
                output = self.model.decode(self._features(num_images, num_texts, cached))
                with torch.autocast("cpu", enabled=False):
                    output = type(output)(*(x.float() for x in output))  # as Accelerate does
                    boxes, mask = torch.full((num_texts, 1, 4), 0.5), torch.ones(num_texts, 1, dtype=torch.bool)
                    losses = self.model.head.loss(output, boxes, mask)  # type: ignore[arg-type]
                    torch.stack(list(losses.values())).sum().backward()
                    torch.nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_norm or math.inf)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    if self.average:
                        self.average.update()
                del output, losses
        return counter.cost, self.memory.peak

    def evaluate(self, num_texts: int, cached: bool, precision: str) -> Cost:
        """Return the cost of predictions for a batch with an image for every expression."""
        with self.counting(precision) as counter, torch.no_grad():
            self.model.decode(self._features(num_texts, num_texts, cached))
        return counter.cost


def _without_dropout(attention: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any, **named: Any) -> Any:
    mask = options[0] if options else named.get("attn_mask")
    known = {name: named[name] for name in ("is_causal", "scale") if name in named}
    return attention(query, key, value, attn_mask=mask, **known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a recipe of rec")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=16_994, help="for training (default: RefCOCO, %(default)s)")
    parser.add_argument("--expressions", type=int, default=120_624, help="for training (default: %(default)s)")
    parser.add_argument("--eval-images", type=int, default=1_500, help="of the validation data (default: %(default)s)")
    parser.add_argument("--eval-expressions", type=int, default=10_834, help="likewise (default: %(default)s)")
    parser.add_argument("--benchmark-expressions", type=int, default=21_586, help="of the benchmark (%(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="of a batch of expressions (default: %(default)s)")
    parser.add_argument("--compute-share", type=float, default=0.5, help="of the peak (default: %(default)s)")
    parser.add_argument("--bandwidth-share", type=float, default=0.7, help="of the bandwidth (default: %(default)s)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # of torch itself, in copies
    config = load_config(options.config, options.overrides)
    model = RecCost(config, options.tokens, options.compute_share, options.bandwidth_share)
    cache, batch = config.data.cache, config.data.batch_size
    num_images = options.images
    work: dict[str, Cost] = {}
    if cache:
        num_views = len(cache.views)
        encoded = num_images * num_views + options.eval_images
        phrases = options.expressions * (1 + any("flip" in view for view in cache.views)) + options.eval_expressions
        work["cache: images"] = model.encode_images(32, cache.precision)[0] * (encoded / 32)
        if model.model.caches_text:
            work["cache: expressions, at most"] = model.encode_text(256, cache.precision) * (phrases / 256)
    # As if all images had equally many expressions.
    groups = num_images * math.ceil(options.expressions / num_images / config.data.expressions_per_image)
    per_step = math.ceil(batch * min(groups, options.expressions) / options.expressions)
    steps = options.expressions // (batch * config.train.accumulate) * config.train.epochs
    step, peak = model.step(per_step, batch, cached=cache is not None)
    work["training"] = step * (steps * config.train.accumulate)
    evaluations = options.eval_expressions * config.train.epochs
    work["validation"] = model.evaluate(64, cache is not None, config.train.precision) * (evaluations / 64)
    work["benchmark, bf16"] = model.evaluate(32, False, "bf16") * (options.benchmark_expressions / 32)

    size, (height, width) = model.model.num_parameters, model.size
    print(f"calculated, not measured: {size(True):,} of {size():,} parameters are trained")
    print(f"an image of {IMAGE[1]} x {IMAGE[0]} px is {width} x {height} px, {model.image_shape[0]} tokens")
    peak_rate, rate = options.compute_share * PEAKS[torch.bfloat16], options.bandwidth_share * BANDWIDTH
    print(f"H100: {options.compute_share:.0%} of 989 TFLOP/s (bf16, dense; 67 in float32), ", end="")
    print(f"{options.bandwidth_share:.0%} of {BANDWIDTH / TB:.2f} TB/s\n")
    print(f"{'':30}{'PFLOP':>10}{'TB moved':>10}{'minutes':>10}")
    for name, cost in (work | {"all": sum(work.values(), Cost())}).items():
        print(f"{name:30}{cost.flops / 1e15:10.2f}{cost.bytes / TB:10.1f}{cost.seconds / 60:10.1f}")
    print(
        f"\na training step of {batch} expressions: {step.flops / TB:.2f} TFLOP, {step.bytes / GB:.1f} GB moved, "
        f"{1000 * step.seconds:.0f} ms (operations alone {1000 * step.flops / peak_rate:.0f} ms, bytes alone "
        f"{1000 * step.bytes / rate:.0f} ms), {peak / GB:.1f} GB of memory; {steps:,} steps"
    )
    if cache:
        image_bytes = model.stored_shape.numel() * BYTES_PER_VALUE
        text_bytes = model.text_shape.numel() * BYTES_PER_VALUE * model.model.caches_text
        read = per_step * image_bytes + batch * text_bytes
        print(
            f"cache: {image_bytes / MB:.2f} MB per image and view, {encoded * image_bytes / GB:.1f} GB for {encoded:,} "
            f"of them, text at most {phrases * text_bytes / GB:.1f} GB; a step reads {per_step} images, "
            f"{read / MB:.0f} MB, {read / step.seconds / GB:.1f} GB/s, "
            f"{read * steps * config.train.accumulate / TB:.2f} TB in all"
        )


if __name__ == "__main__":
    main()
