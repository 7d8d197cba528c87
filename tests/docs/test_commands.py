"""Commands and settings shown in the documentation parse, and their configurations load."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.docs.pages import (
    BLOCKS,
    COMMANDS,
    DOCUMENTS,
    EXAMPLES,
    ROOT,
    SCRIPTS,
    VG_COMMANDS,
    Block,
    is_placeholder,
    location,
)
from vg.cli import VERBS, new_parser
from vg.config import RunConfig, load_config


def test_blocks_without_a_language_are_commands_or_output() -> None:
    """So that no command escapes these tests by a typing error in its name."""
    verbs = {words[0] for _, _, words in COMMANDS}
    assert {"vg", "python", "accelerate", "make"} <= verbs
    assert len(VG_COMMANDS) > 20
    assert len(SCRIPTS) > 6


@pytest.mark.parametrize("command", VG_COMMANDS, ids=location)
def test_vg_commands_parse_and_their_configurations_load(command: tuple[str, int, list[str]]) -> None:
    document, _, words = command
    if len(words) < 2 and words[0] in VERBS.keys() - {"demo", "ops"}:
        return  # the name of the verb alone
    if is_placeholder(words):
        assert words[0] in VERBS
        return
    options, rest = new_parser().parse_known_args(words)
    assert all("=" in word and not word.startswith("-") for word in rest), f"unrecognized arguments: {rest}"
    config = getattr(options, "config", None) or next((word for word in words if word.endswith(".yaml")), None)
    if config and not is_example(config):
        overrides = [*getattr(options, "overrides", []), *rest]
        if document == "CONTRIBUTING.md" and any("toy" in word or "center" in word for word in overrides):
            return  # belongs to the examples, which are run below
        assert isinstance(load_config(ROOT / config, overrides), RunConfig)


def is_example(path: str) -> bool:
    return any(block.file == path for block in BLOCKS)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "yaml" and block not in EXAMPLES], ids=location
)
def test_configurations_in_the_text_load(block: Block, tmp_path: Path) -> None:
    assert block.file, "its first line is a comment with the name of the file"
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    assert isinstance(load_config(tmp_path / block.file), RunConfig)


@pytest.mark.parametrize(
    "command",
    [command for command in COMMANDS if "scripts/train.py" in command[2]],
    ids=location,
)
def test_commands_of_the_training_script_load_their_configuration(command: tuple[str, int, list[str]]) -> None:
    words = command[2][command[2].index("scripts/train.py") + 1 :]
    if words and words[0] != "...":
        overrides = [word for word in words[1:] if not word.startswith("--")]
        assert isinstance(load_config(ROOT / words[0], overrides), RunConfig)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_exist_and_take_the_options_shown(script: str) -> None:
    source = (ROOT / script).read_text(encoding="utf-8")
    for module in re.findall(r"from (scripts\.\S+) import", source):  # which may declare common options
        source += (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    declared = set(re.findall(r"""add_argument\(\s*["'](--[\w-]+)["']""", source))
    for document, line, words in COMMANDS:
        if script in words and "train.py" not in script and "benchmark_refcoco" not in script:
            for word in words[words.index(script) + 1 :]:
                if word.startswith("--"):
                    assert word in declared, f"{document}:{line}: {script} has no option {word}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document, line, words in COMMANDS:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"{document}:{line}: make {words[1]}"


# Settings in running text and tables, such as `train.ema=0.999` or `data.drop_overlap=true`.
SETTING = re.compile(r"`('?(?:model|data|optim|train)\.[\w.]+=[^`]+)`")
SETTINGS = sorted(
    {
        (document, match[1])
        for document in DOCUMENTS
        for match in SETTING.finditer((ROOT / document).read_text(encoding="utf-8"))
    }
)
BASES = ["configs/rec/refcoco.yaml", "configs/grounding_dino/finetune_own.yaml", "configs/rec/refcoco_cached.yaml"]


@pytest.mark.parametrize(("document", "setting"), SETTINGS)
def test_settings_in_the_text_are_valid(document: str, setting: str) -> None:
    """Each is accepted by at least one recipe."""
    words = shlex.split(setting)
    errors = []
    for base in BASES:
        try:
            load_config(ROOT / base, words)
            return
        except Exception as error:
            errors.append(f"{base}: {error}")
    pytest.fail(f"{document}: {setting}\n" + "\n".join(errors))


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_listed(recipe: Path) -> None:
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    assert str(recipe.relative_to(ROOT)) in text
