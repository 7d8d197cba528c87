"""Shards at URLs: the local cache, its bounds, and storage that hangs, fails, truncates and vanishes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from vg.data.shards import download as module
from vg.data.shards.index import INDEX
from vg.data.shards.source import Shards, ShardsConfig
from vg.data.shards.storage import CachedUrl, default_cache
from vg.data.shards.write import write_shards
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import BadSampleError, DataError

SHAPES = ShapesConfig(split="val", size=30, image_size=96)  # all shards have the same size


class Trouble(LocalFileSystem):
    """Local files under flaky://, with trouble at those whose name contains a key of `trouble`."""

    protocol = "flaky"
    trouble: ClassVar[dict[str, list[str]]] = {}  # what happens when a file is opened, the first entry first
    opened: ClassVar[list[str]] = []

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        name = Path(path).name
        self.opened.append(name)
        for key, events in self.trouble.items():
            if key in name and events:
                event = events.pop(0)
                if event == "hang":
                    threading.Event().wait(3)
                elif event == "fail":
                    raise ConnectionError("reset by peer")
                elif event == "forbid":
                    raise PermissionError("no access")
                elif event in ("truncate", "damage", "endless"):
                    return Damaged(super()._open(path, mode, **options), event)
        return super()._open(path, mode, **options)


class Damaged:
    def __init__(self, file: Any, event: str) -> None:
        self.file, self.event = file, event

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        if self.event == "endless":
            return content or b"x"
        return content[: len(content) // 2] if self.event == "truncate" else content.replace(b"a", b"b")

    def close(self) -> None:
        self.file.close()


fsspec.register_implementation("flaky", Trouble, clobber=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "BACKOFF", 0.01)
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    Trouble.trouble.clear()
    Trouble.opened.clear()
    yield
    Trouble.trouble.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "out"
    write_shards(SHAPES, folder, samples_per_shard=3)
    return folder


def opened(folder: Path, cache: Path, **settings: Any) -> Shards:
    return ShardsConfig(path=f"flaky://{folder}", cache=str(cache), **settings).build()


def shards_in(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.tar"))


def test_deleted_shards_take_no_space(folder: Path, tmp_path: Path) -> None:
    """A file that is open stays on the disk when it is deleted."""
    size = (folder / "000000.tar").stat().st_size
    shards = opened(folder, tmp_path, cache_gb=2.5 * size / 1e9)
    for index in range(len(shards)):
        shards.load(index, 0)
        assert sum(file.is_deleted() for file in shards._files.values()) == 0
    assert len(shards._files) == len(shards_in(tmp_path)) == 2


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_urls_equal_the_folder(protocol: str, folder: Path, tmp_path: Path) -> None:
    url = f"{protocol}://{folder}"
    if protocol == "memory":
        for file in folder.iterdir():
            with fsspec.open(f"{url}/{file.name}", "wb") as written:
                written.write(file.read_bytes())
    shards = ShardsConfig(path=url, cache=str(tmp_path)).build()
    local = ShardsConfig(path=str(folder)).build()
    assert not shards_in(tmp_path), "only the index is read at first"
    for index in range(len(local)):
        assert shards.image_bytes(index) == local.image_bytes(index)
        assert shards.load(index, 0).phrases == local.load(index, 0).phrases
    assert shards.fingerprint() == local.fingerprint()
    assert len(shards_in(tmp_path)) == 10


def test_a_file_is_downloaded_once(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        shards = opened(folder, tmp_path)
        for index in range(len(shards)):
            shards.load(index, 0)
    assert sorted(Trouble.opened) == sorted([INDEX, *(file.name for file in folder.iterdir())])


def test_a_truncated_file_in_the_cache_is_downloaded_again(folder: Path, tmp_path: Path) -> None:
    opened(folder, tmp_path).load(0, 0)
    shards_in(tmp_path)[0].write_bytes(b"x")
    opened(folder, tmp_path).load(0, 0)
    assert Trouble.opened.count("000000.tar") == 2


def test_a_damaged_file_in_the_cache_is_named(folder: Path, tmp_path: Path) -> None:
    shards = opened(folder, tmp_path)
    shards.load(0, 0)
    file = shards_in(tmp_path)[0]
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(BadSampleError, match=rf"000000\.tar \(its copy is {file}, delete it if .*\), sample 0"):
        shards.load(0, 0)
    (message,) = shards.damaged_files()
    assert f"(its copy is {file}, delete it if it is damaged): its SHA-256 is not that of index.json" in message


def test_a_changed_dataset_is_downloaded_again(folder: Path, tmp_path: Path) -> None:
    for size in (4, 5):
        write_shards(ShapesConfig(split="val", size=size, image_size=64), tmp_path / str(size))
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / str(size))
        assert len(opened(tmp_path / "link", tmp_path / "cache")) == size


def test_transient_trouble_is_retried(folder: Path, tmp_path: Path) -> None:
    Trouble.trouble.update(
        {"index": ["fail", "hang"], "samples": ["truncate"], "000001": ["fail", "truncate", "damage"]}
    )
    shards = opened(folder, tmp_path)
    shards.load(4, 0)
    assert [Trouble.opened.count(name) for name in (INDEX, "samples.npy", "000001.tar")] == [3, 2, 4]


def test_a_url_that_does_not_answer(folder: Path, tmp_path: Path) -> None:
    shards = opened(folder, tmp_path)
    Trouble.trouble["000002"] = ["hang"] * 5
    start = time.monotonic()
    with pytest.raises(
        DataError, match=rf"flaky://{folder}/000002.tar cannot be read after 5 attempts \(TimeoutError: less than 4 MiB"
    ):
        shards.load(7, 0)
    assert 1.5 <= time.monotonic() - start < 3
    assert not list(tmp_path.glob("*/*.partial"))
    shards.load(7, 0)


def test_waits_grow(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    Trouble.trouble["index"] = ["fail"] * 5
    with pytest.raises(
        DataError, match=r"index.json cannot be read after 5 attempts \(ConnectionError: reset by peer\)"
    ):
        opened(folder, tmp_path)
    assert waits == [0.01, 0.02, 0.04, 0.08]


def test_a_shard_that_vanishes(tmp_path: Path) -> None:
    write_shards(SHAPES, tmp_path / "out", samples_per_shard=3)
    shards = opened(tmp_path / "out", tmp_path / "cache")
    shards.load(0, 0)
    (tmp_path / "out" / "000001.tar").unlink()
    with pytest.raises(DataError, match=rf"flaky://{tmp_path}/out/000001.tar cannot be read \(FileNotFoundError"):
        shards.load(3, 0)
    assert Trouble.opened.count("000001.tar") == 1, "it does not appear again by waiting"
    assert [text.split(" cannot")[0] for text in shards.damaged_files()] == [f"flaky://{tmp_path}/out/000001.tar"]


def test_refused_access_and_unknown_protocols(folder: Path, tmp_path: Path) -> None:
    Trouble.trouble["index"] = ["forbid"]
    with pytest.raises(DataError, match=r"index.json cannot be read \(PermissionError: no access\)"):
        opened(folder, tmp_path)
    with pytest.raises(DataError, match=r"nosuch://x/index.json cannot be opened: Protocol not known: nosuch"):
        ShardsConfig(path="nosuch://x", cache=str(tmp_path)).build()


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ("truncate", r"after 5 attempts \(EOFError: \d+ of \d+ bytes\)"),
        ("endless", r"after 5 attempts \(EOFError: more than \d+ bytes\)"),
        ("damage", "is damaged: its SHA-256 is not that of index.json"),
    ],
)
def test_a_shard_that_is_always_damaged(event: str, message: str, folder: Path, tmp_path: Path) -> None:
    Trouble.trouble["000001"] = [event] * 9
    with pytest.raises(DataError, match=rf"flaky://{folder}/000001.tar .*{message}"):
        opened(folder, tmp_path).load(3, 0)
    assert not shards_in(tmp_path)


def test_the_least_recently_used_shards_are_deleted(folder: Path, tmp_path: Path) -> None:
    size = max(file.stat().st_size for file in folder.glob("*.tar"))
    shards = opened(folder, tmp_path, cache_gb=3.5 * size / 1e9)
    for number in (0, 1, 2):
        shards.load(3 * number, 0)
        time.sleep(0.01)
    opened(folder, tmp_path).load(0, 0)  # another process, for which it is recent
    shards.load(9, 0)
    assert [file.stem for file in shards_in(tmp_path)] == ["000000", "000002", "000003"]
    shards.load(3, 0)  # deleted, but open
    for index in range(30):
        shards.load(index, 0)
        assert sum(file.stat().st_size for file in shards_in(tmp_path)) <= 3.5 * size
    assert (tmp_path / shards.fingerprint()[:16] / "samples.npy").exists()


def test_a_cache_that_is_smaller_than_a_shard(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"000000.tar has .* MB, more than the cache .* set cache_gb to at le"):
        opened(folder, tmp_path, cache_gb=15e-6).load(0, 0)


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other shards are deleted first; if that is not enough, the message names the folder."""
    shards = opened(folder, tmp_path)
    shards.load(0, 0)
    original, failures = module.download, [1]

    def full(url: str, file: Any, size: int | None = None) -> None:
        if failures:
            failures.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(url, file, size)

    monkeypatch.setattr("vg.data.shards.storage.download", full)
    shards.load(3, 0)
    assert [file.stem for file in shards_in(tmp_path)] == ["000001"]
    failures.extend([1, 1])
    with pytest.raises(
        DataError, match=rf"the disk of the cache {tmp_path} is full \(.*\); free space, or set cache to"
    ):
        shards.load(6, 0)
    assert not list(tmp_path.glob("*/*.partial"))
    shards.load(6, 0)


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=rf"the cache {tmp_path / 'file'} cannot be used .*; set cache to a folder"):
        opened(folder, tmp_path / "file")


def test_abandoned_downloads_are_deleted(folder: Path, tmp_path: Path) -> None:
    shards = opened(folder, tmp_path)
    old, recent = (tmp_path / shards.fingerprint()[:16] / f"{name}.tar.partial" for name in ("old", "recent"))
    for file in (old, recent):
        file.write_bytes(b"x")
    os.utime(old, (0, 0))
    shards.load(0, 0)
    assert (old.exists(), recent.exists()) == (False, True)


def read_all(url: str, cache: str, gigabytes: float, queue: Any) -> None:
    try:
        shards = ShardsConfig(path=url, cache=cache, cache_gb=gigabytes).build()
        queue.put([len(shards.image_bytes(index)) for index in range(len(shards))])
    except Exception as error:
        queue.put(error)


@pytest.mark.parametrize("shards_in_cache", [2.5, 100])
def test_processes_share_a_cache(shards_in_cache: float, folder: Path, tmp_path: Path) -> None:
    size = max(file.stat().st_size for file in folder.glob("*.tar"))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (f"flaky://{folder}", str(tmp_path), shards_in_cache * size / 1e9, queue)
    processes = [context.Process(target=read_all, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    local = ShardsConfig(path=str(folder)).build()
    assert found == [[len(local.image_bytes(index)) for index in range(len(local))]] * 4


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "vg" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "vg" / "shards"
    assert CachedUrl("memory://x/", tmp_path, 1).url == "memory://x"
