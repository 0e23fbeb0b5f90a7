"""Files and folders are there whole or not at all, and devices, pipes and links stay what they are."""

import os
import socket
import subprocess
import sys
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


def test_what_a_killed_process_left_is_removed_and_a_living_ones_stays(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    here, alive = socket.gethostname(), f".figures.json.{socket.gethostname()}.{os.getppid()}.partial"
    (tmp_path / f".figures.json.{here}.{dead.pid}.partial").write_text("half")
    (tmp_path / alive).write_text("half")
    (tmp_path / ".figures.json.elsewhere.1.partial").write_text("half")
    (tmp_path / f".index.{here}.{dead.pid}.partial").mkdir()
    (tmp_path / f".index.{here}.{dead.pid}.partial/samples.raw").write_text("half")
    write_whole(tmp_path / "figures.json", "new")
    with whole_folder(tmp_path / "index") as folder:
        (folder / "samples").write_text("whole")
    left = [".figures.json.elsewhere.1.partial", alive, "figures.json", "index"]
    assert sorted(os.listdir(tmp_path)) == sorted(left)


WRITER = """
import sys
from pathlib import Path
from mapet_ds.files import whole_file, whole_folder
for turn in range(150):
    with whole_folder(Path(sys.argv[1], "index")) as folder:
        for name in "abc":
            (folder / name).write_text(sys.argv[2])
    with whole_file(Path(sys.argv[1], "codebook")) as beside:
        beside.write_text(sys.argv[2] * 9)
"""


def test_two_programs_that_write_one_name_at_once_both_end_well(tmp_path):
    """Each has the name for a moment; what stays is one's whole."""
    words = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*words, mark], stderr=subprocess.PIPE, text=True) for mark in "12"]
    assert [writer.communicate(timeout=100)[1] for writer in writers] == ["", ""]
    assert len({(tmp_path / "index" / name).read_text() for name in "abc"}) == 1
    assert (tmp_path / "codebook").read_text() in ("1" * 9, "2" * 9)
    assert sorted(os.listdir(tmp_path)) == ["codebook", "index"]


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
