"""Uploads and links of strangers: each unusable one gets a message before it is decoded."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.inference.test_download import reply, server
from vg.errors import DataError
from vg.web import uploads
from vg.web.uploads import fetch, read_upload


def png_bomb(width: int, height: int) -> bytes:
    """A PNG that declares many pixels in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def encoded(format: str, **options: object) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(buffer, format, **options)
    return buffer.getvalue()


def animation() -> bytes:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "green")]
    frames[0].save(buffer := BytesIO(), "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


UNUSABLE = {
    "large.png": (png_bomb(8200, 6150), "8200 x 6150 pixels"),
    "bomb.png": (png_bomb(60_000, 60_000), "pixels|exceeds limit"),
    "cut.jpg": (encoded("JPEG")[:700], "cannot be read"),
    "drawing.jpg": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "cannot be read"),
    "page.jpg": (b"<html><script>alert(1)</script></html>", "cannot be read"),
    "empty.jpg": (b"", "cannot be read"),
    "zeros.png": (bytes(10_000), "cannot be read"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_files(name: str, tmp_path: Path) -> None:
    content, message = UNUSABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"image {name} .*({message})"):
        read_upload({"path": str(tmp_path / name), "orig_name": name}, tmp_path)


def test_animations_give_their_first_frame(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(animation())
    pixels, name = read_upload({"path": str(tmp_path / "a.gif"), "orig_name": "../../a.gif"}, tmp_path)
    assert (name, pixels[0, 0].tolist()) == ("a.gif", [255, 0, 0])


@pytest.mark.parametrize(
    "upload", [None, {}, {"path": None, "url": "data:image/png;base64,AAAA"}, "x", {"path": 3}, {"path": "a\0"}]
)
def test_no_upload(upload: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image"):
        read_upload(upload, tmp_path)


def test_other_files_of_the_server_are_not_read(tmp_path: Path) -> None:
    """Gradio checks paths only where they are marked as files, which a request may leave out."""
    uploads, private = tmp_path / "uploads", tmp_path / "private.png"
    uploads.mkdir()
    private.write_bytes(encoded("PNG"))
    (uploads / "link.png").symlink_to(private)
    for path in (private, uploads / ".." / "private.png", uploads / "link.png", tmp_path / "nowhere.png"):
        with pytest.raises(DataError, match="no image"):
            read_upload({"path": str(path)}, uploads)


def test_a_url_as_path_is_not_fetched(tmp_path: Path) -> None:
    with server(lambda send, _: send(reply(encoded("PNG")))) as url, pytest.raises(DataError, match="no image"):
        read_upload({"path": url}, tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "begins with http"),
        ("", "begins with http"),
        ("http://127.0.0.1/x.png", "no public address"),
        ("http://169.254.169.254/latest/meta-data", "no public address"),
        ("http://[::1]/x.png", "no public address|Address family|No address"),
    ],
)
def test_urls_that_are_not_fetched(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        fetch(url, tmp_path)


def test_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VG_PRIVATE_URLS", "1")
    with server(lambda send, _: send(reply(encoded("PNG")))) as url:
        file = fetch(f" {url} ", tmp_path / "new")
        assert file.suffix == ".png"
        assert file.read_bytes() == encoded("PNG")
    with server(lambda send, _: send(reply(b"<html>"))) as url, pytest.raises(DataError, match="cannot be read"):
        fetch(url, tmp_path)
    monkeypatch.setattr(uploads, "MAX_PIXELS", 1000)
    with server(lambda send, _: send(reply(encoded("PNG")))) as url, pytest.raises(DataError, match="64 x 64 pixels"):
        fetch(url, tmp_path)
