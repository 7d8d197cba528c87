"""The memory that training needs, found without data: a step runs on tensors that have sizes but no values."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights
from transformers.models.dinov3_vit import modeling_dinov3_vit

from vg.config import RunConfig
from vg.data.collate import Collator
from vg.losses import set_loss
from vg.losses.matcher import match_costs
from vg.models.base import EncodableModel
from vg.training.optim import Ema, build_optimizer, select_trainable
from vg.types import Batch, EncodedBatch, FittedImage, Sample

PHRASES = ("dog", "cat", "red car", "person on the left", "chair", "small tree", "bus", "traffic light")
NUM_BOXES = 16  # of an image, two for each phrase
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class MemoryEstimate:
    """Runs training steps of a configuration on tensors without values.

    Attributes:
        weights: bytes of parameters and buffers, and of their moving average.
        moments: bytes of the state of AdamW.

    What the libraries need, and memory that the allocator keeps between tensors, is not included.

    Raises:
        ConfigError: an encoder or tokenizer of the configuration cannot be loaded.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.counter = StorageCounter()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._counting():
            with no_init_weights():  # drawing weights needs values
                self.model = config.model.build(pretrained=False).train()
            # peft moves adapters to the device of their layer, where they are; tensors without values cannot be moved.
            with patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
                select_trainable(self.model, config.optim)
            self.average = Ema(self.model, config.train.ema) if config.train.ema else None
            self.weights, self.moments = self.counter.now, 0
            self.optimizer = build_optimizer(self.model, config.optim)
        self.step(1, self.sizes[0])  # makes the moments of the optimizer
        self.moments = self.counter.now - self.weights

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels: half, three quarters and all of the largest image that the model takes."""
        spec = self.model.image_spec
        if not isinstance(spec, FittedImage):
            return [spec.resized(1, 1)]
        resize = self.config.data.augment.resize
        shortest = max([spec.shortest, *(resize.shortest if resize else [])])
        return [(shortest * share // 4, spec.longest * share // 4) for share in (2, 3, 4)]

    def step(self, batch_size: int, size: tuple[int, int]) -> int:
        """Return the bytes that exist at the worst moment of a step with images of (height, width) pixels."""
        batch = self.batch(batch_size, size)
        with self._counting():
            self.counter.peak = self.counter.now
            self._run(batch.map(lambda tensor: self.fake.from_tensor(tensor).clone()))
        return self.counter.peak

    def _run(self, batch: Any) -> None:
        dtype = DTYPES.get(self.config.train.precision)
        if self.config.data.cache and isinstance(self.model, EncodableModel):
            with torch.no_grad():
                features = self.model.encode(batch)
            text = features.text.half() if self.model.caches_text else batch.text  # type: ignore[union-attr]
            batch = EncodedBatch(features._replace(image=features.image.half(), text=text), batch.targets)
            del features, text
            self.counter.peak = self.counter.now  # a run that reads a cache does not encode
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = self.model(batch)
        terms = self.model.loss(output, batch)
        torch.stack(list(terms.values())).sum().backward()
        del output, terms, batch
        self.optimizer.step()
        self.optimizer.zero_grad()

    def batch(self, batch_size: int, size: tuple[int, int]) -> Batch:
        """Make a batch with values: black images, the same phrases and boxes for each."""
        spec = self.model.text_spec
        phrases = PHRASES if spec.delimiters else PHRASES[3:4]
        count = NUM_BOXES if spec.delimiters else 1
        boxes = np.tile(np.array([0, 0, 16, 16], np.float32), (count, 1))
        sample = Sample("", np.zeros((*size, 3), np.uint8), phrases, boxes, np.arange(count) % len(phrases))
        image_spec = self.model.image_spec
        if isinstance(image_spec, FittedImage):
            image_spec = replace(image_spec, shortest=min(size), longest=max(size))
        samples = [replace(sample, id=str(index), image=sample.image.copy()) for index in range(batch_size)]
        return Collator(image_spec, spec, one_prompt=True)(samples)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        matching = patch.object(set_loss, "match", _match_nothing)
        with warnings.catch_warnings(), self.fake, self.counter, matching, positions_not_kept():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # of torch itself, in copies
            yield


def positions_not_kept() -> AbstractContextManager[Any]:
    """Within the context, DINOv3 does not keep the positions of its patches, which it does for each size.

    Those that are made without values would be used later for images with values.
    """
    name = "get_patches_center_coordinates"
    return patch.object(modeling_dinov3_vit, name, inspect.unwrap(getattr(modeling_dinov3_vit, name)))


def _match_nothing(*arguments: Any) -> Tensor:
    """Stands for the matcher, which needs values: computes its costs and assigns no box."""
    costs = match_costs(*arguments)
    return torch.full(costs.shape[:3], -1)


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make and that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}  # address of a storage -> its bytes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
