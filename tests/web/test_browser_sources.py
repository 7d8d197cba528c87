"""Images from the camera and the clipboard of a real browser."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from tests.web.serving import as_png, scene, serving
from tests.web.test_browser import CHROMIUM, OPTIONS, PHRASES, sync_api, wait_for

CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
COPY = """async (content) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const item = new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})});
    await navigator.clipboard.write([item]);
}"""


@pytest.fixture
def page() -> Iterator[Any]:
    with serving() as server, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS + CAMERA)
        context = browser.new_context(permissions=["camera", "clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.goto(server.url)
        page.wait_for_selector(PHRASES)
        yield page
        browser.close()


def test_camera(page: Any) -> None:
    page.locator("#image").get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.locator("#image").get_by_label("capture photo").click()
    page.wait_for_selector("#image img")
    page.fill(PHRASES, "a box")
    page.keyboard.press("Enter")
    wait_for(page, "a box: ")


def test_clipboard(page: Any) -> None:
    page.evaluate(COPY, base64.b64encode(as_png(scene())).decode())
    page.locator("#image").get_by_label("Paste from clipboard").click()
    page.wait_for_selector("#image img")
    page.fill(PHRASES, "a box")
    page.keyboard.press("Enter")
    wait_for(page, "a box: 2")
