"""Every published format of RefCOCO gives the same samples, with the same ids and splits."""

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from vg.data.overlap import without_overlap
from vg.data.refcoco.rows import image_source
from vg.data.refcoco.source import Refcoco, RefcocoConfig
from vg.data.subset import SplitConfig
from vg.errors import DataError

datasets = pytest.importorskip("datasets")

REAL = Path(__file__).parents[3] / ".." / "shared" / "data"
NAME = "COCO_train2014_000000000716.jpg"
XYWH, XYXY = [10.0, 20.0, 30.0, 15.0], [10.0, 20.0, 40.0, 35.0]
JXU124 = {
    "ann_id": 5,
    "image_path": f"coco/train2014/{NAME}",
    "file_name": "COCO_train2014_000000000716_5.jpg",
    "captions": ["red man", "man on left"],
    "bbox": XYXY,
    "raw_anns": json.dumps({"id": 5, "bbox": XYWH}),
}
LMMS = {"question_id": "5", "answer": ["red man", "man on left"], "bbox": XYWH, "file_name": NAME, "question": "?"}
LINES = [
    {"file_name": NAME, "image_id": 716, "ann_id": 5, "bbox": XYWH, "sent": sent} for sent in ("red man", "man on left")
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def images(tmp_path) -> Path:
    """An image root with one image, 80 wide and 60 high."""
    root = tmp_path / "images"
    (root / "train2014").mkdir(parents=True)
    (root / "train2014" / NAME).write_bytes(jpeg())
    return root


def jpeg(**options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(file := io.BytesIO(), "JPEG", **options)
    return file.getvalue()


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def build(path: Path | str, split: str = "val", **options) -> Refcoco:
    return RefcocoConfig(path=str(path), split=split, **options).build()


def with_pixels(row: dict, pixels: bytes | None = None) -> dict:
    return {**row, "image": {"bytes": pixels or jpeg(), "path": None}}


def image_dataset(rows: list[dict]) -> "datasets.Dataset":
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def write_toolbox(folder: Path, partition: str = "unc", **changes) -> Path:
    folder.mkdir(exist_ok=True)
    ref = {"ref_id": 1, "ann_id": 5, "image_id": 716, "split": "val", "file_name": "COCO_train2014_000000000716_5.jpg"}
    ref |= {"sentences": [{"sent": line["sent"], "sent_id": n} for n, line in enumerate(LINES)], **changes}
    (folder / f"refs({partition}).p").write_bytes(pickle.dumps([ref], protocol=0))
    instances = {"annotations": [{"id": 5, "bbox": XYWH}], "images": [{"id": 716, "file_name": NAME}]}
    (folder / "instances.json").write_text(json.dumps(instances))
    return folder


def export(layout: str, folder: Path) -> Path:
    """Write one object in a published format and return the path for the settings."""
    folder.mkdir()
    if layout == "jxu124 parquet":
        datasets.Dataset.from_list([JXU124]).to_parquet(folder / "validation-00000-of-00001.parquet")
    elif layout == "jxu124 column split":
        rows = [JXU124 | {"split": "val"}, JXU124 | {"split": "testA"}]
        datasets.Dataset.from_list(rows).to_parquet(folder / "0000.parquet")
    elif layout == "lmms parquet":
        (folder / "data").mkdir()
        image_dataset([with_pixels(LMMS)]).to_parquet(folder / "data" / "val-00000-of-00001.parquet")
    elif layout == "lmms save_to_disk":
        datasets.DatasetDict(val=image_dataset([with_pixels(LMMS)])).save_to_disk(folder)
    elif layout == "lmms one split":
        image_dataset([with_pixels(LMMS)]).save_to_disk(folder)
    elif layout == "toolbox":
        return write_toolbox(folder)
    elif layout == "toolbox file":
        return write_toolbox(folder) / "refs(unc).p"
    elif layout == "jsonl":
        return write_lines(folder / "mini_val.jsonl", LINES)
    elif layout == "json":
        rows = [{**line, "image": line["file_name"], "split": "val"} for line in LINES]
        (folder / "refs.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        "jxu124 parquet",
        "jxu124 column split",
        "lmms parquet",
        "lmms save_to_disk",
        "lmms one split",
        "toolbox",
        "toolbox file",
        "jsonl",
        "json",
    ],
)
def test_every_published_format_gives_the_same_samples(layout, tmp_path, images):
    source = build(export(layout, tmp_path / "mini"), image_root=str(images))
    assert (len(source), source.num_refs) == (2, 1)
    assert source.provenance.split == "val"
    assert source.provenance.data == ("mini-unc" if "toolbox" in layout else "mini")
    first, second = source.load(0, epoch=0), source.load(1, epoch=0)
    assert (first.phrases, second.phrases) == (("red man",), ("man on left",))
    assert [first.id, second.id] == [f"{source.provenance.data}/val/5/{index}" for index in (0, 1)]
    assert first.image.shape == (60, 80, 3)
    assert first.image.flags.writeable
    assert first.boxes.tolist() == [XYXY]
    assert first.boxes.dtype == np.float32


def test_phrases_are_known_without_images(tmp_path, images):
    rows = [LINES[0], {**LINES[0], "ann_id": 6}, {**LINES[1], "bbox": "no box"}]
    source = build(write_lines(tmp_path / "mini_val.jsonl", rows), image_root=str(images))
    expected = [(sample.id, sample.phrases) for sample in (source.load(index, epoch=0) for index in range(2))]
    assert source.sample_phrases()[:2] == expected
    assert source.sample_phrases()[2][1] == (LINES[1]["sent"],), "a bad box is reported when its sample is loaded"


def test_expression_types_are_those_of_the_column_kinds(tmp_path):
    image_dataset([{**with_pixels(LMMS), "kinds": ["attribute", "relation"]}]).save_to_disk(tmp_path / "saved")
    source = build(tmp_path / "saved")
    samples = [source.load(index, epoch=3) for index in range(2)]
    assert [sample.id for sample in samples] == ["saved/val/5/0", "saved/val/5/1"]
    assert [sample.expression_type for sample in samples] == ["attribute", "relation"]
    assert [sample.phrases for sample in samples] == [("red man",), ("man on left",)]
    for sample in samples:
        np.testing.assert_array_equal(sample.image, np.asarray(Image.open(io.BytesIO(jpeg()))))


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image_dataset([with_pixels(LMMS, jpeg(exif=exif))]).save_to_disk(tmp_path / "saved")
    assert build(tmp_path / "saved").load(0, epoch=0).image.shape == (60, 80, 3)


def test_an_object_with_expressions_in_two_rows_has_unique_ids(tmp_path, images):
    rows = [LINES[0], {**LINES[0], "ann_id": 6}, LINES[1]]
    source = build(write_lines(tmp_path / "mini_val.jsonl", rows), image_root=str(images))
    ids = [source.load(index, epoch=0).id for index in range(3)]
    assert ids == ["mini/val/5/0", "mini/val/6/0", "mini/val/5/1"]
    assert source.num_refs == 2


def test_worker_processes_load_the_same_samples(tmp_path):
    image_dataset([with_pixels({**LMMS, "question_id": str(n)}) for n in range(4)]).save_to_disk(tmp_path / "saved")
    source = build(tmp_path / "saved")

    class Ids:
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> str:
            return source.load(index, epoch=0).id

    loader = DataLoader(Ids(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == [f"saved/val/{n}/{index}" for n in range(4) for index in (0, 1)]


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        (f"train2014/{NAME}", NAME),
        (NAME, f"coco/train2014/{NAME}"),
        ("000000000716.jpg", NAME),
        ("train2017/000000000716.jpg", NAME),
        (f"images/{NAME}", "000000000716.jpg"),
        (NAME, "COCO_train2014_000000000716_5.jpg"),
        ("mine/a.jpg", "mine/a.jpg"),
    ],
)
def test_an_image_is_found_under_its_other_coco_names(stored, named, tmp_path):
    (tmp_path / stored).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / stored).write_bytes(jpeg())
    assert image_source({**LINES[0], "file_name": named}, tmp_path)[0] == tmp_path / stored


@pytest.mark.parametrize("split", ["validation", "testA", "test", "testB"])
def test_splits_are_accepted_by_our_name_and_the_published_name(split, tmp_path, images):
    for published, ann_id in (("validation", 1), ("test", 2), ("testB", 3)):  # test of jxu124/refcoco is testA
        rows = [{**JXU124, "ann_id": ann_id}]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{published}-00000-of-00001.parquet")
    source = build(tmp_path, split, image_root=str(images))
    ours, ann_id = {"validation": ("val", 1), "testB": ("testB", 3)}.get(split, ("testA", 2))
    assert source.provenance.split == ours
    assert source.load(0, epoch=0).id == f"{tmp_path.name}/{ours}/{ann_id}/0"
    with pytest.raises(DataError, match="no split 'dev'; it has testA, testB, val"):
        build(tmp_path, "dev", image_root=str(images))


def test_numbered_shards_of_a_split_are_read_in_order(tmp_path, images):
    for shard in (1, 0):
        rows = [{**JXU124, "ann_id": shard}]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet")
    source = build(tmp_path, "train", image_root=str(images))
    assert [source.load(index, epoch=0).id.split("/")[-2] for index in range(4)] == ["0", "0", "1", "1"]


def test_mixed_splits_of_lmms_lab_warn(tmp_path):
    (tmp_path / "refcoco_test.json").write_text(json.dumps([{**LMMS, "image": NAME}] * 5000))
    with pytest.warns(UserWarning, match="5,000 other rows: results on it cannot be compared"):
        source = build(tmp_path / "refcoco_test.json", "test")
    assert source.provenance.official is False


def test_importing_needs_neither_torch_nor_datasets():
    code = "import sys, vg.data.refcoco.source; sys.exit(any(name in sys.modules for name in ('torch', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "num_refs", "num_expressions"),
    [
        ("refcoco_unc_val", 3811, 10834),
        ("refcocoplus_unc_val", 3805, 10758),
        ("refcocog_umd_val", 2573, 4896),
    ],
)
def test_counts_of_published_annotations(name, num_refs, num_expressions):
    file = REAL / "refcoco_annotations" / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip("the published annotations are not available")
    source = build(file)
    assert (source.num_refs, len(source)) == (num_refs, num_expressions)


def test_real_images_load():
    folder = REAL / "refcoco_with_images"
    if not folder.is_dir():
        pytest.skip("the real images are not available")
    source = build(folder / "refs.json")
    samples = [source.load(index, epoch=0) for index in range(len(source))]
    assert len({sample.id for sample in samples}) == 22
    sizes = {(row["height"], row["width"], 3) for row in json.loads((folder / "refs.json").read_text())}
    assert {sample.image.shape for sample in samples} == sizes


def test_images_without_names_are_told_apart(tmp_path):
    """Rows without any name must not count as one image, which all datasets have in common."""
    columns = {"ann_id": [1, 2], "sent": [["a dog", "the dog"], ["a cat"]], "bbox": [XYWH, XYWH]}
    table = datasets.Dataset.from_dict(columns | {"image": [{"bytes": jpeg(), "path": None}] * 2})
    table = table.cast_column("image", datasets.Image())
    datasets.DatasetDict({"val": table}).save_to_disk(tmp_path / "plain")
    source = RefcocoConfig(path=str(tmp_path / "plain"), split="val").build()
    assert source.image_keys() == ["plain/val/row 0", "plain/val/row 0", "plain/val/row 1"]
    assert source.image_groups(0).tolist() == [0, 0, 1]
    assert source.load(2, 0).image.shape == (60, 80, 3)


ROWS = {"ann_id": [1, 2, 3], "sent": ["a dog", "the dog", "a cat"], "bbox": [XYWH] * 3}


def write_parquet(folder: Path, image: list, feature=None) -> Path:
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict(ROWS | {"image": image})
    table = table if feature is None else table.cast_column("image", feature)
    table.to_parquet(folder / "val.parquet")
    return folder


@pytest.mark.parametrize("feature", ["string", "large_string"])
def test_a_column_of_image_names_is_that_of_json_lines(feature, tmp_path):
    names = ["0.png", "0.png", NAME]
    for name in names:
        (tmp_path / name).write_bytes(jpeg())
    columns = zip(*(ROWS | {"image": names}).values(), strict=True)
    (tmp_path / "lines").mkdir()
    write_lines(
        tmp_path / "lines" / "val.jsonl", [dict(zip([*ROWS, "image"], cells, strict=True)) for cells in columns]
    )
    write_parquet(tmp_path / "parquet", names, datasets.Value(feature))
    lines, parquet = (build(tmp_path / kind, image_root=str(tmp_path)) for kind in ("lines", "parquet"))
    assert parquet.image_keys() == lines.image_keys() == [str(tmp_path / "0.png")] * 2 + ["coco/716"]
    assert parquet.image_files() == lines.image_files() == [tmp_path / name for name in names]
    assert parquet.load(2, 0).image.shape == (60, 80, 3)
    with pytest.warns(UserWarning, match="3 of 3 training samples"):
        without_overlap(parquet, [parquet], drop=False)


def test_images_are_identified_by_coco_names_beside_their_pixels(tmp_path):
    names = [NAME, "0.jpg", NAME.replace("train2014", "val2014")]
    folder = write_parquet(tmp_path / "set", [{"bytes": jpeg(), "path": name} for name in names], datasets.Image())
    source = build(folder)
    assert source.image_keys() == ["coco/716", "set/val/row 1", "coco/716"]
    assert source.image_files() == [None] * 3
    assert source.load(1, 0).image.shape == (60, 80, 3)
    parts = [SplitConfig(dataset=RefcocoConfig(path=str(folder), split="val"), part=part) for part in ("train", "val")]
    with pytest.warns(UserWarning, match=r"set \(val\): 1 of 2 images have no name"):
        train, val = (part.build() for part in parts)
    assert len(train) + len(val) == 3
    assert not set(train.image_keys()) & set(val.image_keys())


def test_a_column_of_image_names_needs_an_image_root(monkeypatch):
    table = datasets.Dataset.from_dict(ROWS | {"image": [NAME] * 3})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, revision: datasets.DatasetDict(val=table))
    with pytest.raises(DataError, match=r"a/b has no pixels; set image_root"):
        build("a/b")
