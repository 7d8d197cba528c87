"""Write a model as ONNX: the network, and in its metadata preprocessing, postprocessing and tokenizer."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vg.errors import ConfigError
from vg.export.deform_attn import Form
from vg.export.program import ExportedNetwork, max_tokens, parts, trace
from vg.inference.onnx_backend import (
    DETECTOR_WEIGHTS,
    SETTINGS,
    SPECIAL_TOKENS,
    TEXT_WEIGHTS,
    TOKENIZER,
    ExportSettings,
    text_file,
)
from vg.inference.torch_backend import TorchBackend
from vg.machine import size_text
from vg.models.base import GroundingModel
from vg.models.grounding_dino.config import GroundingDinoConfig

INSTALL = "pip install onnx onnxscript onnxruntime"
MAX_BYTES = 2**31 - 2**24  # limit of protobuf for a file, less what is not weights


def check_packages() -> None:
    """Raise ConfigError if a package that the export needs is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"exporting to ONNX needs the package {error.name}: {INSTALL}") from error


def write_onnx(model: GroundingModel, path: Path, form: Form = "gather", split: bool = False) -> None:
    """Write path.onnx, and with `split` also path.text.onnx.

    Args:
        form: of deformable attention, see vg.export.deform_attn.

    Raises:
        ConfigError: the family, its tokenizer or the size of the network cannot be exported.
    """
    networks = parts(model, split)
    settings, tokenizer = export_settings(model, split), _tokenizer_json(model)
    size = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    if size > MAX_BYTES:
        raise ConfigError(
            f"the model has {size_text(size)} of weights, an ONNX file at most {size_text(MAX_BYTES)}: try --split"
        )
    weights = TorchBackend(model, "cpu").digest()
    contents = {
        "detector": (path, {SETTINGS: settings.dump(), TOKENIZER: tokenizer, DETECTOR_WEIGHTS: weights}),
        "text": (text_file(path), {TEXT_WEIGHTS: weights}),
    }
    for name, part in networks.items():
        file, metadata = contents[name]
        network = _translated(part, form, max_tokens(model))
        network.model.metadata_props.update(metadata)
        network.save(str(file), external_data=False)


def export_settings(model: GroundingModel, split: bool) -> ExportSettings:
    """Return all that is needed to predict, beside network and tokenizer."""
    spec, image = model.text_spec, model.image_spec
    special = {name: getattr(spec.tokenizer, name, None) for name in SPECIAL_TOKENS}
    settings = ExportSettings(
        image={"class": type(image).__name__, **asdict(image)},
        max_tokens=max_tokens(model),
        delimiters=spec.delimiters,
        special_tokens={name: str(token) for name, token in special.items() if token is not None},
        split=split,
        generalized=model.generalized,
        classes=model.classes,
    )
    config = model.config
    if isinstance(config, GroundingDinoConfig):
        predict = config.predict
        settings = replace(settings, top_k=predict.top_k, threshold=predict.threshold, nms=predict.nms)
    return settings


def _tokenizer_json(model: GroundingModel) -> str:
    tokenizer = model.text_spec.tokenizer
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json; set model.text.tokenizer to one that has"
        )
    return tokenizer.backend_tokenizer.to_str()


def _translated(part: ExportedNetwork, form: Form, limit: int) -> Any:
    program = trace(part, form, limit)
    print("translate the program to ONNX, which takes as long again", flush=True)
    with _quiet(), torch.no_grad():
        return torch.onnx.export(
            program, dynamo=True, input_names=list(part.inputs), output_names=list(part.outputs), verbose=False
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and the advice of the exporter; its errors are exceptions."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def quantize(source: Path, target: Path) -> None:
    """Write a copy whose matrix products run in int8, with scales of activations computed at run time."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    del model.graph.value_info[:]  # shapes from tracing, which the inference of onnx may state differently
    with _quiet():
        quantize_dynamic(model, target, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
