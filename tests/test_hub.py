"""Hub ids that cannot be loaded: a quick message with the id, its setting and the ways out."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

LOADERS = {  # expression -> id and setting in the message
    "network_config(EncoderConfig(id='some/vision'))": ("some/vision", "model.vision.id"),
    "Encoder(TextEncoderConfig(id='some/text'), pretrained=True)": ("some/text", "model.text.id"),
    "load_tokenizer(TextEncoderConfig(id='some/text'))": ("some/text", "model.text.id"),
    "weights_key('model.vision', EncoderConfig(id='some/vision'))": ("some/vision", "model.vision.id"),
    "local_path('some/dino')": ("some/dino", "model.weights"),
    "SwinConfig(id='some/swin').build(pretrained=True)": ("some/swin", "model.backbone.id"),
    "open_table('some/refcoco', 'val')": ("some/refcoco", "path"),
}
PROGRAM = """
import time
import datasets
from vg.data.refcoco.tables import open_table
from vg.errors import UserError
from vg.models.encoders import Encoder, load_tokenizer, network_config, weights_key
from vg.models.saved import local_path
from vg.models.grounding_dino.config import SwinConfig
from vg.models.settings import EncoderConfig, TextEncoderConfig
start = time.time()
for loader in {loaders}:
    try:
        eval(loader)
    except UserError as error:
        print(loader, "|", error, end="\\n\\0")
print("seconds", time.time() - start)
"""


class Gated(BaseHTTPRequestHandler):
    """Answers as the Hub does for a gated model without a token."""

    def do_HEAD(self) -> None:
        is_file = "resolve" in self.path or "api" in self.path
        self.send_response(401 if is_file else 200)
        if is_file:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(params=["refused", "silent", "gated"])
def hub(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """How the Hub answers, and its address: connections are refused, are never answered, or everything is gated."""
    server: socket.socket | ThreadingHTTPServer
    if request.param == "gated":
        server = ThreadingHTTPServer(("127.0.0.1", 0), Gated)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = server.server_address
    else:
        server = socket.create_server(("127.0.0.1", 0))
        address = server.getsockname()
        if request.param == "refused":
            server.close()
    yield request.param, f"http://127.0.0.1:{address[1]}"
    if isinstance(server, ThreadingHTTPServer):
        server.shutdown()
    else:
        server.close()


def test_trouble_with_the_hub_is_explained_within_seconds(hub: tuple[str, str], tmp_path: Path) -> None:
    trouble, address = hub
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(loaders=list(LOADERS))],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    *messages, seconds = result.stdout.split("\0")
    assert float(seconds.split()[1]) < 10
    assert len(messages) == len(LOADERS), result.stdout
    for message, (name, setting) in zip(messages, LOADERS.values(), strict=True):
        assert name in message
        assert setting in message
        assert f"hf download {name}" in message
        assert ("hf auth login" if trouble == "gated" else "there is no network") in message
        assert len(message.splitlines()) <= 4, message
    assert len(result.stderr.splitlines()) <= 2, result.stderr


def test_a_path_or_an_id() -> None:
    from vg.errors import CheckpointError
    from vg.models.saved import local_path

    with pytest.raises(CheckpointError, match=r"(?s)some/dino .*is neither a local path.*hf download some/dino"):
        local_path("some/dino")
    with pytest.raises(CheckpointError, match=r"some/where/else .*does not exist"):
        local_path("some/where/else")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/dmeo", r"^runs/dmeo .*does not exist; did you mean runs/demo\?\nAs a Hub id, .*: there is no network"),
        ("runs/xyz", r"^runs/xyz .*does not exist; runs contains demo, other\n"),
        ("./runs/dmeo", r"^\./runs/dmeo does not exist; did you mean runs/demo\?$"),
        ("{folder}/runs/dmeo", r"^/.*/runs/dmeo does not exist; did you mean /.*/runs/demo\?$"),
        ("/nowhere/at/all", r"^/nowhere/at/all does not exist$"),
        ("~/xyz", r"^~/xyz .*does not exist"),
    ],
)
def test_similar_paths_are_named(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the folder of a path exists, an absent name in it is a typing error rather than a Hub id."""
    from huggingface_hub import constants

    from vg.errors import CheckpointError
    from vg.models.saved import local_path

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        local_path(path.format(folder=tmp_path))
    assert re.search(message, str(caught.value)), caught.value
    assert "hf download" not in str(caught.value)


@pytest.mark.parametrize("options", [(), ("--suite", "refcoco")])
def test_an_absent_run_is_reported_before_the_data(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from vg.cli import main

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"runs/dmeo .*does not exist; did you mean runs/demo\?"):
        main(["eval", "runs/dmeo", *options])
