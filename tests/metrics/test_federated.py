"""Fixed average precision of LVIS: values of lvis-api, cases by hand, and reading the annotations."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.metrics.test_coco import pairs
from tests.models.grounding_dino.tiny import tiny_model
from vg.checkpoint import write_model
from vg.cli import main
from vg.config import ModelOnlyConfig
from vg.data import CocoConfig
from vg.data.subset import SplitConfig
from vg.errors import DataError
from vg.evaluation.evaluator import new_metric
from vg.metrics import FederatedMetric, federated
from vg.types import Coverage, Prediction, Target

# Of `drawn_dataset`, by LVISEval of lvis-api 0.5.3 with params.max_dets = -1, after the results of each class were cut
# to the key: AP, APr, APc, APf, AP50, AP75, APs, APm, APl, AR.
LVIS_API: dict[int, Sequence[float]] = {
    10_000: (
        *(0.3809457458359249, 0.38451002352304364, 0.35410495242266066, 0.40422226156207036, 0.6972978114967944),
        *(0.3594817868822382, 0.3894598767598134, 0.4016861318395001, 0.42123762376237617, 0.47603414351381823),
    ),
    40: (
        *(0.3293194147554268, 0.3239085854954082, 0.2937616433695272, 0.370288015401345, 0.5988053190834308),
        *(0.31305943916317835, 0.3475219965040484, 0.32681906285866685, 0.32059405940594055, 0.3801361014775649),
    ),
}
SIZE = (200, 300)  # height, width


def drawn_dataset() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return LVIS json and results: 40 images of 300 x 200 px, 9 classes, boxes of all sizes; equal on all machines."""
    draw = random.Random(0)
    classes = [{"id": 3 * i + 1, "name": f"class {i}", "frequency": "rcf"[i % 3]} for i in range(9)]
    images, annotations, found = [], [], []

    def box() -> list[float]:
        side = draw.choice([12, 40, 120])
        x, y = draw.uniform(0, 290 - side), draw.uniform(0, 190 - side)
        return [round(x, 2), round(y, 2), round(side * draw.uniform(0.5, 1), 2), round(side * draw.uniform(0.5, 1), 2)]

    for image in range(1, 41):
        ids = [row["id"] for row in classes]
        draw.shuffle(ids)
        positive, negative, unknown = ids[:3], ids[3:6], ids[6:]
        partial = positive[: draw.choice([0, 1, 2])] + unknown[:1]  # the last one has no effect
        images.append(
            {
                "id": image,
                "coco_url": f"http://images.cocodataset.org/val2017/{image:012}.jpg",
                "height": SIZE[0],
                "width": SIZE[1],
                "neg_category_ids": negative,
                "not_exhaustive_category_ids": partial,
            }
        )
        for category in ids:
            own = [box() for _ in range(draw.choice([1, 2, 4]))] if category in positive else []
            for values in own:
                area = round(values[2] * values[3] * draw.uniform(0.6, 1), 2)
                row = {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": values}
                annotations.append({**row, "area": area, "iscrowd": 0})
            near = [[round(x + draw.uniform(-0.1, 0.1) * max(b[2:]), 2) for x in b] for b in own if draw.random() < 0.8]
            for values in near + [box() for _ in range(draw.choice([0, 1, 3]))]:
                score = round(draw.random() / 2 + (values in near) * draw.random() / 2, 6)
                found.append({"image_id": image, "category_id": category, "bbox": values, "score": score})
    return {"images": images, "categories": classes, "annotations": annotations}, found


def written(folder: Path, truth: dict[str, Any]) -> CocoConfig:
    (folder / "val2017").mkdir(exist_ok=True)
    for row in truth["images"]:
        Image.new("RGB", SIZE[::-1]).save(folder / "val2017" / row["coco_url"].split("/")[-1])
    (folder / "lvis_v1_val.json").write_text(json.dumps(truth))
    return CocoConfig(path=str(folder / "lvis_v1_val.json"), image_root=str(folder))


@pytest.mark.parametrize("limit", LVIS_API)
def test_values_of_lvis_api(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federated, "LIMIT", limit)
    truth, found = drawn_dataset()
    source = written(tmp_path, truth).build()
    assert source.provenance.task == "federated"
    metric = new_metric(source)
    assert isinstance(metric, FederatedMetric)
    for index, (prediction, target) in enumerate(pairs(truth, found)):
        sample = source.load(index, epoch=0)
        assert (sample.id, sample.phrases) == (target.id, target.phrases)
        assert sample.coverage is not None
        metric.update([prediction], [replace(target, coverage=torch.from_numpy(sample.coverage))])
    metrics, groups = metric.compute()
    assert [metrics[name] for name in metric.metric_names] == pytest.approx(LVIS_API[limit], abs=1e-12)
    assert (metrics["num_images"], metrics["num_boxes"], metrics["num_categories"]) == (40, 306, 9)
    assert metrics["ap"] == pytest.approx(np.mean([group["ap"] for group in groups.values()]), abs=1e-12)


def one_image(coverage: Sequence[int], phrase_ids: Sequence[int] = (0, 0)) -> FederatedMetric:
    """An image with a box of the first of two phrases; a prediction of it scores 0.5, one elsewhere 0.9."""
    box = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
    phrases, size = ("cat", "dog"), (100, 100)
    target = Target("1", size, phrases, torch.tensor([[0.3, 0.3, 0.4, 0.4]]), torch.tensor([0]))
    target = replace(target, coverage=torch.tensor(coverage, dtype=torch.uint8))
    boxes, ids = torch.cat([box + 45, box]), torch.tensor(phrase_ids)
    metric = FederatedMetric({"cat": "r"})
    metric.update([Prediction("1", boxes, torch.tensor([0.9, 0.5]), ids, phrases)], [target])
    return metric


@pytest.mark.parametrize(
    ("coverage", "ap"), [(Coverage.ALL, 0.5), (Coverage.SOME, 1.0), (Coverage.UNKNOWN, 0.0)], ids=lambda x: str(x)
)
def test_a_false_prediction_counts_where_all_objects_are_annotated(coverage: Coverage, ap: float) -> None:
    metrics, groups = one_image([coverage, Coverage.ALL]).compute()
    assert metrics["ap"] == metrics["ap_rare"] == groups["cat"]["ap"] == pytest.approx(ap)
    assert metrics["ap_common"] == metrics["ap_frequent"] == -1
    assert metrics["num_boxes"] == 1, "without the region that stands for unmarked objects"


def test_targets_without_coverage_are_refused() -> None:
    metric = one_image([2, 2])
    target = Target("2", (9, 9), ("cat",), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    prediction = Prediction("2", torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), ("cat",))
    with pytest.raises(ValueError, match="sample '2': the coverage"):
        metric.update([prediction], [target])


def test_the_coverage_of_an_image(tmp_path: Path) -> None:
    truth, _ = drawn_dataset()
    config = written(tmp_path, truth)
    source = config.build()
    ids = [row["id"] for row in truth["categories"]]
    for index, row in enumerate(truth["images"]):
        boxes = {found["category_id"] for found in truth["annotations"] if found["image_id"] == row["id"]}
        searched, partial = boxes | {*row["neg_category_ids"]}, {*row["not_exhaustive_category_ids"]}
        expected = [(id in searched) * (1 if id in partial else 2) for id in ids]
        assert source.load(index, epoch=0).coverage.tolist() == expected
    some = replace(config, vocabulary=replace(config.vocabulary, only=["class 1", "class 4"])).build()
    assert some.load(0, epoch=0).coverage.tolist() == [source.load(0, epoch=0).coverage.tolist()[i] for i in (1, 4)]
    assert some.frequencies == {"class 1": "c", "class 4": "c"}
    sampled = replace(config, vocabulary=replace(config.vocabulary, negatives=2)).build()
    assert sampled.load(0, epoch=0).coverage is None, "phrases are sampled for training only"
    part = SplitConfig(dataset=config, part="val", fraction=0.5).build()
    assert isinstance(new_metric(part), FederatedMetric)
    assert part.load(0, epoch=0).coverage is not None
    before = source.fingerprint()
    truth["images"][3]["neg_category_ids"].pop()
    assert written(tmp_path, truth).build().fingerprint() != before


@pytest.mark.parametrize("value", [[999], "cat", [[1]], 3])
def test_faulty_lists_are_errors(value: Any, tmp_path: Path) -> None:
    truth, _ = drawn_dataset()
    truth["images"][5]["not_exhaustive_category_ids"] = value
    with pytest.raises(DataError, match=r"not_exhaustive_category_ids that are not lists of ids.*image 6: "):
        written(tmp_path, truth).build()


def test_without_frequencies_only_their_metrics_are_undefined(tmp_path: Path) -> None:
    truth, _ = drawn_dataset()
    del truth["categories"][0]["frequency"]
    metric = new_metric(written(tmp_path, truth).build())
    assert isinstance(metric, FederatedMetric)
    assert metric.frequencies == {}


def test_the_command_evaluates_the_json_file_but_not_shards(tmp_path: Path) -> None:
    truth, _ = drawn_dataset()
    truth["images"] = truth["images"][:3]
    truth["annotations"] = [row for row in truth["annotations"] if row["image_id"] <= 3]
    config = written(tmp_path, truth)
    model = tiny_model()
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", model, ModelOnlyConfig(model.config))
    command = ["eval", str(tmp_path / "model"), "--output", str(tmp_path / "eval")]
    data = f"{{name: coco, path: {config.path}, image_root: {config.image_root}}}"
    main([*command, f"data.train={data}", f"data.eval={data}", "data.workers=0"])
    results = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert results["protocol"].startswith("fixed average precision of LVIS")
    assert {"ap", "ap_rare", "ap_common", "ap_frequent", "class 0/ap"} <= results.keys()
    main(["shard", config.path, str(tmp_path / "shards")])
    data = f"{{name: shards, path: {tmp_path / 'shards'}}}"
    with pytest.raises(SystemExit, match="for some of the classes only, and shards and mixtures do not keep which"):
        main([*command, f"data.train={data}", f"data.eval={data}", "data.workers=0"])
