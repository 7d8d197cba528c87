"""The page in a real browser, headless: upload, type, see the box, move the slider, correct, download."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.web.serving import BOXES, Server, as_png, scene, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium on PATH", allow_module_level=True)
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PHRASES = "#phrases textarea, #phrases input"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 1400})
    page = context.new_page()
    page.set_default_timeout(30_000)
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(server.url)
    page.wait_for_selector(PHRASES)
    yield page
    assert all(url.startswith((server.url, "blob:", "data:")) for url in requested), "a request to another host"
    context.close()


def upload(page: Any, name: str, content: bytes) -> None:
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    page.set_input_files("#image input[type=file]", [file])


def find(page: Any) -> None:
    upload(page, "scene.png", as_png(scene()))
    page.wait_for_selector("#image img")
    page.fill(PHRASES, "a box")
    page.keyboard.press("Enter")
    wait_for(page, "a box: 2")


def wait_for(page: Any, text: str) -> None:
    page.locator("#legend").filter(has_text=text).wait_for()


def cell(page: Any, row: int, column: int) -> Any:
    return page.get_by_test_id(f"cell-{row}-{column}")


def test_upload_type_filter_correct_download(page: Any) -> None:
    find(page)
    page.wait_for_selector("#drawn img")
    assert page.locator("#crops .gallery-item").count() == 2
    page.click("#correct button")
    sides = [float(cell(page, 0, column).inner_text()) for column in range(2, 6)]
    assert sides == pytest.approx(list(BOXES[0]), abs=1.5)

    page.locator("#threshold input[type=number]").fill("0.9")
    wait_for(page, "a box: 1")
    page.locator("#threshold input[type=number]").fill("0.3")
    wait_for(page, "a box: 2")

    cell(page, 1, 0).dblclick()
    page.locator("textarea:focus, input:focus").fill("gray box")
    page.keyboard.press("Enter")
    wait_for(page, "gray box: 1")
    sync_api.expect(cell(page, 0, 0)).to_contain_text("gray box")  # the best box now
    cell(page, 1, 0).click(button="right")
    page.get_by_role("menuitem", name="Delete row").click()
    wait_for(page, "a box: 0")
    shown = page.locator("#drawn img")
    shown.click(position={"x": 100, "y": 100})
    page.get_by_text("click on the opposite corner").wait_for()
    shown.click(position={"x": 200, "y": 200})
    wait_for(page, "a box: 1")
    with page.expect_download() as download:
        page.get_by_role("button", name="COCO").click()
    assert download.value.suggested_filename == "scene.coco.json"
    names = [category["name"] for category in json.loads(Path(download.value.path()).read_text())["categories"]]
    assert names == ["a box", "gray box"]


def test_slider_moves_by_keyboard(page: Any) -> None:
    find(page)
    page.locator("#threshold input[type=range]").focus()
    page.keyboard.press("End")
    wait_for(page, "a box: 1")  # the white one has score 1


def test_example(page: Any) -> None:
    page.locator("button.gallery-item").first.click()
    page.wait_for_selector("#drawn img")


@pytest.mark.parametrize("content", [b"<html><script>alert(1)</script></html>", b"\x89PNG\r\n\x1a\n" + os.urandom(99)])
def test_wrong_file_gets_a_message(page: Any, content: bytes) -> None:
    upload(page, "page.jpg", content)
    page.get_by_text("image page.jpg cannot be read").wait_for()
    find(page)


def test_no_image_gets_a_message(page: Any) -> None:
    page.fill(PHRASES, "a box")
    page.click("#find")
    page.get_by_text("no image; upload").wait_for()


def test_markup_is_text(page: Any) -> None:
    dialogs: list[Any] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog), dialog.dismiss()))
    find(page)
    markup = "<img src=x onerror=alert(1)>"
    page.fill(PHRASES, markup)
    page.keyboard.press("Enter")
    wait_for(page, f"{markup}: 2")
    page.click("#correct button")
    cell(page, 0, 0).wait_for()
    page.fill("#url textarea, #url input", f"https://{markup}/")
    page.keyboard.press("Enter")
    page.get_by_text("cannot download").wait_for()
    assert not dialogs


def test_phone(browser: Any, server: Server) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector(PHRASES)
    find(page)
    sync_api.expect(page.locator("#drawn")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
