"""What the table of a paper states about a run besides its accuracy, from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vg.config import RunConfig, SavedConfig
from vg.data import DatasetConfig
from vg.data.mixture import MixtureConfig, SourceConfig
from vg.data.refcoco.official import identify
from vg.data.refcoco.source import RefcocoConfig
from vg.data.stream import StreamConfig
from vg.data.subset import SplitConfig
from vg.data.synthetic.glyphs import GlyphsConfig
from vg.data.synthetic.shapes import ShapesConfig
from vg.evaluation.benchmark.suite import DATASETS
from vg.models.grounding_dino.config import GroundingDinoConfig, SwinConfig
from vg.models.rec.config import RecConfig


def described(config: SavedConfig) -> dict[str, str]:
    """Return the columns that the configuration determines."""
    model = config.model
    vision = resolution = ""  # of other families
    if isinstance(model, RecConfig):
        vision = _encoder(model.vision.id, (model.vision.architecture or {}).get("model_type"))
        resolution = f"{model.image_size}{', aspect kept' * model.keep_aspect}"
    elif isinstance(model, GroundingDinoConfig):
        backbone = model.backbone
        vision = (
            f"Swin of width {backbone.width}" if isinstance(backbone, SwinConfig) else _encoder(backbone.id, "resnet")
        )
        resolution = f"{model.image.shortest} to {model.image.longest}"
    texts = [model.text, *([model.extra_text] if isinstance(model, RecConfig) and model.extra_text else [])]
    text = " + ".join(_encoder(x.id, (x.architecture or {}).get("model_type")) for x in texts)
    found = {"vision": vision, "text": text, "resolution": resolution}
    if not isinstance(config, RunConfig):
        return found
    leaves = list(_leaves(config.data.train))
    own = list(dict.fromkeys(_title(leaf) for leaf in leaves if _official(leaf)))
    joint = "/".join([*own[:1], *(title.removeprefix("RefCOCO") for title in own[1:])])  # RefCOCO/+/g
    extra = [_title(leaf) for leaf in leaves if not _official(leaf)]
    if model.weights is not None:
        extra.append(f"that of {model.weights}")
    train = config.train
    limits = [f"at most {train.max_steps:,} steps"] if train.max_steps else []
    limits += ["early stopping"] if train.patience else []
    return found | {
        "training_data": f"{joint or 'none of RefCOCO'}{' (joint)' * (len(own) > 1)}",
        "extra_data": ", ".join(dict.fromkeys(extra)) or "none",
        "epochs": ", ".join([f"{train.minutes:g} minutes" if train.minutes else str(train.epochs), *limits]),
    }


def _encoder(id: str | None, model_type: str | None) -> str:
    return Path(id).name if id else f"{model_type}, from scratch"


def _leaves(source: SourceConfig) -> Iterator[DatasetConfig | StreamConfig]:
    """The datasets of a mixture or split."""
    if isinstance(source, MixtureConfig):
        for dataset in source.datasets:
            yield from _leaves(dataset)
    elif isinstance(source, SplitConfig):
        yield from _leaves(source.dataset)
    else:
        yield source


def _official(source: DatasetConfig | StreamConfig) -> str | None:
    """Return the title of a dataset of the RefCOCO family, None for others."""
    if not isinstance(source, RefcocoConfig):
        return None
    known = identify(source.dataset or source.path)
    return known[0][0] if known else None


def _title(source: DatasetConfig | StreamConfig) -> str:
    if isinstance(source, StreamConfig):
        return f"{source} ({source.split})"
    title = _official(source) or Path(getattr(source, "path", source.name)).name
    split = getattr(source, "split", None) or "train"
    return title if split == "train" else f"{title} ({split})"


def may_have_seen(config: SavedConfig, key: str, split: str) -> bool:
    """Whether the run trained on images that another dataset of COCO's images has in this split.

    Splits of one dataset share no image, but datasets do: 634 of the 1,300 images of RefCOCOg val (UMD) are in the
    training split of RefCOCO. So do its partitions: that of Google splits RefCOCOg by object.
    """
    if not isinstance(config, RunConfig):
        return False  # unknown, as the training data is
    title = DATASETS[key].title.removesuffix(" (reviewed)").removesuffix("-M")
    data = config.data
    evaluated = {
        (_official(leaf), getattr(leaf, "split", None)) for x in data.eval_datasets().values() for leaf in _leaves(x)
    }
    if data.drop_overlap and (title, split) in evaluated:
        return False
    drawn = (ShapesConfig, GlyphsConfig)
    leaves = [leaf for leaf in _leaves(data.train) if not isinstance(leaf, drawn)]
    return any(_title(leaf) != title or _partition(leaf) == "google" for leaf in leaves)


def _partition(source: DatasetConfig | StreamConfig) -> str | None:
    """Return the partition of a dataset of the RefCOCO family, None if its settings do not determine it."""
    if not isinstance(source, RefcocoConfig):
        return None
    known = identify(source.dataset or source.path)
    return source.partition or (known[0][1] if len(known) == 1 else None)
