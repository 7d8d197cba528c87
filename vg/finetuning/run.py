"""Fine-tuning: trains a plan, and reports what it gained and how to use the model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate.utils import broadcast_object_list
from PIL import Image

from vg.config import load_config
from vg.distributed import may_be_restarted, new_accelerator, raise_on_all_processes
from vg.errors import ConfigError
from vg.evaluation.evaluator import NUM_PRINTED
from vg.evaluation.table import aligned, cell
from vg.files import write_bytes
from vg.finetuning.plan import FinetuneSettings, Plan, make_plan, refuse_other_run
from vg.finetuning.sizes import available_resources
from vg.inference.draw import save_image
from vg.inference.sample_grid import draw_samples
from vg.models.base import GroundingModel
from vg.models.saved import CONFIG
from vg.settings import as_overrides
from vg.training.data import phrases_with_boxes
from vg.training.fsdp import check_launcher
from vg.training.report import print_above_bar
from vg.training.run_folder import refuse_run
from vg.training.trainer import Trainer

if TYPE_CHECKING:
    from vg.inference.grounder import Grounder

PREDICTIONS, COMPARISON, EXAMPLE = "predictions.png", "comparison.txt", "example.png"
NUM_PHRASES = 5  # in the command that is printed


def finetune(
    folder: str | Path,
    model: str | Path | None = None,
    *,
    phrases: Sequence[str] | Mapping[str, str] | None = None,
    images: str | Path | None = None,
    output: str | Path | None = None,
    lora: bool = False,
    tokenizer: str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> Grounder:
    """Fine-tune on a folder of annotated images; what is decided and how it goes is printed.

        grounder = vg.finetune("raccoons")
        grounder("image.jpg", "raccoon")

    Args:
        folder: images with boxes in COCO json, Pascal VOC, YOLO or ODVG, or a CSV or jsonl of image, phrase, box (see
            `vg.data.expressions.CsvConfig`); or the file with the annotations. Without a validation split about a
            fifth of the images becomes one.
        model: a Grounding DINO of any format (a .pth, a transformers folder, its Hub id), a run of either family, or
            "small", a small network with random weights. By default Grounding DINO with Swin-T, from the Hub.
        phrases: the classes to train; the boxes of others are left out. "NAME=PHRASE" gives a class another phrase;
            only such ones, or a dict, keep all classes. By default all classes, by their names.
        images: folder of the images, if they are not where the annotations are.
        output: folder of the run; by default runs/NAME of the folder.
        lora: train low-rank adapters instead of all weights, which needs less memory.
        tokenizer: see `vg.inference.load.load_model`.
        overrides: of the planned configuration, such as "train.max_steps=100" or "optim.lr=1e-5".
        resume, overwrite: continue the run in `output`, which must have these arguments, or replace it.

    Returns:
        The best checkpoint.

    Raises:
        DataError: there is no dataset, or several; or the data has errors, which the message lists.
        ConfigError, CheckpointError: see `make_plan`; or `output` contains a run.
    """
    from vg.inference.grounder import Grounder

    settings = FinetuneSettings(folder, model, phrases, images, output, lora, tokenizer, as_overrides(overrides))
    run = settings.run_folder
    if resume:
        if not (run / CONFIG).is_file():
            raise ConfigError(f"{run} contains no run to continue; leave out --resume")
        refuse_other_run(load_config(run / CONFIG), settings)
        config = load_config(run / CONFIG, settings.overrides)
    else:
        if not (overwrite or may_be_restarted()):  # then it continues the run, see RunFolder
            refuse_run(run)  # before the data is checked
        config = shared_plan(settings).config
    trainer = Trainer(config, resume, overwrite)
    after = trainer.fit()
    grounder = Grounder(trainer.folder.path)
    if trainer.accelerator.is_main_process:
        report(trainer, after, grounder.model)
    return grounder


def shared_plan(settings: FinetuneSettings) -> Plan:
    """Make the plan in the main process, print it, and return it in all processes.

    Its checks take minutes, and the processes of a machine measure different amounts of free memory.
    """
    check_launcher()
    accelerator = new_accelerator()
    resources = available_resources(accelerator)
    plans: list[Any] = [None]
    with raise_on_all_processes():
        if accelerator.is_main_process:
            plans = [make_plan(settings, resources)]
            print(plans[0].to_yaml())
    broadcast_object_list(plans)
    return cast("Plan", plans[0])


def report(trainer: Trainer, after: Mapping[str, Any], model: GroundingModel) -> None:
    """Compare the model before and after training, draw its predictions, and print the next command.

    Args:
        after: results of the best evaluation.
        model: the best checkpoint.
    """
    folder = trainer.folder
    before = next((row for row in folder.history.rows() if row["step"] == 0 and "loss" not in row), {})
    table = comparison(before, after)
    write_bytes(folder.path / COMPARISON, f"{table}\n".encode())
    draw_samples(model, trainer.config.data, folder.path / PREDICTIONS, trainer.evaluator.datasets[0].data)
    source = trainer.evaluator.sources[0]
    samples = (source.load(index, epoch=0) for index in range(len(source)))
    sample = next((sample for sample in samples if phrases_with_boxes(sample)), None) or source.load(0, epoch=0)
    save_image(Image.fromarray(sample.image), folder.path / EXAMPLE)
    phrases = () if model.classes else dict.fromkeys([*phrases_with_boxes(sample), *sample.phrases])
    words = [str(folder.path), str(folder.path / EXAMPLE), *list(phrases)[:NUM_PHRASES]]
    compared = f"before and after {after['step']:,} steps:"
    if after["step"] == 0:
        compared = f"training did not improve on the initial weights; {folder.best} holds them:"
    print_above_bar(
        f"{after['data']}, {after['split']}, {compared}\n{table}\n"
        f"predictions on it: {folder.path / PREDICTIONS}\n"
        f"next: vg predict {shlex.join(words)}"
    )


def comparison(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return a table of the first metrics, and of the first one for each group, before and after training.

    Args:
        before: row of the first evaluation in history.jsonl; empty if there was none.
        after: results of the best evaluation.
    """
    names = [name for name, value in after.items() if isinstance(value, float) and "/" not in name][:NUM_PRINTED]
    names += [name for name in after if name.endswith(f"/{names[0]}")]
    rows = [[name, cell(before.get(name)), cell(after[name])] for name in names]
    return aligned([["", "before", "after"], *rows])
