"""Shards behind fsspec: the same samples, retries, and sentences."""

import pickle
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import fsspec
import images
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_listing import tar

from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.data import index as index_module
from mapet_ds.data.index import build_index, open_index
from mapet_ds.data.range_cache import RangeCache
from mapet_ds.data.samples import SampleSource
from mapet_ds.errors import DataError

URL = "memory://bucket/shards"


@pytest.fixture
def shards(tmp_path):
    """A folder of shards with its index, and the same in a store."""
    photos = images.photos(6)
    for number in range(2):
        members = [(f"{i}.jpg", data) for i, data in enumerate(photos.values()) if i % 2 == number]
        tar(tmp_path / f"shards/{number}.tar", [*members, (f"{4 + number}.cls", b"1")])
    build_index(tmp_path / "shards", tmp_path / "shards/index", ["cat", "dog"])
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "shards"), "/bucket/", recursive=True)
    yield tmp_path / "shards"
    store.rm("/bucket", recursive=True)


class Ranges(SimpleHTTPRequestHandler):
    """A web server that answers ranges, as stores do."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not asked or not path.is_file():
            super().do_GET()
            return
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
        data = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_a_web_server_gives_what_the_folder_gives(tmp_path, shards):
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/shards"
    here, there = open_index(str(shards), tmp_path / "none"), open_index(url, tmp_path / "cache")
    assert there.fingerprint == here.fingerprint
    assert [there.read(i) for i in range(6)] == [here.read(i) for i in range(6)]
    (shards / "1.tar").unlink()
    with pytest.raises(DataError, match=r"shards/1\.tar is not there: the index beside the shards"):
        open_index(url, tmp_path / "cache")
    server.shutdown()


def test_a_store_gives_what_the_folder_gives(tmp_path, shards):
    here, there = open_index(str(shards), tmp_path / "none"), open_index(URL, tmp_path / "cache")
    assert there.fingerprint == here.fingerprint and there.classes == ["cat", "dog"]
    assert [(there.read(i), there.label(i)) for i in range(6)] == [
        (here.read(i), here.label(i)) for i in range(6)
    ]
    assert there.path(0) == f"{URL}/0.tar/0.jpg" and there.empty_folders() == []
    again = pickle.loads(pickle.dumps(there))
    assert again.read(5) == here.read(5) and not again.has_changed(0)
    config = load_config(REPOSITORY / "mapet_ds/recipes/demo_cpu.yaml", ["train.micro_batch_size=4"])
    one, other = (SampleSource(config, index, 0, 1).sample(2, 3) for index in (here, there))
    assert one.data == other.data and one.crop == other.crop


def test_an_index_is_copied_once_and_anew_where_it_differs(tmp_path, shards):
    open_index(URL, tmp_path / "cache")
    inode = (tmp_path / "cache/index.json").stat().st_ino
    open_index(URL, tmp_path / "cache")
    assert (tmp_path / "cache/index.json").stat().st_ino == inode
    tar(shards / "1.tar", [("new.jpg", images.photos(1).popitem()[1])])
    shutil.rmtree(shards / "index")
    build_index(shards, shards / "index", ["cat", "dog"])
    fsspec.filesystem("memory").put(str(shards), "/bucket/", recursive=True)
    assert len(open_index(URL, tmp_path / "cache", compare=False)) == 6
    assert len(open_index(URL, tmp_path / "cache")) == 4


def test_a_store_that_fails_is_asked_again(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(index_module, "RETRY_PAUSES_S", (0, 0, 0))
    index, real = open_index(URL, tmp_path / "cache"), MemoryFileSystem.cat_file
    failures = iter([TimeoutError("slow"), ConnectionResetError("gone"), OSError("503")])

    def fail(self, *arguments, **options):
        if error := next(failures, None):
            raise error
        return real(self, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    assert index.read(0) == images.photos(1).popitem()[1]
    failures = iter([OSError("503")] * 4)
    with pytest.raises(DataError, match=r"0\.jpg can't be read, tried 4 times: OSError: 503"):
        index.read(0)


def test_what_was_read_is_kept_until_its_shard_changes(tmp_path, shards, monkeypatch, capsys):
    kept = RangeCache(str(tmp_path / "kept"), 1)
    index = open_index(URL, tmp_path / "cache", ranges=kept)
    expected = [index.read(i) for i in range(6)]
    asked, real = [], MemoryFileSystem.cat_file

    def count(self, path, *arguments, **options):
        asked.append(path)
        return real(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", count)
    assert [pickle.loads(pickle.dumps(index)).read(i) for i in range(6)] == expected and asked == []
    again = open_index(URL, tmp_path / "cache", ranges=RangeCache(str(tmp_path / "kept"), 1))
    asked.clear()
    assert [again.read(i) for i in range(6)] == expected and asked == []

    # The same length, other bytes.
    store, name = fsspec.filesystem("memory"), "/bucket/shards/1.tar"
    changed = bytearray(store.cat_file(name))
    changed[700] ^= 1
    store.pipe(name, bytes(changed))
    capsys.readouterr()
    new = open_index(URL, tmp_path / "cache", ranges=RangeCache(str(tmp_path / "kept"), 1))
    assert "1 of 2 shards have changed since the last start, e.g. 1.tar." in capsys.readouterr().err
    assert len(list((tmp_path / "kept").glob("*/*"))) == 1, "that of the changed shard is dropped at once"
    asked.clear()
    assert sum(new.read(i) != data for i, data in enumerate(expected)) == 1
    assert [path.rpartition("/")[2] for path in asked] == ["1.tar"] * 3


def test_a_server_without_ranges_is_named(tmp_path, shards, monkeypatch):
    index, real = open_index(URL, tmp_path / "cache"), MemoryFileSystem.cat_file
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, **_: real(self, path))
    with pytest.raises(DataError, match=r"0\.tar gives [\d,]+ bytes where [\d,]+ were asked for: its server"):
        index.read(0)


def test_sentences(tmp_path, shards, monkeypatch):
    for url, words in (
        ("memory://bucket/nothing", "has no index that can be read"),
        ("nonsense://bucket", "nonsense://bucket can't be read: Protocol not known"),
        (f"{URL}\n{shards}", "a remote folder must stand alone"),
    ):
        with pytest.raises(DataError, match=words):
            open_index(url, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", Mock(side_effect=ConnectionRefusedError("nobody")))
        with pytest.raises(
            DataError, match=r"shards can't be reached \(ConnectionRefusedError: nobody\)\. See"
        ):
            open_index(URL, tmp_path / "cache")
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/shards/0.tar", b"another")
    with pytest.raises(DataError, match=r"0\.tar is of 7 bytes, of [\d,]+ when it was listed"):
        open_index(URL, tmp_path / "cache")
    store.rm("/bucket/shards/0.tar")
    with pytest.raises(DataError, match=r"0\.tar is not there: the index beside"):
        open_index(URL, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
