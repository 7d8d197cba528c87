"""`vg export`: write a model as ONNX or as a program of torch.export, and compare it with PyTorch."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vg.cli.arguments import MODEL_HELP, add_overrides, add_tokenizer, check_writable
from vg.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vg.config import SavedConfig
    from vg.models.base import GroundingModel

EPILOG = """
OUT.onnx contains preprocessing, postprocessing and tokenizer: vg predict OUT.onnx IMAGE PHRASE needs neither the model
nor torch. OUT.pt2 is read by torch.export.load. Exit status 1, and no file, if boxes or scores of the exported model
differ by more than 0.001 from those of PyTorch.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("output", type=Path, metavar="OUT", help="file to write: .onnx or .pt2")
    about = "settings of the run, such as model.vision.id=/new/folder"
    add_overrides(parser, about, ("optim", "train"))
    parser.add_argument(
        "--form",
        choices=["gather", "grid-sample"],
        default="gather",
        help="operators of deformable attention (default: gather, which every runtime supports)",
    )
    parser.add_argument(
        "--split", action="store_true", help="write the text encoder to OUT.text.onnx, so that it runs once per prompt"
    )
    parser.add_argument("--int8", action="store_true", help="quantize matrix products, and report the loss of accuracy")
    add_tokenizer(parser)


def run(options: argparse.Namespace) -> None:
    from vg.inference.load import open_model

    suffix = options.output.suffix
    if suffix not in (".onnx", ".pt2"):
        raise ConfigError(f"{options.output}: the name must end with .onnx or .pt2")
    if suffix == ".pt2" and (options.split or options.int8):
        raise ConfigError("--split and --int8 are options of .onnx")
    if suffix == ".onnx":
        from vg.export.onnx_file import check_packages

        check_packages()
    check_writable(options.output)
    model, config, *_ = open_model(options.checkpoint, options.tokenizer, options.overrides)
    if suffix == ".pt2":
        from vg.export.program import save_program

        difference = save_program(model, options.output, options.form)
        print(f"largest difference from PyTorch: {difference:.1e}")
        print(f"written: {options.output}")
    else:
        _write_onnx(model, config, options)


def _write_onnx(model: GroundingModel, config: SavedConfig, options: argparse.Namespace) -> None:
    """Write and check the files in a temporary folder, and then move them."""
    from vg.config import RunConfig
    from vg.export.onnx_file import quantize, write_onnx
    from vg.export.parity import differences
    from vg.export.program import check
    from vg.files import replacing
    from vg.inference.onnx_backend import OnnxBackend, text_file
    from vg.inference.torch_backend import TorchBackend

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        write_onnx(model, file, options.form, options.split)
        torch = TorchBackend(model, "cpu")
        worst = 0.0
        for difference in differences(torch, file):
            print(difference, flush=True)
            worst = max(worst, difference.largest)
        check(worst)
        print(f"largest difference from PyTorch: {worst:.1e}")
        files = {file: options.output, text_file(file): text_file(options.output)}
        files = {source: target for source, target in files.items() if source.exists()}
        if options.int8:
            from vg.export.accuracy import accuracy_loss

            for source in files:
                quantize(source, source.with_suffix(".int8"))
                source.with_suffix(".int8").replace(source)
            try:
                if not isinstance(config, RunConfig):
                    raise DataError("the checkpoint names no evaluation data")
                for line in accuracy_loss(torch, OnnxBackend(file), config.data):
                    print(line)
            except DataError as error:
                print(f"the accuracy of int8 was not measured: {error}")
        for source, target in files.items():
            with replacing(target, is_file=True) as partial:
                shutil.move(source, partial)
            print(f"written: {target}")
