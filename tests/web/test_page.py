"""The page without a browser: callbacks, messages, and requests that a browser would not send."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.inference.bright import Bright
from tests.inference.test_download import reply
from tests.inference.test_download import server as download_server
from tests.web.serving import BOXES, OneBox, Server, as_png, scene, serving
from tests.web.test_uploads import UNUSABLE, animation
from vg.cli import main, new_parser
from vg.errors import ConfigError, DataError
from vg.inference.grounder import Grounder
from vg.web.callbacks import Callbacks, reported
from vg.web.page import launch, new_page

gr = pytest.importorskip("gradio")


def upload(folder: Path) -> dict[str, str]:
    (folder / "scene.png").write_bytes(as_png(scene()))
    return {"path": str(folder / "scene.png"), "orig_name": "scene.png"}


def test_find_then_redraw_without_the_model(tmp_path: Path) -> None:
    model = Bright()
    call = Callbacks(Grounder(model, "cpu"), tmp_path)
    answer, corner, legend, drawn, crops, table, *_ = call.find(upload(tmp_path), "a box, <b>", 0.3, 0.7)
    assert corner is None
    assert "a box: <b>2</b>" in legend
    assert "&lt;b&gt;: <b>2</b>" in legend
    assert drawn.shape == (400, 800, 3)
    assert len(crops) == len(table) == 4
    assert table[0][2:] == pytest.approx(list(BOXES[0]), abs=1.5)
    legend, _, crops, table, *selection = call.redraw(answer, 0.9, 0.7)
    assert selection == [0.9, 0.7]
    assert len(crops) == len(table) == 2
    assert "no box reaches the threshold (the best box scores 1.00)" in call.redraw(answer, 1.1, 0.7)[0]
    assert model.num_images == 1


def test_one_expression_has_its_best_box(tmp_path: Path) -> None:
    call = Callbacks(Grounder(OneBox(), "cpu"), tmp_path)
    *_, table, _, _ = call.find(upload(tmp_path), "a box, another box", 0, 1)
    assert [row[0] for row in table] == ["a box", "another box"]


def test_corrections_are_drawn_and_downloaded(tmp_path: Path) -> None:
    call = Callbacks(Grounder(Bright(), "cpu"), tmp_path)
    answer, *_, table, _, _ = call.find(upload(tmp_path), "a box", 0.3, 0.7)
    answer, *_ = call.edit(answer, table[:1], 0.3, 0.7, 0.3, 0.7)
    answer, clicked, *_ = call.corner(answer, None, "", 0.3, 0.7, SimpleNamespace(index=[40, 40]))
    answer, _, legend, *_ = call.corner(answer, clicked, "new", 0.3, 0.7, SimpleNamespace(index=[80, 80]))
    assert "a box: <b>1</b>" in legend
    file = call.download("jsonl", answer, 0.3, 0.7)
    assert [box["phrase"] for box in json.loads(file["content"])["boxes"]] == ["new", "a box"]
    assert json.loads(file["content"])["boxes"][0]["box"] == [10, 10, 20, 20]
    same, clicked, *shown = call.corner(answer, (40, 40), "new", 0.3, 0.7, SimpleNamespace(index=[40, 80]))
    assert (same, clicked, len(shown)) == (answer, None, 6), "corners on one line: the next click is a first corner"
    _, _, legend, *_ = call.undo(answer, 0.3, 0.7)
    assert "a box: <b>2</b>" in legend
    with pytest.raises(DataError, match="no boxes yet"):
        call.download("coco", None, 0.3, 0.7)


def test_an_edit_before_the_table_of_a_moved_slider(tmp_path: Path) -> None:
    call = Callbacks(Grounder(Bright(), "cpu"), tmp_path)
    answer, *_, table, threshold, iou = call.find(upload(tmp_path), "a box", 0.9, 0.7)
    table[0][0] = "white box"
    legend = call.edit(answer, table, threshold, iou, 0.3, 0.7)[2]
    assert "a box: <b>1</b>" in legend, "the box that the table did not have was not deleted"
    assert "white box: <b>1</b>" in legend


def test_user_errors_become_messages_without_markup() -> None:
    def fail() -> None:
        raise DataError("<script>\x1b[0m")

    with pytest.raises(gr.Error) as error:
        reported(fail)()
    assert error.value.message == "&lt;script&gt;\\x1b[0m"
    assert not error.value.print_exception


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def found(server: Server) -> bool:
    message = server.find(server.upload("scene.png", as_png(scene())).json()[0], "a box")
    return message["success"] and "a box: <b>2</b>" in message["output"]["data"][2]


@pytest.mark.parametrize("name", UNUSABLE)
def test_hostile_files_get_a_message(name: str, server: Server) -> None:
    content, _ = UNUSABLE[name]
    response = server.upload(name, content)
    message = server.find(response.json()[0], "a box", name)
    assert not message["success"]
    assert name in message["output"]["error"]
    assert "Traceback" not in message["output"]["error"]
    assert found(server)


def test_animation_is_an_image(server: Server) -> None:
    assert server.find(server.upload("a.gif", animation()).json()[0], "a box", "a.gif")["success"]


@pytest.mark.parametrize(
    ("path", "phrases", "message"),
    [
        ("scene", "x" * 100_000, "100,000 characters"),
        ("scene", "dog\x1b[31m", "control character"),
        ("scene", "", "no phrase"),
        (None, "dog", "no image"),
        ("http://169.254.169.254/latest", "dog", "fetches no URLs"),
        ("/etc/passwd", "dog", ""),
    ],
)
def test_hostile_requests_get_a_message(path: str | None, phrases: str, message: str, server: Server) -> None:
    uploaded = server.upload("scene.png", as_png(scene())).json()[0] if path == "scene" else path
    answer = server.find(uploaded, phrases)
    assert not answer["success"]
    assert message in (answer["output"]["error"] or "")
    assert "root:" not in str(answer)
    assert found(server)


def test_an_edit_of_a_page_without_boxes_gets_a_message(server: Server) -> None:
    message = server.call("edit", [None, {"headers": [], "data": []}, 0.3, 0.7, 0.3, 0.7])
    assert "no boxes yet" in message["output"]["error"]


def test_private_urls_are_not_fetched(server: Server) -> None:
    message = server.call("fetch", ["http://127.0.0.1:1/image.png"])
    assert message["output"]["error"] == "http://127.0.0.1:1/image.png has no public address"


def test_a_url_is_loaded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VG_PRIVATE_URLS", "1")
    with download_server(lambda send, _: send(reply(as_png(scene())))) as url:
        message = server.call("fetch", [url])
    (image,) = message["output"]["data"]
    assert server.find(image["path"], "a box")["success"]


def test_upload_beyond_the_limit_is_refused(server: Server) -> None:
    assert server.upload("large.jpg", bytes(31_000_000)).status_code == 413
    assert found(server)


def test_twenty_requests_at_once_are_answered(server: Server) -> None:
    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(found, [server] * 20))


def test_a_taken_port_is_an_error(server: Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"port {port}; choose another one by --port"):
        launch(new_page(Grounder(Bright(), "cpu"), "second"), "127.0.0.1", port, share=False)


@pytest.mark.parametrize("host", ["203.0.113.7", "[2001:db8::7]", "no.such.host.invalid", "a..b"])
def test_an_address_of_another_machine_is_reported_before_the_model_is_loaded(host: str) -> None:
    with pytest.raises(SystemExit, match=r"cannot listen on .*; choose an address of this machine by --host"):
        main(["web", "nowhere", "--host", host])


def test_a_taken_port_is_reported_before_the_model_is_loaded(server: Server) -> None:
    port = server.url.rsplit(":", 1)[1]
    with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1, port {port} .* a free port by --port"):
        main(["web", "nowhere", "--port", port])


@pytest.mark.parametrize("port", ["99999", "0", "-1", "http"])
def test_impossible_ports(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        new_parser().parse_args(["web", "run", f"--port={port}"])
    assert f"{port} is not a port from 1 to 65535" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals need POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=str)
def test_signals_delete_the_uploads(number: int, tmp_path: Path) -> None:
    code = (
        "import time, vg.web.page as page\n"
        "from types import SimpleNamespace as New\n"
        "page.new_page = lambda *_: New(block_thread=lambda: time.sleep(60))\n"
        "page.launch = lambda *_: ('url', None)\n"
        "page.serve(None, 'title', '127.0.0.1', None, False)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    environment.pop("GRADIO_TEMP_DIR", None)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        assert process.stdout.readline().startswith(b"title: url")
        assert list(tmp_path.glob("vg_web_*"))
        process.send_signal(number)
        process.wait(30)
    assert not list(tmp_path.glob("vg_web_*"))


def test_a_server_that_stops_keeps_the_uploads_of_others(server: Server) -> None:
    path = server.upload("scene.png", as_png(scene())).json()[0]
    with serving() as other:
        other.upload("scene.png", as_png(scene()))
    assert server.find(path, "a box")["success"]


def test_nan_weights_are_reported() -> None:
    class Broken(Bright):
        def predict(self, output, batch):  # type: ignore[no-untyped-def]
            predictions = super().predict(output, batch)
            predictions[0].scores[0] = torch.nan
            return predictions

    with serving(Broken()) as server:
        message = server.find(server.upload("scene.png", as_png(scene())).json()[0], "a box")
        assert "NaN" in message["output"]["error"]


def test_the_page_names_no_other_host(server: Server) -> None:
    config = server.get("config").json()
    assert config["analytics_enabled"] is False
    assert "url(http" not in server.get("theme.css").text.replace('"', "")


def test_help_does_not_import_gradio() -> None:
    code = "import sys, vg.cli; vg.cli.new_parser(); sys.exit('gradio' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
