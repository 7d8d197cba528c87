"""The table of a paper: which runs share a row, what is marked or refused, and that every format can be read back."""

from __future__ import annotations

import csv
import json
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from vg.cli import main
from vg.cli.benchmark import trained_parameters
from vg.config import ModelOnlyConfig, dump_config, load_config
from vg.errors import ConfigError
from vg.evaluation.benchmark.paper import _common_name, paper_table
from vg.evaluation.benchmark.typeset import comma_separated, latex, markdown
from vg.metrics.rec import RecMetric
from vg.models.grounding_dino.config import GroundingDinoConfig

CONFIGS = Path(__file__).parents[3] / "configs" / "rec"
COUNTS = {"val": 10834, "testA": 5657, "testB": 5095, "test": 9602}
PARTITIONS = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes the benchmark.json of a run, with accuracies such as {"refcoco val": 0.8}."""

    def write(
        name: str,
        scores: dict[str, float],
        recipe: str = "refcoco_dense",
        overrides: Sequence[str] = (),
        **changes: Any,
    ) -> Path:
        config = load_config(CONFIGS / f"{recipe}.yaml", [*overrides, f"train.output=runs/{name}"])
        parts = [
            {
                "key": key,
                "split": split,
                "title": key,
                "data": f"{key} ({PARTITIONS[key]})",
                "partition": PARTITIONS[key],
                "official": "yes",
                "protocol": RecMetric.protocol,
                "num_expressions": COUNTS[split],
                "acc@0.5": score,
            }
            | changes.get("part", {})
            for (key, split), score in ((column.split(), score) for column, score in scores.items())
        ]
        content = {
            "checkpoint": f"runs/{name}",
            "overrides": [],
            "precision": "no",
            "config": yaml.safe_load(dump_config(config)),
            "trained_parameters": 25_948_420,
            "model": {"parameters": 144_968_836, "trainable_parameters": 25_948_420, "answers": "one"},
            "parts": parts,
        }
        folder = tmp_path / name
        folder.mkdir()
        (folder / "benchmark.json").write_text(json.dumps(content | changes.get("content", {})))
        return folder

    return write


def test_interpolated_weights_have_a_row_of_their_own(write: Write) -> None:
    runs = [write(f"dense_{seed}", {"refcoco val": 0.8}, overrides=[f"train.seed={seed}"]) for seed in (0, 1)]
    for run, weight in zip(runs, (0.5, 0.75), strict=True):
        content = json.loads((run / "benchmark.json").read_text())
        content["parts"][0]["acc@0.5"] = 0.9
        (run / "interpolated").mkdir()
        (run / "interpolated" / "benchmark.json").write_text(json.dumps(content | {"interpolation": weight}))
    table = paper_table([*runs, *(run / "interpolated" for run in runs)], with_published=False)
    assert [(row.method, row.seeds, row.values["refcoco", "val"].mean) for row in table.ours] == [
        ("dense", (0, 1), pytest.approx(80.0)),
        ("dense, interpolated", (0, 1), pytest.approx(90.0)),
    ]


def test_results_of_a_part_are_found_by_their_run(write: Write) -> None:
    run = write("run", {"refcoco val": 0.8})
    part = run / "eval" / "suite=refcoco,datasets=refcoco"
    part.mkdir(parents=True)
    (run / "benchmark.json").rename(part / "benchmark.json")
    for folder in (run, part):
        assert [row.method for row in paper_table([folder], with_published=False).ours] == ["run"]
    (run / "eval" / "suite=refcoco,splits=val").mkdir()
    (run / "eval" / "suite=refcoco,splits=val" / "benchmark.json").touch()
    with pytest.raises(ConfigError, match=r"several parts of the suite; give one: .*datasets=refcoco or .*splits=val"):
        paper_table([run])


def test_only_splits_known_to_be_incomplete_are_marked(write: Write) -> None:
    unknown = write("unknown", {"refcoco val": 0.8}, part={"official": None})
    subset = write("subset", {"refcoco val": 0.8}, overrides=["train.epochs=3"], part={"official": "no"})
    first, second = paper_table([unknown, subset], with_published=False).ours
    assert [row.values["refcoco", "val"].marks for row in (first, second)] == ["", "*"]


def test_seeds_share_a_row_with_mean_and_deviation(write: Write) -> None:
    scores = [0.80, 0.82, 0.87]
    seeds = [
        write(f"dense_{seed}", {"refcoco val": score, "refcoco testA": 0.5}, overrides=[f"train.seed={seed}"])
        for seed, score in enumerate(scores)
    ]
    other = write("longer", {"refcoco val": 0.88}, overrides=["train.epochs=40"])
    table = paper_table([seeds[2], other, seeds[0], seeds[1]])
    dense, longer = table.ours
    assert (dense.method, dense.seeds, longer.method, longer.seeds) == ("dense", (0, 1, 2), "longer", (0,))
    value = dense.values["refcoco", "val"]
    assert value.mean == pytest.approx(83.0)
    assert value.deviation == pytest.approx(100 * statistics.stdev(scores))
    assert longer.values["refcoco", "val"].deviation is None
    assert table.columns == [("refcoco", "val"), ("refcoco", "testA"), ("refcoco", "testB")]
    assert (dense.vision, dense.text) == ("dinov3-vitb16-pretrain-lvd1689m", "bge-small-en-v1.5")
    assert (dense.resolution, dense.training_data, dense.extra_data) == ("224", "RefCOCO", "none")
    assert (dense.epochs, longer.epochs) == ("10", "40")
    text = markdown(table)
    assert "| dense (3 runs) | dinov3-vitb16-pretrain-lvd1689m | bge-small-en-v1.5 | 224 | 25.95 | 144.97 | " in text
    assert "| 83.00 ± 3.61 | 50.00 ± 0.00 | - |" in text
    assert "standard deviation of the sample" in text
    assert r"$83.00 \pm 3.61$ & $50.00 \pm 0.00$ & -- \\" in latex(table)


def test_published_rows_have_their_digits_and_sources(write: Write) -> None:
    table = paper_table([write("mine", {"refcoco val": 0.8, "refcocog test": 0.7})])
    text = markdown(table)
    assert r"| MaPPER \[6\] | DINOv2 | - | 518 | - | - | - | - | 90/180 | 86.03 | 88.90 |" in text
    assert re.search(r"TransVG R50 \\\[2\\\] .*\| 80\.5 \| 83\.2 \| 75\.2 \| 67\.9 \| 67\.4 \|", text)
    assert r"SwimVG \[7\] | DINOv2-L | CLIP-B | 224 | 9.75 |" in text
    assert r"- \[6\] github.com/liuting20/MaPPER, README (EMNLP 2024) (DINOv2 and a text encoder" in text


def test_the_table_is_printed_without_an_output(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(table_folder(write))
    main(["table", folder])
    assert capsys.readouterr().out == markdown(paper_table([folder]))
    main(["table", folder, "--only-ours"])
    shown = capsys.readouterr().out
    assert "| alone | dinov3" in shown
    assert "MaPPER" not in shown


def table_folder(write: Write) -> Path:
    return write("alone", {"refcoco val": 0.8})


def test_what_is_not_comparable_is_marked(write: Write) -> None:
    both = {"refcoco val": 0.8, "refcocog val": 0.6}
    some = write("some", {"refcoco val": 0.8}, overrides=["optim.lr=1e-3"], part={"official": "no"})
    joint = write("joint", both, "refcoco_joint")
    careless = write("careless", both, "refcoco_joint", ["data.drop_overlap=false"])
    table = paper_table([write("single", both), some, joint, careless], with_published=False)
    found = {row.method: ({key: value.marks for (key, _), value in row.values.items()}) for row in table.ours}
    assert found == {
        "single": {"refcoco": "", "refcocog": "†"},
        "some": {"refcoco": "*"},
        "joint": {"refcoco": "", "refcocog": ""},
        "careless": {"refcoco": "†", "refcocog": "†"},
    }
    assert [row.training_data for row in table.ours][1:3] == ["RefCOCO", "RefCOCO/+/g (joint)"]
    text = markdown(table)
    assert r"| 80.00\* |" in text
    assert r"- \* not the complete official split" in text
    assert "- † trained on another dataset or split of the same images" in text
    assert r"$80.00^{*}$" in latex(table)
    assert r"$60.00^{\dagger}$" in latex(table)


@pytest.mark.parametrize(
    ("source", "mark"),
    [("path: refcocog_umd", ""), ("path: refcocog_google", "†"), ("path: refer/refcocog, partition: google", "†")],
)
def test_the_partition_by_objects_is_marked(write: Write, source: str, mark: str) -> None:
    overrides = [f"data.train={{name: refcoco, {source}}}"]
    (row,) = paper_table([write("run", {"refcocog val": 0.6}, overrides=overrides)], with_published=False).ours
    assert row.values["refcocog", "val"].marks == mark


def test_other_data_is_extra_data(write: Write) -> None:
    data = (
        "data.train={name: mixture, datasets: [{name: refcoco, path: jxu124/refcoco}, {name: glyphs}, "
        "{name: coco, path: coco/instances_train2017.json, image_root: coco}]}"
    )
    runs = [
        write(
            "mixed",
            {"refcoco val": 0.8},
            overrides=[data, "model.weights=runs/collage", "train.max_steps=2000", "train.patience=3"],
        ),
        write("drawn", {"refcoco val": 0.1}, overrides=["data.train={name: glyphs}"]),
    ]
    mixed, drawn = paper_table(runs).ours
    assert mixed.training_data == "RefCOCO"
    assert mixed.extra_data == "glyphs, instances_train2017.json, that of runs/collage"
    assert mixed.epochs == "10, at most 2,000 steps, early stopping"
    assert (drawn.training_data, drawn.extra_data) == ("none of RefCOCO", "glyphs")
    assert (mixed.values["refcoco", "val"].marks, drawn.values["refcoco", "val"].marks) == ("†", "")


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (["mine_0", "mine_1"], "mine"),
        (["mine_10", "mine_11"], "mine"),
        (["mine_1", "mine_12"], "mine"),
        (["vit14", "vit14_1"], "vit14"),
        (["1", "2"], "1"),
        (["mine_1"], "mine_1"),
    ],
)
def test_the_name_of_a_row_has_no_part_of_a_number(names: list[str], common: str) -> None:
    assert _common_name(names) == common


def test_a_given_time_and_a_second_text_encoder_are_stated(write: Write) -> None:
    overrides = ["train.minutes=30", "model.extra_text={id: openai/clip-vit-base-patch16}"]
    (row,) = paper_table([write("timed", {"refcoco val": 0.5}, overrides=overrides)]).ours
    assert row.epochs == "30 minutes"
    assert row.text.endswith(" + clip-vit-base-patch16")


def test_a_checkpoint_that_vg_did_not_train(write: Write) -> None:
    config = yaml.safe_load(dump_config(ModelOnlyConfig(GroundingDinoConfig())))
    content = {"checkpoint": "swint_ogc.pth", "config": config, "trained_parameters": None}
    folder = write("zero", {"refcoco val": 0.5}, content=content)
    (row,) = paper_table([folder]).ours
    assert (row.vision, row.resolution, row.trained, row.training_data) == ("Swin of width 96", "800 to 1333", None, "")
    assert trained_parameters(ModelOnlyConfig(GroundingDinoConfig())) is None


def test_parameters_that_adapters_train_are_counted() -> None:
    pytest.importorskip("peft")
    sizes = "hidden_size: 384, num_hidden_layers: 2, num_attention_heads: 6, intermediate_size: 1536"
    encoders = [
        f"model.{encoder}={{id: null, frozen: FROZEN, architecture: {{model_type: {model_type}, {sizes}}}}}"
        for encoder, model_type in (("vision", "dinov3_vit"), ("text", "bert"))
    ]
    frozen, adapted = (
        load_config(CONFIGS / f"{name}.yaml", [text.replace("FROZEN", value) for text in encoders])
        for name, value in (("refcoco_dense", "true"), ("refcoco_dense_lora", "false"))
    )
    head = trained_parameters(frozen)
    # Rank 8, matrices of 384 x 384: query and value of two layers in each of two encoders.
    assert trained_parameters(adapted) == head + 2 * 2 * 2 * 8 * (384 + 384)  # type: ignore[operator]
    assert trained_parameters(replace(adapted, optim=replace(adapted.optim, freeze=["nothing"]))) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": []}, "are of the same run and seed"),
        ({"overrides": ["train.seed=1"], "part": {"num_expressions": 20}}, "but also in refcoco val; evaluate both on"),
        ({"overrides": ["train.seed=1"], "scores": {"refcoco+ val": 0.5}}, r"but also in splits, refcoco\+ val"),
        ({"overrides": ["train.seed=1"], "content": {"precision": "bf16"}}, "but also in precision"),
        (
            {"overrides": ["train.epochs=2"], "part": {"protocol": "any box"}},
            "has the protocol 'any box', .*one version",
        ),
        ({"overrides": ["train.epochs=2"], "part": {"partition": "google"}}, "is the split of google, .* that of unc"),
        ({"content": {"config": {}}}, r"benchmark\.json:\n  model: Field required"),
        ({"content": {"parts": [{"key": "grefcoco", "split": "val", "f1": 0.5}]}}, r"has no split with acc@0\.5"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, Any], message: str, write: Write) -> None:
    first = write("first", {"refcoco val": 0.8})
    second = write("second", changes.pop("scores", {"refcoco val": 0.8}), **changes)
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        main(["table", str(first), str(second)])


def test_missing_results_and_unknown_formats(write: Write, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no benchmark\.json: run `vg eval .*missing --suite refcoco` first"):
        main(["table", str(tmp_path / "missing")])
    folder = table_folder(write)
    with pytest.raises(SystemExit, match=r"the ending selects the format, \.tex, \.md, \.csv"):
        main(["table", str(folder), "--output", str(tmp_path / "paper.pdf")])
    file = folder / "benchmark.json"
    content = json.loads(file.read_text())
    del content["config"], content["trained_parameters"]
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"benchmark\.json lacks config, trained_parameters: .*evaluate again"):
        main(["table", str(file)])


def test_comma_separated_values_can_be_read_back(write: Write, tmp_path: Path) -> None:
    seeds = [write(f"a,b_{seed}", {"refcoco val": 0.5 + seed / 8}, overrides=[f"train.seed={seed}"]) for seed in (0, 1)]
    file = tmp_path / "results" / "paper.csv"
    main(["table", *map(str, seeds), "--output", str(file)])
    rows = list(csv.DictReader(file.open(newline="", encoding="utf-8")))
    (ours,) = (row for row in rows if not row["source"])
    assert (ours["method"], ours["seeds"], ours["trained_parameters"]) == ("a,b", "0 1", "25948420")
    assert float(ours["RefCOCO val"]) == 56.25
    assert float(ours["RefCOCO val deviation"]) == pytest.approx(100 * statistics.stdev([0.5, 0.625]), abs=1e-4)
    assert (ours["RefCOCO testA"], ours["RefCOCO val marks"]) == ("", "")
    published = {row["method"]: row for row in rows}
    assert float(published["MaPPER"]["RefCOCO testA"]) == 88.9
    assert published["SwimVG"]["trained_parameters"] == "9750000"
    assert [path.name for path in file.parent.iterdir()] == ["paper.csv"]


def hostile_table(write: Write) -> Any:
    name = r"a_b&c%d$e#f{g}~h^i\j<k>l|m*n`o"
    folder = write(name, {"refcoco val": 0.8, "refcoco+ val": 0.7, "refcocog val": 0.6})
    return paper_table([folder])


def test_special_characters_are_escaped(write: Write) -> None:
    table = hostile_table(write)
    escaped = r"a\_b\&c\%d\$e\#f\{g\}\textasciitilde{}h\textasciicircum{}i\textbackslash{}j\textless{}k\textgreater{}l"
    assert escaped in latex(table)
    (row,) = (line for line in markdown(table).splitlines() if line.startswith(r"| a\_b"))
    header = markdown(table).splitlines()[0]
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", header))
    assert next(csv.reader(comma_separated(table).splitlines()[-1:]))[0] == r"a_b&c%d$e#f{g}~h^i\j<k>l|m*n`o"


def test_rows_of_the_latex_table_have_equally_many_columns(write: Write) -> None:
    text = latex(hostile_table(write))
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    spans = [re.findall(r"\\multicolumn\{(\d)\}", row) for row in rows]
    counts = [
        len(re.findall(r"(?<!\\)&", row)) + 1 + sum(int(span) - 1 for span in spanned)
        for row, spanned in zip(rows, spans, strict=True)
    ]
    assert set(counts) == {9 + 8}
    assert body.count(r"\midrule") == 2


def has_latex() -> bool:
    """Whether LaTeX is installed, with the package that many installations lack."""
    return bool(shutil.which("pdflatex")) and subprocess.run(["kpsewhich", "booktabs.sty"]).returncode == 0


@pytest.mark.skipif(not has_latex(), reason="no LaTeX with booktabs")
def test_latex_compiles(write: Write, tmp_path: Path) -> None:
    (tmp_path / "table.tex").write_text(latex(hostile_table(write)), encoding="utf-8")
    document = r"\documentclass{article}\usepackage{booktabs, graphicx}\begin{document}\input{table}\end{document}"
    (tmp_path / "paper.tex").write_text(document)
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 1000
