"""The store of remote ranges: bounded, shared, whole or not at all."""

import errno
import multiprocessing
import os
import resource
import shutil
from pathlib import Path

import pytest

from mapet_ds.data.range_cache import LEFT_BEHIND_S, RangeCache, _room
from mapet_ds.errors import DataError

DATA = [bytes([i]) * (3000 + 1000 * i) for i in range(8)]


@pytest.fixture
def cache(tmp_path):
    made = RangeCache(str(tmp_path / "cache"), 1)
    made.prepare({})
    return made


def counted(cache: RangeCache) -> float:
    with cache._counted() as count:
        return count["bytes"]


def files(cache: RangeCache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file() and path.name != "count.json")


def room(cache: RangeCache) -> int:
    return sum(_room(path.stat().st_size - 4) for path in files(cache))


def test_what_was_put_is_there_after_a_restart_and_nothing_else(cache):
    for i, data in enumerate(DATA):
        cache.put("s3://a/0.tar", "1", 512 * i, data)
        cache.put("s3://a/0.tar", "1", 512 * i, data)
    again = RangeCache(str(cache.folder), 1)
    assert [again.get("s3://a/0.tar", "1", 512 * i, len(data)) for i, data in enumerate(DATA)] == DATA
    for words in (("s3://a/1.tar", "1", 0), ("s3://a/0.tar", "2", 0), ("s3://a/0.tar", "1", 1)):
        assert again.get(*words, len(DATA[0])) is None
    assert counted(cache) == sum(_room(len(data)) for data in DATA) == room(cache)


def test_another_version_takes_the_place_of_the_one_before(cache):
    for i, data in enumerate(DATA):
        cache.put("0.tar", "1", i, data)
    cache.put("1.tar", "1", 0, DATA[1])
    cache.prepare({"0.tar": "2", "1.tar": "1", "2.tar": "1"})
    cache.put("0.tar", "2", 0, DATA[3])
    assert cache.get("0.tar", "1", 0, len(DATA[0])) is None
    assert cache.get("0.tar", "2", 0, len(DATA[3])) == DATA[3]
    assert cache.get("1.tar", "1", 0, len(DATA[1])) == DATA[1]
    assert counted(cache) == _room(len(DATA[1])) + _room(len(DATA[3])) and len(files(cache)) == 2


def test_a_full_store_makes_room_for_what_has_changed(tmp_path):
    full = 8 * _room(len(DATA[0])) / 1e9
    before = RangeCache(str(tmp_path), full)
    for i in range(8):
        before.put(f"{i % 2}.tar", "1", i, DATA[0])
    cache = RangeCache(str(tmp_path), full)
    cache.prepare({"0.tar": "2", "1.tar": "1"})
    cache.put("1.tar", "1", 8, DATA[0])
    cache.put("0.tar", "2", 0, DATA[0])
    assert cache.get("1.tar", "1", 8, len(DATA[0])) == cache.get("0.tar", "2", 0, len(DATA[0])) == DATA[0]
    assert counted(cache) == room(cache) == 6 * _room(len(DATA[0]))


def test_a_version_whose_removal_was_killed_is_neither_counted_nor_left(cache, monkeypatch):
    for i in range(3):
        cache.put("0.tar", "1", i, DATA[i])

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.prepare({"0.tar": "2"})
    assert len(files(cache)) == 3 and counted(cache) == 0
    (cache.folder / "count.json").write_bytes(b"")
    assert counted(cache) == 0
    cache.prepare({"0.tar": "2"})
    assert files(cache) == [] and counted(cache) == 0


def test_it_takes_no_more_than_it_may(tmp_path, capsys):
    cache = RangeCache(str(tmp_path), 20_000 / 1e9)
    for i, data in enumerate(DATA):
        cache.put("0.tar", "1", i, data)
    assert room(cache) == counted(cache) <= 20_000
    assert cache.get("0.tar", "1", 0, len(DATA[0])) == DATA[0], "what is there stays"
    RangeCache(str(tmp_path), 20_000 / 1e9).put("0.tar", "1", 99, DATA[-1])
    assert capsys.readouterr().err.count("holds the 2e-05 GB that data.cache_gb gives it. The run goes") == 1


@pytest.mark.parametrize("harm", [lambda kept: kept[:-1], lambda kept: b"", lambda kept: b"x" + kept[1:]])
def test_what_a_loss_of_power_left_is_not_read(cache, harm):
    cache.put("0.tar", "1", 0, DATA[5])
    (path,) = files(cache)
    path.write_bytes(harm(path.read_bytes()))
    assert cache.get("0.tar", "1", 0, len(DATA[5])) is None and files(cache) == []
    cache.put("0.tar", "1", 0, DATA[5])
    assert cache.get("0.tar", "1", 0, len(DATA[5])) == DATA[5]
    (cache.folder / "count.json").write_bytes(b"")
    assert counted(cache) == room(cache), "a lost count is made anew"


def test_what_a_killed_process_left_is_neither_read_nor_in_the_way_for_long(cache):
    cache.put("0.tar", "1", 7, DATA[0])
    (path,) = files(cache)
    left = path.rename(path.with_suffix(".partial"))
    assert cache.get("0.tar", "1", 7, len(DATA[0])) is None
    cache.put("0.tar", "1", 7, DATA[0])
    assert files(cache) == [left], "another process may be writing it"
    os.utime(left, (0, left.stat().st_mtime - LEFT_BEHIND_S))
    for _ in range(2):
        cache.put("0.tar", "1", 7, DATA[0])
    assert cache.get("0.tar", "1", 7, len(DATA[0])) == DATA[0]
    assert counted(cache) == _room(len(DATA[0]))


def test_a_full_disk_costs_a_sentence(cache, monkeypatch, capsys):
    cache.put("0.tar", "1", 0, DATA[0])
    before, real = counted(cache), Path.open

    def full(self, mode="r", *more):
        if mode == "xb":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, mode, *more)

    monkeypatch.setattr(Path, "open", full)
    for each in (cache, RangeCache(str(cache.folder), 1)):
        each.put("0.tar", "1", 1, DATA[1])
        assert each.get("0.tar", "1", 0, len(DATA[0])) == DATA[0]
    assert capsys.readouterr().err == (
        f"data.cache_dir = {cache.folder} can't be written: No space left on device. The run goes on, and "
        "reads other images from afar.\n"
    )
    assert counted(cache) == before


@pytest.mark.parametrize("data", [DATA[0], 50 * DATA[0]], ids=["on closing", "on writing"])
def test_a_write_that_fails_late_leaves_nothing(cache, capsys, data):
    """A limit on the length of a file fails as a full disk does: what fits a buffer fails as it is closed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        cache.put("0.tar", "1", 0, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "can't be written: File too large" in capsys.readouterr().err
    assert files(cache) == [] and counted(cache) == 0


def test_a_folder_that_can_not_be_is_a_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir = .*file/cache can't be written: Not a directory"):
        RangeCache(str(tmp_path / "file/cache"), 1).prepare({})


def write_all(folder: str, first: int) -> None:
    cache = RangeCache(folder, 200_000 / 1e9)
    for k in range(60):
        i = (first + k) % 60
        cache.put(f"{i % 3}.tar", "1", i, DATA[i % 8])
        assert cache.get(f"{i % 3}.tar", "1", i, len(DATA[i % 8])) in (DATA[i % 8], None)


def test_processes_that_write_at_once_keep_whole_files_and_one_count(cache):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_all, args=(str(cache.folder), 7 * n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert counted(cache) == room(cache) <= 200_000
    assert len(files(cache)) > 15 and not any(path.suffix for path in files(cache))
    for path in files(cache):
        i = int(path.name)
        assert cache.get(f"{i % 3}.tar", "1", i, len(DATA[i % 8])) == DATA[i % 8]
