"""The index: order, labels, bytes, hostile and failing input; and what counts as an image."""

import contextlib
import errno
import io
import os
import pickle
import resource
import shutil
import tarfile
import time
import tracemalloc
from pathlib import Path

import images
import numpy as np
import pytest
from PIL import Image

from mapet_ds.data import index as index_module
from mapet_ds.data.formats import BadImage, exif_orientation, inspect
from mapet_ds.data.index import Index, build_index, open_index
from mapet_ds.data.index_files import SAMPLE, write_index
from mapet_ds.data.listing import Member
from mapet_ds.errors import DataError


def listing(index: Index) -> list[tuple[str, int]]:
    return [(os.path.relpath(index.path(i), index.root), index.label(i)) for i in range(len(index))]


def tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w", **options: object) -> Path:
    with tarfile.open(path, mode, **options) as shard:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            shard.addfile(header, io.BytesIO(data))
    return path


FILES = {
    "b/deep/er/2.PNG": b"two", "b/1.jpeg": b"one", "a/ü.webp": b"u", "b/notes.txt": b"no", "root.bmp": b"r",
    "a.jpg": b"a",
    "c/x.gif": b"g", "empty_class/readme.md": b"",
}  # fmt: skip
LISTED = [
    ("a/ü.webp", 0),
    ("a.jpg", -1),
    ("b/1.jpeg", 1),
    ("b/deep/er/2.PNG", 1),
    ("c/x.gif", 2),
    ("root.bmp", -1),
]


def test_folder_order_labels_and_bytes(tmp_path):
    index = open_index(str(images.write(tmp_path / "data", FILES)), tmp_path / "cache")
    assert listing(index) == LISTED
    assert index.classes == ["a", "b", "c"]
    assert [index.read(i) for i in range(len(index))] == [FILES[path] for path, _ in LISTED]


def test_order_and_fingerprint_ignore_creation_time_listing_and_place(tmp_path, monkeypatch):
    first = open_index(str(images.write(tmp_path / "one", FILES)), tmp_path / "cache1")
    images.write(tmp_path / "elsewhere" / "two", dict(reversed(FILES.items())))
    real = os.scandir

    def backwards(folder):
        return contextlib.nullcontext(sorted(real(folder), key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(os, "scandir", backwards)
    second = open_index(str(tmp_path / "elsewhere" / "two"), tmp_path / "cache2")
    assert listing(second) == listing(first)
    assert second.fingerprint == first.fingerprint
    monkeypatch.undo()
    (tmp_path / "one" / "a.jpg").write_bytes(b"longer")
    assert open_index(str(tmp_path / "one"), tmp_path / "cache3").fingerprint != first.fingerprint


def test_cache_is_kept_for_its_folder_only(tmp_path):
    data = images.write(tmp_path / "data", FILES)
    other = images.write(tmp_path / "other", {"x.jpg": b"x"})
    assert len(open_index(str(data), tmp_path / "cache")) == 6
    images.write(data, {"new.jpg": b"new"})
    assert len(open_index(str(other), tmp_path / "cache")) == 1
    assert len(open_index(str(data), tmp_path / "cache")) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data", "other"]


def test_a_failed_build_leaves_the_old_index(tmp_path, monkeypatch):
    data = images.write(tmp_path / "data", FILES)
    open_index(str(data), tmp_path / "cache")
    monkeypatch.setattr(
        np, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        build_index(data, tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data"]
    monkeypatch.undo()
    assert listing(Index(tmp_path / "cache", data)) == LISTED


def test_sentences(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    mixed = images.write(tmp_path / "mixed", {"a.jpg": b"a"})
    tar(mixed / "b.tar", [("a.jpg", b"a")])
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    tar(zipped / "a.tar", [("a.jpg", b"a")], "w:gz")
    broken = images.write(tmp_path / "broken", {"a.tar": b"not a tar" * 100})
    for source, words in (
        (tmp_path / "nowhere", "not a folder"), (empty, "holds no image"), (mixed, "side by side"),
        (zipped, "uncompressed tar"), (broken, "uncompressed tar"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words) as caught:
            open_index(str(source), tmp_path / "cache")
        assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_unreadable_folder_is_a_sentence(tmp_path, monkeypatch):
    data = images.write(tmp_path / "data", FILES)
    real = os.scandir

    def refuse(folder):
        if isinstance(folder, bytes) and folder.endswith(b"deep"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="deep can't be listed: Permission denied"):
        open_index(str(data), tmp_path / "cache")


def test_damaged_cache_is_a_sentence(tmp_path):
    data = images.write(tmp_path / "data", FILES)
    open_index(str(data), tmp_path / "cache")
    (tmp_path / "cache" / "samples.npy").write_bytes(b"")
    with pytest.raises(DataError, match="Delete it"):
        open_index(str(data), tmp_path / "cache")


def test_odd_files_are_listed_and_bad_alone(tmp_path):
    data = images.write(
        tmp_path / "data", {"c/good.jpg": b"good", "c/short.jpg": b"long enough", "c/gone.jpg": b"x"}
    )
    os.symlink("nowhere", data / "c" / "broken.jpg")
    os.symlink("loop.jpg", data / "c" / "loop.jpg")
    os.symlink("..", data / "c" / "up")  # a folder that contains itself
    os.symlink("good.jpg", data / "c" / "link.jpg")
    os.mkfifo(data / "c" / "pipe.jpg")
    os.makedirs(data / "c" / "folder.jpg")
    index = open_index(str(data), tmp_path / "cache")
    (data / "c" / "short.jpg").write_bytes(b"short")
    (data / "c" / "gone.jpg").unlink()
    reasons = {}
    for i in range(len(index)):
        try:
            inspect(index.read(i))
        except BadImage as reason:
            reasons[Path(index.path(i)).name] = str(reason)
    names = [Path(index.path(i)).name for i in range(len(index))]
    assert sorted(names) == sorted(
        f"{n}.jpg" for n in ("broken", "gone", "good", "link", "loop", "pipe", "short")
    )
    assert "5 bytes where the index recorded 11" in reasons["short.jpg"]
    assert "No such file" in reasons["gone.jpg"] and "No such file" in reasons["broken.jpg"]
    assert "symbolic links" in reasons["loop.jpg"] and "pipe.jpg" in reasons


def test_shards_give_members_labels_and_bytes(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    long = "folder/" + "n" * 150 + ".jpg"
    for number, options in enumerate(({"format": tarfile.GNU_FORMAT}, {"format": tarfile.PAX_FORMAT})):
        tar(
            data / f"{number}.tar",
            [("00.cls", b"7"), ("00.jpg", b"zero"), ("01.png", b"one"), ("01.cls", b" 2\n"),
             ("02.jpg", b"two"), (long, b"long"), ("02.cls", b"seven"), ("02.json", b"{}"),
             ("../../etc/evil.jpg", b"up"), ("/abs.jpg", b"abs"), ("ü.jpg", b"umlaut")],
            **options,
        )  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    index = open_index(str(data), tmp_path / "cache")
    assert [index.read(i) for i in range(7)] == [b"zero", b"one", b"two", b"long", b"up", b"abs", b"umlaut"]
    assert [index.read(i) for i in range(7, 14)] == [index.read(i) for i in range(7)]
    assert [index.label(i) for i in range(7)] == [7, 2, 8, -1, -1, -1, -1]
    assert index.path(3) == f"{data}/0.tar/{long}" and index.path(13) == f"{data}/1.tar/ü.jpg"
    assert len(index.classes) == 9 and index.classes[-1] == "seven"
    assert [path for path in sorted(tmp_path.rglob("*")) if "cache" not in path.parts] == before


def test_links_and_other_members_of_a_shard_are_no_samples(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / "a.tar", "w") as shard:
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("dev.jpg", tarfile.CHRTYPE),
        ):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            shard.addfile(header)
        header = tarfile.TarInfo("real.jpg")
        header.size = 4
        shard.addfile(header, io.BytesIO(b"real"))
    index = open_index(str(data), tmp_path / "cache")
    assert [Path(index.path(i)).name for i in range(len(index))] == ["real.jpg"]


def test_a_shard_cut_after_indexing_is_bad_samples_only(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    tar(data / "a.tar", [(f"{i}.jpg", bytes([i]) * 5000) for i in range(4)])
    index = open_index(str(data), tmp_path / "cache")
    os.truncate(data / "a.tar", 512 + 5000 + 600)
    assert index.read(0) == bytes(5000)
    for i in (1, 2, 3):
        with pytest.raises(BadImage, match="where the index recorded 5000"):
            index.read(i)


def test_many_shards_need_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "OPEN_SHARDS", 3)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(10):
        tar(data / f"{i}.tar", [("x.jpg", b"%d" % i)])
    index = open_index(str(data), tmp_path / "cache")
    before = len(os.listdir("/proc/self/fd"))
    assert [index.read(i) for i in [*range(10), *range(10)]] == [b"%d" % i for i in range(10)] * 2
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    index.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_storage_errors_are_retried_then_stop(tmp_path, monkeypatch):
    index = open_index(str(images.write(tmp_path / "data", FILES)), tmp_path / "cache")
    monkeypatch.setattr(index_module, "RETRY_PAUSES_S", (0, 0, 0))
    failures = iter([errno.EIO, errno.ESTALE, errno.EIO])
    real = os.pread

    def fail(*arguments):
        if code := next(failures, None):
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, "pread", fail)
    assert index.read(1) == b"a"
    failures = iter([errno.EIO] * 4)
    with pytest.raises(DataError, match=r"a\.jpg can't be read, tried 4 times: Input/output error"):
        index.read(1)


@pytest.mark.parametrize("code", [errno.EACCES, errno.ELOOP])
def test_a_forbidden_file_is_a_bad_image(tmp_path, monkeypatch, code):
    index = open_index(str(images.write(tmp_path / "data", FILES)), tmp_path / "cache")
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(BadImage, match=os.strerror(code)):
        index.read(0)


def test_a_vanished_data_set_stops_the_run(tmp_path):
    data = images.write(tmp_path / "data", FILES)
    index = open_index(str(data), tmp_path / "cache")
    shutil.move(data, tmp_path / "gone")
    with pytest.raises(DataError, match="gone or no longer mounted"):
        index.read(0)


def test_index_travels_to_workers(tmp_path):
    index = open_index(str(images.write(tmp_path / "data", FILES)), tmp_path / "cache")
    index.read(0)
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000
    assert listing(pickle.loads(pickled)) == LISTED


def test_an_index_is_written_without_being_held_in_memory(tmp_path):
    count = 40_000
    members = (Member(b"%d.jpg" % i, i % 7, 512 * i, i, i % 5 - 1) for i in range(count))
    tracemalloc.start()
    write_index(tmp_path / "cache", str(tmp_path), members, [b"%d.tar" % i for i in range(7)], [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 160_000, "bytes: a column of 32-bit numbers would be as many"
    index = Index(tmp_path / "cache", tmp_path)
    assert len(index) == count and index.classes == ["0", "1", "2", "3"]
    assert [(index.path(i), index.label(i)) for i in (0, count - 1)] == [
        (f"{tmp_path}/{i}.jpg", i % 5 - 1) for i in (0, count - 1)
    ]


def test_twenty_million_entries_open_at_once(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    tar(data / "a.tar", [("a.jpg", b"a")])
    os.utime(data, (0, 0))
    build_index(data, tmp_path / "cache")
    count, cache = 20_000_000, tmp_path / "cache"
    for name, kind in (("samples.npy", SAMPLE), ("path_ends.npy", np.dtype("<u8"))):
        np.lib.format.open_memmap(cache / name, "w+", kind, (count,)).flush()
    os.truncate(cache / "paths.bin", 40 * count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    index = open_index(str(data), cache)
    assert len(index) == count and index.label(count - 1) == 0
    assert time.perf_counter() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024, "KiB"


@pytest.mark.parametrize("name", images.good_images())
def test_inspect_gives_the_size(name):
    data = images.good_images()[name]
    assert inspect(data) == Image.open(io.BytesIO(data)).size


def test_orientation_is_that_of_the_exif_data_wherever_they_stand():
    """A valid number only; XMP and what is damaged say nothing, as to DALI."""
    colour = images.picture()
    for orientation, sideways in ((1, False), (3, False), (6, True), (8, True), (9, False), (0, False)):
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            data = images.encode(colour, kind, exif=images.rotated(orientation))
            assert exif_orientation(data) == (orientation if 1 <= orientation <= 8 else 1), kind
            assert inspect(data) == (160, 120)
            assert inspect(data, upright=True) == ((120, 160) if sideways else (160, 120))

    # After a PNG's pixels.
    png = images.encode(colour, "PNG", exif=images.rotated())
    start = png.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4])
    assert exif_orientation(png[:start] + png[end:-12] + png[start:end] + png[-12:]) == 6

    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert exif_orientation(images.encode(colour, "JPEG", xmp=xmp)) == 1
    assert exif_orientation(images.exif_thumbnail(images.encode(colour, "JPEG"))) == 1
    assert exif_orientation(images.encode(colour, "JPEG", exif=b"Exif\0\0II*\0\x88\x13\0\0")) == 1


@pytest.mark.parametrize("name", images.bad_by_structure())
def test_inspect_refuses(name):
    with pytest.raises(BadImage) as caught:
        inspect(images.bad_by_structure()[name])
    assert str(caught.value)


def test_inspect_survives_anything():
    generator = np.random.default_rng(0)
    refused = 0
    for data in images.good_images().values():
        for _ in range(60):
            damaged = bytearray(
                data[: generator.integers(0, len(data) + 1)] if generator.random() < 0.4 else data
            )
            for _ in range(generator.integers(0, 6)):
                if damaged:
                    damaged[generator.integers(0, min(len(damaged), 200))] = generator.integers(0, 256)
            try:
                assert all(side > 0 for side in inspect(bytes(damaged), upright=True))
            except BadImage:
                refused += 1
    assert refused > 500
