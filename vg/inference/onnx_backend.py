"""Runs a model that `vg export` wrote, for `vg.inference.grounder`: ONNX Runtime and NumPy, without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vg.data.images import normalized
from vg.data.prompt import Expressions, Prompts
from vg.errors import CheckpointError, ConfigError, PredictionError
from vg.inference.result import NO_BOXES, Boxes
from vg.nms import nms
from vg.types import ImageSpec, Sample, TextArrays, TextSpec

INSTALL = "pip install onnxruntime"
SETTINGS, TOKENIZER = "vg", "tokenizer.json"  # keys of the metadata of an ONNX file
DETECTOR_WEIGHTS, TEXT_WEIGHTS = "detector_weights", "text_weights"  # keys of the digest of all weights of the model
SPECIAL_TOKENS = ("cls_token", "sep_token", "pad_token", "unk_token", "bos_token", "eos_token")


@dataclass(frozen=True)
class ExportSettings:
    """What is needed to predict with an exported model, beside its tokenizer."""

    image: dict[str, Any]  # class of vg.types.ImageSpec and its fields
    max_tokens: int
    delimiters: tuple[str, ...]  # see TextSpec
    special_tokens: dict[str, str]  # attribute of the tokenizer -> token
    split: bool  # whether prompts are encoded by another file, see text_file
    top_k: int | None = None  # boxes of an image; None for all
    threshold: float = 0.0  # drop boxes with a lower score
    nms: float | None = None
    generalized: bool = False  # see GroundingModel
    classes: tuple[str, ...] = ()  # see GroundingModel

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> ExportSettings:
        values = json.loads(text)
        return cls(**values | {name: tuple(values.get(name, ())) for name in ("delimiters", "classes")})

    @property
    def image_spec(self) -> ImageSpec:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in self.image.items()}
        name = values.pop("class")
        return next(spec for spec in ImageSpec.__subclasses__() if spec.__name__ == name)(**values)


class Group(NamedTuple):
    """Images of one size that are searched for the same phrases."""

    indices: list[int]
    pixels: np.ndarray  # [B, 3, H, W] float32
    text: TextArrays


class Prepared(NamedTuple):
    """A batch of images and phrases."""

    groups: list[Group]
    sizes: list[tuple[int, int]]  # (height, width) of the original images


class OnnxBackend:
    """A model in ONNX Runtime.

    Args:
        path: an .onnx file of `vg export`.
        device: "cpu" or "cuda"; by default the CPU.
        threads: of the CPU; 0 for one per core.

    Raises:
        ConfigError: onnxruntime is not installed or does not support the device.
        CheckpointError: not a file of `vg export`, or that of its text encoder is missing or of another model.
    """

    def __init__(self, path: str | Path, device: str | None = None, threads: int = 0):
        self.path = Path(path)
        self.device = device or "cpu"
        self.session = _open(self.path, self.device, threads)
        metadata = self.session.get_modelmeta().custom_metadata_map
        if SETTINGS not in metadata:
            raise CheckpointError(f"{path} was not written by vg export: it has no preprocessing; run vg export again")
        self.settings = ExportSettings.load(metadata[SETTINGS])
        self.text_session = self._open_text(metadata, threads) if self.settings.split else None
        self.image_spec = self.settings.image_spec
        special = {name: token for name, token in self.settings.special_tokens.items() if name in SPECIAL_TOKENS}
        self.tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(metadata[TOKENIZER]), **special
        )
        spec = TextSpec(self.tokenizer, self.settings.max_tokens, self.settings.delimiters)
        self.takes_many, self.generalized = bool(spec.delimiters), self.settings.generalized
        self.classes = self.settings.classes
        self.texts = Prompts(spec, one_prompt=False) if self.takes_many else Expressions(spec)
        self._tokenize = lru_cache(maxsize=8)(self._text)
        self._encode = lru_cache(maxsize=128)(self._encoded)  # keys are token ids

    def forget_prompts(self) -> None:
        """Do nothing: the prompts of an image are encoded by themselves, so their features are always the same."""

    def to(self, device: str) -> None:
        raise ConfigError(f"an ONNX model cannot be moved; open it there: vg.Grounder(path, device={device!r})")

    def compile(self) -> None:
        raise ConfigError("an ONNX model cannot be compiled; use the model that it was exported from")

    def digest(self) -> str:
        """Return a digest of the files of the model."""
        found = hashlib.sha256()
        for file in [self.path, text_file(self.path)] if self.settings.split else [self.path]:
            found.update(file.read_bytes())
        return found.hexdigest()

    def prepare(self, images: Sequence[np.ndarray], phrases: Sequence[tuple[str, ...]]) -> Prepared:
        """Make the batch of images [H, W, 3] uint8 and the phrases of each; may run in a thread.

        Raises:
            DataError: a phrase that the model cannot process (blank, too long).
        """
        members: dict[tuple[tuple[int, int], tuple[str, ...]], list[int]] = {}
        for index, (image, wanted) in enumerate(zip(images, phrases, strict=True)):
            size = self.image_spec.resized(image.shape[0], image.shape[1])
            members.setdefault((size, wanted), []).append(index)
        groups = [
            Group(
                indices,
                normalized([images[index] for index in indices], [size] * len(indices), self.image_spec),
                self._tokenize(wanted),
            )
            for (size, wanted), indices in members.items()
        ]
        return Prepared(groups, [(image.shape[0], image.shape[1]) for image in images])

    def predict(self, prepared: Prepared) -> list[Boxes]:
        """Return the boxes of every image; raises PredictionError if one is NaN or Inf."""
        found: dict[int, Boxes] = {}
        for indices, pixels, text in prepared.groups:
            # A model for many phrases takes one prompt per pass, another model all expressions at once.
            rows = [slice(r, r + 1) for r in range(len(text.mask))] if self.takes_many else [slice(None)]
            outputs = [self.run(pixels, TextArrays._make([*(x[row] for x in text[:4]), None])) for row in rows]
            boxes, scores, phrase_ids = (np.concatenate(x, axis=1) for x in zip(*outputs, strict=True))
            for index, *values in zip(indices, boxes, scores, phrase_ids, strict=True):
                found[index] = self._selected(Boxes(*values), prepared.sizes[index])
        return [found[index] for index in range(len(found))]

    def run(self, pixels: np.ndarray, text: TextArrays) -> list[np.ndarray]:
        """Return boxes [B, K, 4] xyxy in 0..1, scores [B, K] and phrase_ids [B, K] of images [B, 3, H, W]."""
        feeds = {"images": pixels, **text._asdict()}
        if self.text_session is not None:
            feeds |= self._encode(text.token_ids.tobytes(), text.mask.tobytes(), text.mask.shape)
        return self.session.run(None, {entry.name: feeds[entry.name] for entry in self.session.get_inputs()})

    def _open_text(self, metadata: dict[str, str], threads: int) -> Any:
        """Open the text encoder; raises CheckpointError if it is not that of the detector with this metadata."""
        file = text_file(self.path)
        session = _open(file, self.device, threads)
        weights = session.get_modelmeta().custom_metadata_map.get(TEXT_WEIGHTS)
        if weights is None or weights != metadata.get(DETECTOR_WEIGHTS):
            raise CheckpointError(
                f"{file} is not the text encoder of {self.path}: copy both files of one export, or run vg export again"
            )
        return session

    def _text(self, phrases: tuple[str, ...]) -> TextArrays:
        name = "the prompt"
        if isinstance(self.texts, Expressions):
            return self.texts.arrays(phrases, [name] * len(phrases))
        return self.texts.arrays([Sample(name, np.zeros((1, 1, 3), np.uint8), phrases, *NO_BOXES)])

    def _encoded(self, token_ids: bytes, mask: bytes, shape: tuple[int, int]) -> dict[str, np.ndarray]:
        assert self.text_session is not None
        ids, valid = np.frombuffer(token_ids, np.int64).reshape(shape), np.frombuffer(mask, bool).reshape(shape)
        values = self.text_session.run(None, {"token_ids": ids, "mask": valid})
        return {entry.name: value for entry, value in zip(self.text_session.get_outputs(), values, strict=True)}

    def _selected(self, found: Boxes, size: tuple[int, int]) -> Boxes:
        """Sort and select boxes as the model does in torch, and convert them to pixels."""
        boxes, scores, phrase_ids = found
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise PredictionError("boxes or scores that the ONNX model predicts are not finite (NaN or Inf)")
        order = np.argsort(-scores, kind="stable")[: self.settings.top_k]
        order = order[(scores[order] >= self.settings.threshold) & (scores[order] > 0)]  # 0: not in the prompt
        boxes = boxes[order] * np.array((*size[::-1], *size[::-1]), np.float32)
        scores, phrase_ids = scores[order], phrase_ids[order]
        if self.settings.nms is not None:
            kept = nms(boxes, scores, self.settings.nms, phrase_ids)
            boxes, scores, phrase_ids = boxes[kept], scores[kept], phrase_ids[kept]
        return Boxes(boxes, scores, phrase_ids)


def text_file(path: Path) -> Path:
    """Return the path of the text encoder of a split model: model.onnx -> model.text.onnx."""
    return path.with_suffix(".text.onnx")


def _open(path: Path, device: str, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"{path} needs the package onnxruntime: {INSTALL}") from error
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; vg export writes it")
    kind, _, number = device.partition(":")
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    if provider not in onnxruntime.get_available_providers():
        raise ConfigError(f"device {device}: onnxruntime does not support it here; use cpu, or install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = threads
    try:
        where = [{"device_id": number}] if number else None
        return onnxruntime.InferenceSession(str(path), options, providers=[provider], provider_options=where)
    except Exception as error:  # onnxruntime has its own types
        raise CheckpointError(f"{path} cannot be opened: {str(error)[:300]}; run vg export again") from error
