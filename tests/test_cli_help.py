"""What `vg VERB --help` prints, and which arguments a verb takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vg.cli import VERBS, main, new_parser
from vg.config import RunConfig, load_config
from vg.models.grounding_dino.config import BertConfig

ROOT = Path(__file__).parents[1]


def help_of(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_a_description_and_an_example(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(verb, capsys, monkeypatch)
    description = text.split("\n\n")[1]
    assert re.fullmatch(r"[A-Z][^A-Z].*\.", description), description
    assert text.endswith(f"\n\nexample:\n  {f'vg {verb} {VERBS[verb].example}'.rstrip()}\n")
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_can_be_parsed_and_its_configuration_loads(verb: str) -> None:
    options, rest = new_parser().parse_known_args([verb, *shlex.split(VERBS[verb].example)])
    assert not rest
    config = getattr(options, "config", None)
    assert config is None or isinstance(load_config(ROOT / config, options.overrides), RunConfig)


def test_epilogs_are_wrapped_and_examples_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of("label", capsys, monkeypatch, columns=60)
    *_, epilog, example = text.strip().split("\n\n")
    assert max(map(len, epilog.splitlines())) <= 60
    assert example == 'example:\n  vg label runs/detector photos labels -p dog "red car"'


@pytest.mark.parametrize(
    ("verb", "about"),
    [
        ("train", "optim.lr=1e-4"),
        ("eval", "data.eval.split=test"),
        ("predict", "model.vision.id=/new/folder"),
        ("web", "model.vision.id=/new/folder"),
        ("check", "of the dataset, such as image_root=photos"),
    ],
)
def test_overrides_are_in_the_usage_with_an_example_of_the_verb(
    verb: str, about: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(verb, capsys, monkeypatch, columns=200)
    assert "[KEY=VALUE ...]" in text.split("\n\n")[0]
    assert about in text


def test_the_default_tokenizer_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"(default: {BertConfig().id})" in help_of("convert", capsys, monkeypatch, columns=200)


@pytest.mark.parametrize(
    ("verb", "default"),
    [
        ("predict", "the fastest available"),
        ("web", "the fastest available"),
        ("label", "the fastest available; under torchrun, one GPU each"),
    ],
)
def test_the_default_device_is_that_of_the_verb(
    verb: str, default: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"cpu, cuda or mps (default: {default})\n" in help_of(verb, capsys, monkeypatch, columns=200)


def test_only_the_configuration_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train"])
    assert capsys.readouterr().err.endswith("the following arguments are required: CONFIG\n")


@pytest.mark.parametrize(
    ("arguments", "override"),
    [
        (["eval", "runs/demo"], "optim.lr=1"),
        (["web", "runs/demo"], "data.eval.split=val"),
        (["predict", "runs/demo", "image.png", "dog", "--json"], "train.seed=2"),
        (["label", "runs/demo", "photos", "labels", "-p", "dog", "--threshold", "0.5"], "data.batch_size=2"),
        (["export", "runs/demo", "demo.onnx"], "train.seed=2"),
        (["interpolate", "a", "b", "--output", "c"], "optim.lr=1"),
    ],
)
def test_overrides_without_effect_are_refused(arguments: list[str], override: str) -> None:
    with pytest.raises(SystemExit, match=rf"error: {re.escape(override)} has no effect on vg {arguments[0]}"):
        main([*arguments, override])
