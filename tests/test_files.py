"""Files and folders are there whole or not at all, and devices, pipes and links stay what they are."""

import os
import threading

import pytest

from mapet_ds.files import checksum, staged, whole_file, whole_folder, write_whole


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path):
    path = tmp_path / "figures.json"
    write_whole(path, "old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["figures.json"]
    write_whole(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["figures.json"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".figures.json.1.partial").write_text("half")
    (tmp_path / ".index.1.partial").mkdir()
    (tmp_path / ".index.1.partial/samples.raw").write_text("half")
    write_whole(tmp_path / "figures.json", "new")
    with whole_folder(tmp_path / "index") as folder:
        (folder / "samples").write_text("whole")
    assert sorted(os.listdir(tmp_path)) == ["figures.json", "index"]


def test_a_link_is_followed_and_a_pipe_stays_one(tmp_path):
    write_whole(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_whole(tmp_path / "pipe", "through")
    reader.join(30)
    assert received == ["through"] and (tmp_path / "pipe").is_fifo()


def test_a_folder_is_replaced_whole_or_must_be_empty(tmp_path):
    out = tmp_path / "out"
    for content in ("old", "new"):
        with whole_folder(out) as folder:
            (folder / "file").write_text(content)
    assert (out / "file").read_text() == "new"
    with pytest.raises(OSError, match="not empty"), whole_folder(out, replace=False) as folder:
        (folder / "file").write_text("another")
    assert (out / "file").read_text() == "new" and os.listdir(tmp_path) == ["out"]


def test_staged_files_replace_those_of_a_folder_and_others_stay(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="wrong"), staged(tmp_path) as folder:
        (folder / "model").write_text("half")
        raise ValueError("wrong")
    assert os.listdir(tmp_path) == ["notes"]
    with staged(tmp_path) as folder:
        (folder / "model").write_text("whole")
    assert sorted(os.listdir(tmp_path)) == ["model", "notes"]
    assert checksum(tmp_path / "notes") == "3fd30542fe3f61b14bd4a4b2dc0b6fb30fa6f63ebce52dd1778aaa8c4dc02cff"
