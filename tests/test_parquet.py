"""Parquet files of the hub's make become shards: bytes untouched, labels and names of classes kept."""

import json
import subprocess
import sys

import pytest
from images import photos

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.data.index import open_index
from mapet_ds.data.parquet import Table, parquet_files
from mapet_ds.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
JPEGS = list(photos(8).values())
NAMES = ["cat", "dog", "owl"]


def write(path, rows, label="label", labels=None, names=NAMES):
    """Parquet as the library `datasets` writes it: {bytes, path}, a label, features in the schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": data, "path": None} for data in rows])
    columns = {
        "image": images,
        label: pa.array([i % 3 for i in range(len(rows))] if labels is None else labels),
    }
    features = {"image": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    table = pa.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, path, row_group_size=3)
    return path


def pack(*words):
    command = [sys.executable, "tools/make_shards.py", *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_shards_hold_the_bytes_the_labels_and_the_names_of_classes(tmp_path):
    write(tmp_path / "data/train-00000-of-00002.parquet", JPEGS[:5])
    write(
        tmp_path / "data/train-00001-of-00002.parquet",
        [*JPEGS[5:], b"no image", b""],
        labels=[2, 1, -1, 0, 0],
    )
    done = pack(tmp_path / "data", tmp_path / "shards", "--shard_images", 3)
    assert done.returncode == 0, done.stderr
    assert "images 8, classes 3, shards 3" in done.stdout
    assert "Passed over: 1 other files" in done.stderr and "1 empty rows" in done.stderr
    index = open_index(tmp_path / "shards", tmp_path / "index")
    assert [index.read(i) for i in range(len(index))] == JPEGS
    assert list(index.labels()) == [0, 1, 2, 0, 1, 2, 1, -1]
    assert index.classes == NAMES


def test_one_split_of_several_is_named(tmp_path):
    for name in ("train-0.parquet", "validation-0.parquet"):
        write(tmp_path / name, JPEGS[:1])
    with pytest.raises(DataError, match=r"several splits.*\*train\*\.parquet"):
        parquet_files(str(tmp_path))
    assert parquet_files(f"{tmp_path}/train-*.parquet") == [str(tmp_path / "train-0.parquet")]


def test_columns_are_found_or_asked_for(tmp_path):
    path = str(write(tmp_path / "0.parquet", JPEGS[:3], label="kind"))
    assert Table([path]).label is None
    assert [row.label for row in Table([path], label="kind")] == [0, 1, 2]
    with pytest.raises(DataError, match="no column photo; it has image, kind"):
        Table([path], image="photo")
    two = pa.table({"left": pa.array(JPEGS[:1]), "right": pa.array(JPEGS[:1])})
    pq.write_table(two, tmp_path / "two.parquet")
    with pytest.raises(DataError, match=r"may be left or right.*--image_column"):
        Table([str(tmp_path / "two.parquet")])
    (row,) = Table([str(tmp_path / "two.parquet")], image="right")
    assert row.data == JPEGS[0]


def test_damage_and_what_can_not_be_done_are_sentences(tmp_path):
    path = write(tmp_path / "data/0.parquet", JPEGS)
    shuffled = pack(path, tmp_path / "shards", "--shuffle_seed", 0)
    assert shuffled.returncode == 2 and "pack the shards with it" in shuffled.stderr
    path.write_bytes(path.read_bytes()[:-100])
    cut = pack(path, tmp_path / "shards")
    assert cut.returncode == 2 and "0.parquet can't be read as Parquet" in cut.stderr
    assert not (tmp_path / "shards").exists()
