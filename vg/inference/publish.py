"""Writes a model as a checkpoint with a model card, and uploads it to the Hugging Face Hub."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vg.checkpoint import VALIDATION, write_model
from vg.config import RunConfig, SavedConfig
from vg.errors import CheckpointError
from vg.files import replacing
from vg.metrics.result import UNDEFINED
from vg.models.base import GroundingModel
from vg.models.saved import CLASSES, ENCODERS

CARD = "README.md"
NUM_PHRASES = 3  # in the examples of the card
_USAGE = """## Usage

```python
import vg

grounder = vg.Grounder.from_pretrained("{name}")
result = grounder("image.jpg", {phrases})
```

```
vg predict {name} image.jpg -p {words}
```
"""


def save_model(
    folder: Path, model: GroundingModel, config: SavedConfig, results: Mapping[str, Any] | None, name: str
) -> None:
    """Write a checkpoint atomically: weights, configuration, tokenizer, the results of its evaluation, and a card.

    Args:
        results: of the evaluation, as in the validation.json of a run; None if there was none.
        name: path or Hub id in the card.

    Raises:
        CheckpointError: the folder contains something else, which would be lost, such as a run.
    """
    with replacing(folder) as partial:
        write_model(partial, model, config)
        if results is not None:
            (partial / VALIDATION).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (partial / CARD).write_text(model_card(model, config, results, name), encoding="utf-8")
        existing = {file.name for file in folder.iterdir()} if folder.exists() else set()
        if foreign := existing.difference([file.name for file in partial.iterdir()], [VALIDATION, ENCODERS, CLASSES]):
            raise CheckpointError(
                f"{folder} contains {', '.join(sorted(foreign)[:3])}, which saving a model there would remove; choose "
                "another folder"
            )


def push_model(
    repo_id: str,
    model: GroundingModel,
    config: SavedConfig,
    results: Mapping[str, Any] | None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Create the repository if it does not exist, and upload what `save_model` writes; return the URL of the commit.

    Raises:
        CheckpointError: no network, no such account, or no permission.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        save_model(folder, model, config, results, repo_id)
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a model of vg"))
        except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
            raise CheckpointError(
                f"the upload to {repo_id} failed: {error}; log in with `hf auth login` with a token that may write, or "
                "write the files to a folder with save_pretrained"
            ) from error


def model_card(model: GroundingModel, config: SavedConfig, results: Mapping[str, Any] | None, name: str) -> str:
    """Return the model card: data, split, protocol and metrics of the evaluation, training, and usage."""
    many = bool(model.text_spec.delimiters)
    phrases = list(model.classes[:NUM_PHRASES]) or (["cat", "remote control"] if many else ["the man in the red shirt"])
    total, trainable = model.num_parameters(), model.num_parameters(trainable_only=True)
    lines = [
        "---",
        "library_name: vg",
        f"pipeline_tag: {'zero-shot-object-detection' if many else 'image-text-to-text'}",
        f"tags: [visual-grounding, {config.model.name}]",
        "---",
        "",
        f"# {Path(name).name}",
        "",
        f"A {config.model.name} model of vg (visual-grounding): "
        + ("boxes of any number of phrases" if many else f"the box{'es' * model.generalized} of a referring expression")
        + f". {total:,} parameters, {trainable:,} of them trainable.",
        "",
        *_evaluation(results),
        *_training(config),
        *([f"Classes, which are the default phrases: {', '.join(model.classes)}.", ""] if model.classes else []),
        _USAGE.format(
            name=name,
            phrases=json.dumps(phrases, ensure_ascii=False),
            words=shlex.join(phrases),
        ),
    ]
    return "\n".join(lines)


def _evaluation(results: Mapping[str, Any] | None) -> list[str]:
    if results is None:
        return ["Not evaluated.", ""]
    about = {key: results[key] for key in ("data", "split", "protocol") if key in results}
    values = {key: value for key, value in results.items() if isinstance(value, (int, float)) and key != "step"}
    return [
        "## Evaluation",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        "",
        "| metric | value |",
        "| --- | ---: |",
        *(f"| {key} | {_cell(value)} |" for key, value in values.items()),
        "",
    ]


def _cell(value: float) -> str:
    if value == UNDEFINED:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _training(config: SavedConfig) -> list[str]:
    if not isinstance(config, RunConfig):
        return ["Converted from another library; its training is not known.", ""]
    return ["## Training", "", "`vg train config.yaml`, with the configuration that is in this repository.", ""]
