"""A rec for any number of objects on gRefCOCO end to end: training, evaluation, prediction."""

from collections import Counter
from pathlib import Path

from tests.conftest import history
from tests.evaluation.benchmark.test_run import REAL, needs_images, write_grefs
from vg.config import DataConfig, RunConfig
from vg.data.refcoco.source import RefcocoConfig
from vg.inference.grounder import Grounder
from vg.models.rec.config import DenseHeadConfig, RecConfig
from vg.training.optim import OptimConfig
from vg.training.settings import TrainConfig
from vg.training.trainer import Trainer


@needs_images
def test_rec_is_trained_on_generalized_expressions_and_finds_any_number(tmp_path: Path) -> None:
    """It memorizes which expression has one object, two, or none; the loss of the evaluation covers all three."""
    write_grefs(tmp_path / "grefcoco")
    source = RefcocoConfig(path=str(tmp_path / "grefcoco"), split="val", image_root=str(REAL / "images"))
    model = RecConfig.tiny()
    assert isinstance(model.head, DenseHeadConfig)
    model.head.objects = "any"
    config = RunConfig(
        model=model,
        data=DataConfig(train=source, eval=source, batch_size=3, workers=0),
        optim=OptimConfig(lr=1e-2),
        train=TrainConfig(epochs=150, eval_every=150, output=str(tmp_path / "run"), trackers=[]),
    )
    results = Trainer(config).fit()
    assert (results["num_expressions"], results["num_absent"]) == (3, 1)
    assert results["f1"] == results["n_acc"] == results["t_acc"] == 1
    (loss,) = (row["eval_loss"] for row in history(config) if "eval_loss" in row)
    assert 0 < loss < 1
    grounder = Grounder(tmp_path / "run", "cpu")
    image = REAL / "images" / "COCO_train2014_000000520199.jpg"
    found = grounder(image, ["the dog", "pink shirt", "both women"])
    assert Counter(found.labels) == {"pink shirt": 1, "both women": 2}
    assert min(found.scores) >= 0.5
    assert len(grounder(image, "the dog")) == 0
