"""Runs a model of PyTorch for `vg.inference.grounder`: device, precision, batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from vg.data.collate import Collator
from vg.data.prompt import Expressions, Prompts
from vg.errors import ConfigError
from vg.inference.cuda_graphs import CudaGraphs, Recorder
from vg.inference.result import NO_BOXES, Boxes
from vg.models.base import GroundingModel, check_finite, on_host
from vg.movable import map_tensors
from vg.types import Batch, Prediction, Sample

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Prepared(NamedTuple):
    """Input of the network."""

    batch: Batch
    counts: list[int]  # samples of the batch that belong to each image


class TorchBackend:
    """A model on a device.

    Args:
        device: "cpu", "cuda" or "mps"; the model is moved there.
        dtype: see `checked_dtype`: precision of the network; the weights stay float32.
        cuda_graphs: replay the network, see vg.inference.cuda_graphs.

    Raises:
        ConfigError: this machine does not have the device, no such dtype, or CUDA graphs on another device than CUDA.
    """

    def __init__(
        self,
        model: GroundingModel,
        device: str,
        dtype: str | torch.dtype | None = None,
        cuda_graphs: bool = False,
    ):
        self.model = model.eval()
        self.compiled = False
        self.cuda_graphs = cuda_graphs
        self.takes_many = bool(model.text_spec.delimiters)
        self.generalized, self.classes = model.generalized, model.classes
        self.collate = Collator(model.image_spec, model.text_spec)
        self.dtype = checked_dtype(dtype or "fp32")
        self.to(device)

    @property
    def device(self) -> str:
        return str(self.model.device)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.text_spec.tokenizer

    @property
    def texts(self) -> Prompts | Expressions:
        """Makes the prompts of phrases."""
        return self.collate.texts

    def forget_prompts(self) -> None:
        """Encode the next prompts again: features differ in their last digits with the prompts of their batch."""
        self.model.eval()

    def to(self, device: str) -> None:
        if self.cuda_graphs and torch.device(device).type != "cuda":
            raise ConfigError(f'cuda_graphs: {device} has none; use device="cuda", or cuda_graphs=False')
        self.model.to(checked_device(device))
        self._set_network()

    def compile(self) -> None:
        """Compile the network at the next call; images of other sizes may compile it again."""
        if self.cuda_graphs:
            raise ConfigError("a compiled network cannot be recorded: use compile() or cuda_graphs, not both")
        self.compiled = True
        self._set_network()

    def _set_network(self) -> None:
        """Forget what was compiled or recorded for another device."""
        network: Any = torch.compile(self.model, dynamic=True) if self.compiled else self.model
        self.network = CudaGraphs(network, Recorder(self.model.device)) if self.cuda_graphs else network

    def digest(self) -> str:
        """Return a digest of the weights, and of how images are resized."""
        found = hashlib.sha256(repr(self.model.image_spec).encode())
        for name, weights in self.model.state_dict().items():
            found.update(name.encode())
            found.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def prepare(self, images: Sequence[np.ndarray], phrases: Sequence[tuple[str, ...]]) -> Prepared:
        """Make the batch of images [H, W, 3] uint8 and the phrases of each; may run in a thread.

        Raises:
            DataError: a phrase that the model cannot process (blank, too long).
        """
        prompts = [[x] if self.takes_many else [(phrase,) for phrase in x] for x in phrases]
        samples = [
            Sample("the prompt", image, prompt, *NO_BOXES)
            for image, of_image in zip(images, prompts, strict=True)
            for prompt in of_image
        ]
        return Prepared(self.collate(samples), [len(of_image) for of_image in prompts])

    def predict(self, prepared: Prepared) -> list[Boxes]:
        """Return the boxes of every image; raises PredictionError if one is NaN or Inf."""
        found = (
            Boxes(*(values.numpy() for values in (prediction.boxes, prediction.scores, prediction.phrase_ids)))
            for prediction in self._predictions(prepared.batch)
        )
        return [_merged(list(islice(found, count))) for count in prepared.counts]

    def predict_samples(self, samples: Sequence[Sample]) -> list[Prediction]:
        """Predict for samples of a dataset in one batch; the predictions are on the CPU; raises as `predict`."""
        return self._predictions(self.collate(samples))

    @torch.no_grad()
    def _predictions(self, batch: Batch) -> list[Prediction]:
        batch = batch.to(self.model.device)
        half = self.dtype != torch.float32  # else autocast of the caller, whose casts a graph would keep, is disabled
        precision = {"dtype": self.dtype} if half else {"enabled": False}
        with torch.autocast(self.model.device.type, cache_enabled=not self.cuda_graphs, **precision):
            output = self.network(batch)
        predictions = on_host(self.model.predict(_float32(output), batch))
        check_finite(predictions, self.model)
        return predictions


def _float32(output: tuple) -> tuple:
    """Undo the precision of autocast, as Accelerate does in evaluations."""
    return map_tensors(output, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _merged(parts: Sequence[Boxes]) -> Boxes:
    """Join the boxes of the prompts of one image; several prompts have one phrase each."""
    if len(parts) == 1:
        return parts[0]
    boxes = np.concatenate([part.boxes for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    phrase_ids = np.repeat(np.arange(len(parts)), [len(part.scores) for part in parts])
    order = np.argsort(-scores, kind="stable")
    return Boxes(boxes[order], scores[order], phrase_ids[order])


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return one of DTYPES that is given by its name, or itself; raises ConfigError for others."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ConfigError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}")
    return found


def checked_device(device: str) -> str:
    """Return the device; raises ConfigError if this machine does not have it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend has its own
        reason = str(error).split("\n")[0].rstrip(".")
        raise ConfigError(f"device {device}: {reason}; use {best_device()}") from error
    return device
