"""What the index takes in: kinds of files and members, names and labels, sources, damage, change."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import images
import numpy as np
import pytest

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.config.sources import sources
from mapet_ds.data.index import Index, open_index
from mapet_ds.data.labelled import check_classes
from mapet_ds.data.samples import check_bad
from mapet_ds.data.shards import parse_label
from mapet_ds.errors import ConfigError, DataError

JPEG, PNG = images.encode(images.picture(20, 16), "JPEG"), images.encode(images.picture(20, 16), "PNG")
AVIF = b"\0\0\0\x1cftypavif" + bytes(40)


def tar(path: Path, members, **options) -> Path:
    """Writes a tar of (name, bytes), or of whole headers with their bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as shard:
        for member, data in members:
            header = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            header.size = len(data)
            shard.addfile(header, io.BytesIO(data))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE):
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header, b""


def opened(tmp_path: Path, source: object) -> Index:
    return open_index(str(source), tmp_path / "cache")


def taken(index: Index) -> list[tuple[str, str | None]]:
    """Names, without the shard's, and classes."""
    names = (os.path.relpath(index.path(i), index.root) for i in range(len(index)))
    labels = (index.label(i) for i in range(len(index)))
    return [
        (name.partition(".tar/")[2] or name, index.classes[label] if label >= 0 else None)
        for name, label in zip(names, labels)
    ]


def unlabelled(*names: str) -> list[tuple[str, None]]:
    return [(name, None) for name in names]


# ---- folders

FOLDERS = {
    "endings": (
        {"a.jpg": JPEG, "b.jfif": JPEG, "c.jpe": JPEG, "d.jpg_large": JPEG, "e.heic": JPEG, "f.JPG": JPEG,
         "jpg": JPEG, "g.dat": PNG, "h.avif": AVIF, "k.jpg.part": JPEG, "l.jpg.tmp": JPEG, "m.jpg~": JPEG,
         "n.txt": JPEG, "o.nef": b"II*\0" + bytes(40), "p.zip": b"PK\3\4", "q.BMP2": b"BM is a text" * 9},
        unlabelled("a.jpg", "b.jfif", "c.jpe", "d.jpg_large", "e.heic", "f.JPG", "g.dat", "jpg"),
        {"AVIF, which is not decoded": 1, "partial downloads and backups": 3, ".txt": 1, ".nef": 1,
         "archives": 1, ".bmp2": 1},
    ),
    "hidden": (
        {"a/0.jpg": JPEG, "a/.ipynb_checkpoints/0.jpg": JPEG, ".Trash-1000/files/0.jpg": JPEG, ".x.jpg": JPEG,
         ".thumbnails/0.jpg": JPEG, "a/@eaDir/0.jpg": JPEG, "__MACOSX/a/._0.jpg": JPEG, "a/._0.jpg": b"\0\5",
         "a/.DS_Store": b"", "a/Thumbs.db": b"", "lost+found/1.jpg": JPEG},
        [("a/0.jpg", "a")],
        {"hidden files and folders": 3, "system folders": 4, "macOS's ._ files": 1, "system files": 2},
    ),
    "beside an image": (
        {"a.jpg": JPEG, "a.seg.png": PNG, "a.thumb.jpg": JPEG, "a.b.jpg": JPEG, "c.mask.png": PNG,
         "Mr. X.jpg": JPEG},
        unlabelled("Mr. X.jpg", "a.b.jpg", "a.jpg", "c.mask.png"),
        {"pictures beside an image (.seg.png)": 1, "pictures beside an image (.thumb.jpg)": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path, name, capsys):
    files, expected, passed_over = FOLDERS[name]
    index = opened(tmp_path, images.write(tmp_path / "data", files))
    assert taken(index) == expected
    assert {kind: count for kind, (count, *_) in index.passed_over.items()} == passed_over
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(f"{count} {kind}" in said for kind, count in passed_over.items())
    assert index.record()["passed_over"] == index.passed_over


def test_what_lies_beside_shards(tmp_path):
    data = tmp_path / "data"
    tar(data / "0.TAR", [("0.jpg", JPEG)])
    images.write(data, {"preview.png": PNG, "0_stats.json": b"{}", "0.parquet": b"", "1.tar.part": b"half"})
    index = opened(tmp_path, data)
    assert len(index) == 1 and len(index.passed_over) == 4
    (data / "2.tgz").write_bytes(gzip.compress(b"tar"))
    with pytest.raises(DataError, match=r"1 packed or compressed files, e\.g\. .*2\.tgz: only uncompressed"):
        opened(tmp_path, data)
    assert len(opened(tmp_path, f"{data}/*.TAR")) == 1, "the cure that it names"


def test_splits_in_one_folder_are_refused(tmp_path):
    for name in ("imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar", "imagenet1k-validation-00.tar"):
        tar(tmp_path / "data" / name, [("0.jpg", JPEG)])
    with pytest.raises(DataError, match=r"several splits.*'/.*/\*train\*\.tar'"):
        opened(tmp_path, tmp_path / "data")
    assert len(opened(tmp_path, tmp_path / "data/*train*.tar")) == 2
    for name in ("0.tar", "training_wheels.tar", "retrain.tar", "valve-1.tar"):
        tar(tmp_path / "others" / name, [("0.jpg", JPEG)])
    assert len(opened(tmp_path, tmp_path / "others")) == 4, "words, not parts of words"


# ---- members of shards


def cls(**labels: str) -> list[tuple[str, bytes]]:
    return [(f"{name}.cls", label.encode()) for name, label in labels.items()]


SHARDS = {
    "plain": (
        [("0.cls", b"7"), ("0.jpg", JPEG), ("1.png", PNG), ("1.cls", b"2"), ("2.jpg", JPEG),
         ("3.txt", b"words")],
        [("0.jpg", "7"), ("1.png", "2"), ("2.jpg", None)],
    ),
    "names with dots": (
        [(f"{name}{end}", data) for i, name in enumerate(("IMG_20.01.02", "IMG_20.03.04", "22.05", "22.06"))
         for end, data in ((".jpg", JPEG), (".cls", b"%d" % i))],
        [("IMG_20.01.02.jpg", "0"), ("IMG_20.03.04.jpg", "1"), ("22.05.jpg", "2"), ("22.06.jpg", "3")],
    ),
    "names with dots, one plain": (
        [("a.jpg", JPEG), ("a.cls", b"0"), ("a.b.jpg", JPEG), ("a.b.cls", b"1")],
        [("a.jpg", "0"), ("a.b.jpg", "1")],
    ),
    "names with dots, no labels": (
        [("x.1.jpg", JPEG), ("x.2.jpg", JPEG), ("y.jpg", JPEG), ("y.1.jpg", JPEG)],
        unlabelled("x.1.jpg", "x.2.jpg", "y.jpg", "y.1.jpg"),
    ),
    "views of one sample": (
        [("x.1.jpg", JPEG), ("x.2.jpg", JPEG), ("x.cls", b"4")], [("x.1.jpg", "4"), ("x.2.jpg", "4")],
    ),
    "masks": (
        [("0.jpg", JPEG), ("0.seg.png", PNG), ("0.json", b"{}"), ("0.cls", b"1"), ("1.image.jpg", JPEG),
         ("1.mask.png", PNG), ("1.cls", b"0")],
        [("0.jpg", "1"), ("1.image.jpg", "0")],
    ),
    "macOS": (
        [("./._0.jpg", b"\0\5"), ("./0.jpg", JPEG), ("./._0.cls", b"\0\5"), ("./0.cls", b"1"),
         ("./.DS_Store", b"")],
        [("0.jpg", "1")],
    ),
    "links": (
        [("a/soft.jpg", b""), ("a/0.jpg", JPEG), link("a/hard.jpg", "a/0.jpg", tarfile.LNKTYPE),
         ("a/0.cls", b"3"), link("a/hard.cls", "a/0.cls", tarfile.LNKTYPE), link("a/late.jpg", "../b/1.jpg"),
         ("b/1.jpg", PNG),
         link("a/twice.jpg", "late.jpg"), link("a/out.jpg", "/etc/passwd"), link("a/loop.jpg", "loop.jpg")],
        [("a/soft.jpg", None), ("a/0.jpg", "3"), ("a/hard.jpg", "3"), ("a/late.jpg", None), ("b/1.jpg", None),
         ("a/twice.jpg", None)],
    ),
    "by their bytes": (
        [("0.jpe", JPEG), ("photo", JPEG), ("1.jxl", b"\xff\x0a" + bytes(40)), ("2.tmp", JPEG)],
        unlabelled("0.jpe", "photo"),
    ),
    "label with a word": ([("0.jpg", JPEG), ("0.label.cls", b"3")], [("0.jpg", "3")]),
    "labels of any make": (
        [(f"{i}.jpg", JPEG) for i in range(6)]
        + [("0.cls", b" 3\n"), ("1.CLS", b"03"), ("2.cls", b"\xef\xbb\xbf3"), ("3.cls", b"n01440764"),
           ("4.cls", b"-1"), ("5.json", b'{"label": 3}')],
        [("0.jpg", "3"), ("1.jpg", "3"), ("2.jpg", "3"), ("3.jpg", "n01440764"), ("4.jpg", None),
         ("5.jpg", None)],
    ),
    "a folder with dots": ([("v1.2/a.jpg", JPEG), ("v1.2/b", PNG)], unlabelled("v1.2/a.jpg", "v1.2/b")),
}  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", SHARDS)
def test_members(tmp_path, name, form):
    members, expected = SHARDS[name]
    path = tar(tmp_path / "0.tar", members, format=form)
    index = opened(tmp_path, path)
    assert taken(index) == expected
    with tarfile.open(path) as archive:
        for i, (member, _) in enumerate(expected):
            if member not in ("a/late.jpg", "a/twice.jpg") and name != "macOS":
                assert index.read(i) == archive.extractfile(member).read()
    if name == "links":
        assert [index.read(3), index.read(5)] == [PNG, PNG]
        assert index.passed_over["links to what is not in their shard"][0] == 2
    if name == "labels of any make":
        assert index.noted["labels that can't be read"] == [1, "0.tar/4.cls: '-1'"]
        kind = "labels in other files than .cls, which are not read"
        assert index.noted[kind] == [1, "0.tar/5.json: '{\"label\": 3}'"]


AMBIGUOUS = {
    "some with labels of their own": [("x.1.jpg", JPEG), ("x.1.cls", b"0"), ("x.2.jpg", JPEG)],
    "one label, perhaps for all": [("x.jpg", JPEG), ("x.cls", b"0"), ("x.1.jpg", JPEG)],
    "two pictures of one name": [("x.jpg", JPEG), ("x.png", PNG), ("x.cls", b"0")],
    "two words": [("x.left.jpg", JPEG), ("x.right.jpg", JPEG), ("x.cls", b"0")],
    "another's label": [("x.1.jpg", JPEG), ("x.2.cls", b"0")],
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_names_that_can_be_read_in_two_ways_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"0\.tar: x\.\S+, .* share the key 'x'"):
        opened(tmp_path, tar(tmp_path / "0.tar", AMBIGUOUS[name]))


def test_a_label_given_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"0\.cls is there twice"):
        opened(tmp_path, tar(tmp_path / "0.tar", [("0.jpg", JPEG), ("0.cls", b"1"), ("0.cls", b"2")]))


@pytest.mark.parametrize(
    ("content", "label"),
    [("3", 3), (" 3\n", 3), ("03", 3), ("+3", 3), ("3.0", 3), ("٣", 3), ("\ufeff3", 3), ("3\0\0", 3),
     ('"3"', 3), ("[3]", 3), ('{"label": 3}', 3), ('{"class_name": "cat"}', "cat"),
     ("n01440764", "n01440764"), (" tench, Tinca\n", "tench, Tinca"),
     ("999999", 999999), ("1000000", None), ("9" * 30, None), ("-1", None), ("3.5", None), ("1e3", None),
     ("nan", None), ("²", None), ("0 1 0", None), ("[1, 0]", None), ("a\nb", None), ("", None), ("{", None),
     ("true", "true"), ('{"label": true}', None), ("[" * 5000, None)],
)  # fmt: skip
def test_labels(content, label):
    assert parse_label(content.encode()) == label


def test_a_label_in_another_coding_is_none():
    assert parse_label("ü".encode("latin-1")) is None


def test_names_of_classes_are_sorted(tmp_path):
    members = [(f"{i}.jpg", JPEG) for i in range(4)] + cls(**{"0": "b", "1": "a", "2": "b", "3": "é"})
    index = opened(tmp_path, tar(tmp_path / "0.tar", members))
    assert index.classes == ["a", "b", "é"] and index.labels().tolist() == [1, 0, 1, 2]


# ---- damage


def plain_tar(path: Path, number: int = 20) -> Path:
    return tar(path, [(f"{i:03d}.jpg", bytes([i]) * 700) for i in range(number)])  # 3 blocks each


def damage(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_damaged_tars_name_the_place(tmp_path):
    size = plain_tar(tmp_path / "0.tar").stat().st_size
    damage(tmp_path / "0.tar", 10 * 1536 + 150, b"x")
    with pytest.raises(DataError, match=r"0\.tar has a damaged header at byte 15,360"):
        opened(tmp_path, tmp_path / "0.tar")

    plain_tar(tmp_path / "0.tar")
    damage(tmp_path / "0.tar", 10 * 1536, bytes(512))
    with pytest.raises(DataError, match=r"0\.tar goes on behind its end: zeros at byte 15,360"):
        opened(tmp_path, tmp_path / "0.tar")

    two = plain_tar(tmp_path / "0.tar").read_bytes() * 2
    (tmp_path / "0.tar").write_bytes(two)
    with pytest.raises(DataError, match=r"0\.tar goes on behind its end.*two tars"):
        opened(tmp_path, tmp_path / "0.tar")

    for end, words in (
        (15_360 + 100, "cut off in the header at byte 15,360"),
        (15_360 + 600, "at byte"),
        (0, "empty"),
    ):
        plain_tar(tmp_path / "0.tar")
        os.truncate(tmp_path / "0.tar", end)
        with pytest.raises(DataError, match=rf"0\.tar.*{words}"):
            opened(tmp_path, tmp_path / "0.tar")

    plain_tar(tmp_path / "0.tar")
    os.truncate(tmp_path / "0.tar", 15_360)
    index = opened(tmp_path, tmp_path / "0.tar")
    assert len(index) == 10 and list(index.noted) == [
        "shards without an end mark, which may have been cut off"
    ]
    assert size > 15_360


def test_empty_and_sparse_shards(tmp_path):
    tar(tmp_path / "data/0.tar", [("0.jpg", JPEG)])
    tar(tmp_path / "data/1.tar", [])
    index = opened(tmp_path, tmp_path / "data")
    assert len(index) == 1 and index.noted == {"shards without an image": [1, "1.tar"]}
    sparse = tarfile.TarInfo("0.jpg")
    sparse.pax_headers = {"GNU.sparse.map": "0,3", "GNU.sparse.size": "900", "GNU.sparse.numblocks": "1"}
    tar(tmp_path / "data/2.tar", [(sparse, b"abc")], format=tarfile.PAX_FORMAT)
    with pytest.raises(DataError, match=r"2\.tar: the member 0\.jpg is stored sparse"):
        opened(tmp_path, tmp_path / "data")


def test_names_under_an_ascii_locale(tmp_path):
    """The same names, bytes and fingerprint, whatever the locale of the process."""
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        tar(tmp_path / f"dätä/{form}.tar", [("ü.jpg", JPEG), ("ü.cls", "é".encode())], format=form)
    here = opened(tmp_path, tmp_path / "dätä")
    script = (
        "import sys, os; from pathlib import Path; from mapet_ds.data.index import open_index;"
        "assert sys.getfilesystemencoding() == 'ascii';"
        "index = open_index(sys.argv[1], Path(sys.argv[2]));"
        "first = [index.read(i)[:3] for i in (0, 1)];"
        "print(index.fingerprint, index.label(1), first == [b'\\xff\\xd8\\xff'] * 2)"
    )
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": os.environ["PATH"]}
    for cache in ("cache", "anew"):
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "dätä", tmp_path / cache], cwd=REPOSITORY, env=plain,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [here.fingerprint, "0", "True"]


# ---- sources


@pytest.fixture
def shards(tmp_path):
    for i in range(4):
        tar(tmp_path / f"data/train-{i:04d}.tar", [(f"{i}.jpg", JPEG), (f"{i}.cls", b"%d" % i)])
    return tmp_path / "data"


def test_patterns_name_what_a_folder_would(tmp_path, shards):
    whole = opened(tmp_path, shards)
    for pattern in ("*.tar", "train-{0000..0003}.tar", "{train,}-000{0,1,2,3}.tar", "train-[0-3]*.tar"):
        if pattern.startswith("{"):
            pattern = "train-000{0,1,2,3}.tar"
        index = open_index(f"{shards}/{pattern}", tmp_path / "other")
        assert (index.fingerprint, taken(index)) == (whole.fingerprint, taken(whole)), pattern
    assert taken(opened(tmp_path, f"{shards}/train-0002.tar")) == [("2.jpg", "2")]


def test_lists_and_repetitions(tmp_path, shards):
    folders = images.write(tmp_path / "folders", {"cat/0.jpg": JPEG, "dog/1.jpg": PNG, "cat/2.jpg": PNG})
    both = f"{folders} x2\n{shards}/train-0001.tar"
    index = opened(tmp_path, both)
    cats = [("folders/cat/0.jpg", "cat"), ("folders/cat/2.jpg", "cat"), ("folders/dog/1.jpg", "dog")]
    assert taken(index) == [*cats, *cats, ("1.jpg", "1")]
    assert [index.read(i) for i in (0, 2, 6)] == [JPEG, PNG, JPEG]
    assert (
        index.classes == ["0", "1", "cat", "dog"]
        and "classes by name beside classes by number" in index.noted
    )
    assert open_index(index.named, tmp_path / "again").fingerprint == index.fingerprint
    assert index.empty_folders() == []

    (tmp_path / "one_percent.txt").write_text(
        "# a subset\nfolders/cat/2.jpg\n\n" + str(folders / "dog/1.jpg")
    )
    subset = opened(tmp_path, tmp_path / "one_percent.txt")
    assert taken(subset) == [("folders/cat/2.jpg", "cat"), ("folders/dog/1.jpg", "dog")]
    assert [subset.read(0), subset.read(1)] == [PNG, PNG]
    (tmp_path / "one_percent.txt").write_text("folders/cat/2.jpg\nfolders/cat/3.jpg\n")
    with pytest.raises(DataError, match=r"one_percent\.txt, line 2: .*3\.jpg is not there"):
        opened(tmp_path, tmp_path / "one_percent.txt")


def test_names_of_classes_come_from_the_index_beside_shards(tmp_path, shards):
    images.write(shards / "index", {"index.json": json.dumps({"classes": ["a", "b", "c", "d"]}).encode()})
    assert taken(opened(tmp_path, f"{shards}/*.tar")) == [(f"{i}.jpg", "abcd"[i]) for i in range(4)]


def test_the_knob_takes_text_and_lists(tmp_path, shards):
    recipe = REPOSITORY / "mapet_ds/recipes/mapet_vitb16.yaml"
    listed = load_config(recipe, [f"data.train=[{shards} x2, '{shards}/*.tar']"])
    assert [source.repeats for source in sources(listed.data.train)] == [2, 1, 1, 1, 1]
    for value, words in (
        (f"{shards}/train-{{0000..0004}}.tar", "train-0004.tar, of .*, is not there"),
        (f"{shards}/train-{{3..1}}.tar", r"train-\{3\.\.1\}\.tar: \{3\.\.1\} counts backwards"),
        (f"{shards}/{{0..9999999}}.jpg", "0.jpg, of .*, is not there"),
        (f"{shards}/*.jpg", r"\*\.jpg is not there"),
        (f"[{shards}, {shards}/no]", "data.train = .*no is not a folder"),
        ("3", "data.train = 3"),
    ):
        with pytest.raises(ConfigError, match=words):
            check(load_config(recipe, [f"data.train={value}", f"run_dir={tmp_path}/run"]), 1)
    with pytest.raises(ConfigError, match="lies inside data.train"):
        check(load_config(recipe, [f"data.train=[/etc, {shards}]", f"run_dir={shards}/run"]), 1)


# ---- change


def age(folder: Path) -> None:
    """Makes all that lies there old, as data is when a run starts."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (1e9, 1e9))


def test_an_index_is_kept_while_nothing_changes(tmp_path, capsys):
    data = images.write(tmp_path / "data", images.photos(6))
    age(data)
    first = opened(tmp_path, data)
    stamp = (tmp_path / "cache/index.json").stat().st_ino
    assert opened(tmp_path, data).fingerprint == first.fingerprint
    assert (tmp_path / "cache/index.json").stat().st_ino == stamp
    assert capsys.readouterr().err.count("\n") == 1, "said once, when it was listed"


@pytest.mark.parametrize("change", ["more", "fewer", "renamed", "smaller", "new_class"])
def test_a_changed_folder_is_listed_anew(tmp_path, change, capsys):
    data = images.write(tmp_path / "data", images.photos(6))
    age(data)
    first = opened(tmp_path, data)
    photo = data / "class_0/image_000.jpg"
    if change == "more":
        images.write(data, {"class_0/more.jpg": JPEG})
    elif change == "fewer":
        photo.unlink()
    elif change == "renamed":
        photo.rename(data / "class_0/other.jpg")
    elif change == "smaller":
        photo.write_bytes(JPEG)
    else:
        images.write(data, {"class_9/more.jpg": JPEG})
    assert open_index(str(data), tmp_path / "cache", compare=False).fingerprint == first.fingerprint
    index = opened(tmp_path, data)
    assert index.fingerprint != first.fingerprint
    count = {"more": 7, "fewer": 5, "new_class": 7}.get(change, 6)
    assert len(index) == count
    assert "has changed since it was listed" in (said := capsys.readouterr().err)
    assert f"6 images then, {count} now" in said


def test_changed_shards_are_listed_anew(tmp_path, shards):
    age(shards)
    first = opened(tmp_path, shards)
    tar(shards / "train-0001.tar", [("9.jpg", JPEG), ("1.cls", b"1")])
    os.utime(shards, (1e9, 1e9))
    assert opened(tmp_path, shards).fingerprint != first.fingerprint, "the same length, shuffled anew"
    tar(shards / "train-0004.tar", [("4.jpg", JPEG)])
    assert len(opened(tmp_path, shards)) == 5


def test_a_list_that_grew_is_read_anew(tmp_path):
    images.write(tmp_path / "data", {"0.jpg": JPEG, "1.jpg": JPEG})
    (tmp_path / "list.txt").write_text("data/0.jpg\n")
    assert len(opened(tmp_path, tmp_path / "list.txt")) == 1
    (tmp_path / "list.txt").write_text("data/0.jpg\ndata/1.jpg\n")
    assert len(opened(tmp_path, tmp_path / "list.txt")) == 2


def test_an_index_of_an_earlier_version_is_taken_as_it_is(tmp_path):
    data = images.write(tmp_path / "data", {"0.jpg": JPEG, "0.seg.png": PNG})
    opened(tmp_path, data)
    description = json.loads((tmp_path / "cache/index.json").read_text())
    for key in ("sources", "passed_over", "noted"):
        del description[key]
    (tmp_path / "cache/index.json").write_text(json.dumps(description | {"fingerprint": "old"}))
    (tmp_path / "cache/state.json").unlink()
    images.write(data, {"1.jpg": JPEG})
    assert opened(tmp_path, data).fingerprint == "old"


def test_an_index_beside_its_shards_is_compared(tmp_path, shards):
    from mapet_ds.data.index import build_index

    build_index(shards, shards / "index")
    assert len(opened(tmp_path, shards)) == 4 and not (tmp_path / "cache").exists()
    moved = shards.rename(tmp_path / "moved")
    age(moved)
    assert len(opened(tmp_path, moved)) == 4, "a copy has other times"
    tar(moved / "train-0004.tar", [("4.jpg", JPEG)])
    with pytest.raises(DataError, match="it lists 4 shards, 5 are there"):
        opened(tmp_path, moved)
    (moved / "train-0004.tar").unlink()
    tar(moved / "train-0003.tar", [(f"{i}.jpg", JPEG) for i in range(9)])
    with pytest.raises(DataError, match=r"train-0003\.tar is of another length"):
        opened(tmp_path, moved)


def test_images_that_changed_are_called_so(tmp_path):
    data = images.write(tmp_path / "data", images.photos(6))
    index = opened(tmp_path, data)
    for path in data.rglob("*.jpg"):
        path.write_bytes(JPEG)
    config = load_config(REPOSITORY / "mapet_ds/recipes/mapet_vitb16.yaml")
    with pytest.raises(DataError) as refused:
        check_bad(config, index, range(3))
    said = str(refused.value)
    assert "3 of these have changed since they were listed" in said and "check_images" not in said
    for path in data.rglob("*.jpg"):
        path.unlink()
    assert index.has_changed(0)


def test_labels_from_one_are_said_to_be_so(tmp_path):
    members = [(f"{i}.jpg", JPEG) for i in range(1, 4)] + cls(**{"1": "1", "2": "2", "3": "3"})
    index = opened(tmp_path, tar(tmp_path / "0.tar", members))
    with pytest.raises(DataError, match="class 0 has no image, and labels go up to 3: .* counted from 1"):
        check_classes(index, index)
    odd = open_index(
        str(tar(tmp_path / "1.tar", [*members, ("4.jpg", JPEG), ("4.cls", b"-1")])), tmp_path / "odd"
    )
    with pytest.raises(DataError, match=r"1 of 4 images have no label.*can't be read.*4\.cls: '-1'"):
        check_classes(odd, odd)


def test_folders_of_the_system_are_no_classes(tmp_path):
    files = {"a/0.jpg": JPEG, "b/0.jpg": JPEG, "__MACOSX/a/._0.jpg": b"", "@eaDir/0.jpg": JPEG}
    index = opened(tmp_path, images.write(tmp_path / "data", files))
    assert index.classes == ["a", "b"] and index.empty_folders() == []
    (tmp_path / "data/c").mkdir()
    assert index.empty_folders() == ["c"]
    assert np.array_equal(index.labels(), [0, 1])


def test_shards_are_packed_from_any_source(tmp_path, shards):
    """By name or by bytes, from folders and shards at once; each has a key and a class of its own."""
    sys.path.insert(0, str(REPOSITORY / "tools"))
    import make_shards

    folders = images.write(tmp_path / "folders", {"cat/photo": JPEG, "cat/1.2.jfif": PNG, "dog/x.jpg": JPEG})
    both = f"{shards}/train-000{{0,1}}.tar\n{folders} x2"
    make_shards.make_shards(make_shards.parse([both, str(tmp_path / "out")]))
    packed, listed = opened(tmp_path, tmp_path / "out"), open_index(both, tmp_path / "listed")
    assert len(packed) == 8 and packed.classes == listed.classes == ["0", "1", "cat", "dog"]
    for i in range(8):
        assert (packed.read(i), packed.label(i)) == (listed.read(i), listed.label(i))
    anew = open_index(f"{tmp_path}/out/*.tar", tmp_path / "anew")
    assert taken(anew) == taken(packed) and anew.passed_over == {}
    with pytest.raises(DataError, match="lies inside"):
        make_shards.make_shards(make_shards.parse([both, str(folders / "out")]))


def test_what_a_wildcard_finds_and_what_vanishes(tmp_path):
    files = {
        "a/0.jpg": JPEG,
        "b/0.jpg": JPEG,
        "lost+found/0.jpg": JPEG,
        "notes.json": b"no",
        ".x/0.jpg": JPEG,
    }
    data = images.write(tmp_path / "data", files)
    index = opened(tmp_path, f"{data}/*")
    assert len(index) == 2 and index.empty_folders() == []
    assert index.passed_over == {
        "system folders": [1, f"{data}/lost+found"], ".json": [1, f"{data}/notes.json"]
    }  # fmt: skip
    (data / "b").rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"data/b is gone or no longer mounted"):
        index.read(1)


def test_parquet_alone_is_refused_with_a_way_out(tmp_path):
    data = images.write(tmp_path / "data", {"data/train-00000-of-00002.parquet": b"PAR1", "README.md": b""})
    with pytest.raises(DataError, match=r"no image, but 1 Parquet files.*make_shards"):
        opened(tmp_path, data)
