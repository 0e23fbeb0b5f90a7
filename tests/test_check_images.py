"""The survey of a data set: what it counts, which images are the same, its lines and its page."""

import re
import runpy
import sys

import images
import pytest
from PIL import Image

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.data.index import open_index
from mapet_ds.data.survey import Survey, survey
from mapet_ds.results.report.dataset import render, sentences

JPEG, PNG = images.encode(images.picture(200, 90), "JPEG"), images.encode(images.picture(70, 100), "PNG")
FILES = {
    "a/0.jpg": JPEG, "a/1.png": PNG, "b/2.jpg": JPEG, "b/3.jpg": JPEG[:200], "b/4.bmp": PNG,
    "b/5.tif": b"<html>", "a/0.mask.png": PNG, "a/.x": b"",
    "a/6.webp": images.encode(images.picture(20, 30), "WEBP"),
}  # fmt: skip


def surveyed(tmp_path, name: str, files: dict[str, bytes], decode: bool = False) -> Survey:
    index = open_index(str(images.write(tmp_path / name, files)), tmp_path / f"index_{name}")
    *steps, result = survey(index, decode, jobs=1)
    assert isinstance(result, Survey)
    assert sum(done for done, _ in steps) == len(index)
    assert [place for _, bad in steps for place, _ in bad] == list(result.bad)
    return result


def test_a_survey_counts_what_is_there(tmp_path):
    seen = surveyed(tmp_path, "train", FILES)
    names = [seen.index.path(i).rpartition("/")[2] for i in range(len(seen.index))]
    assert names == ["0.jpg", "1.png", "6.webp", "2.jpg", "3.jpg", "4.bmp", "5.tif"]
    places = {name: indices.tolist() for name, indices in seen.formats().items()}
    assert places == {"JPEG": [0, 3], "PNG": [1, 5], "WebP": [2]}, "by their bytes"
    assert seen.looks["width"].tolist() == [200, 70, 20, 200, 0, 70, 0]
    assert seen.looks["height"].tolist() == [90, 100, 30, 90, 0, 100, 0]
    assert sorted(seen.bad) == [4, 6] and "cut off" in seen.bad[4] and "neither JPEG" in seen.bad[6]
    assert seen.duplicates() == [(3, 0), (5, 1)]
    assert seen.by_class().tolist() == [3, 4]


def test_images_in_both_sets_are_found(tmp_path):
    train = surveyed(tmp_path, "train", FILES)
    val = surveyed(tmp_path, "val", {"a/9.png": PNG, "c/8.jpg": images.encode(images.picture(9, 9), "JPEG")})
    assert val.shared(train) == [(0, 1)] and train.shared(val) == [(1, 0), (5, 0)]
    said = "\n".join(sentences(train, val))
    assert "1 of 2, e.g. a/9.png as a/1.png" in said and "Classes in only one: b, c." in said


def test_decoding_finds_more(tmp_path):
    files = images.bad_by_decoding() | {"good.jpg": JPEG}
    assert not surveyed(tmp_path, "by_structure", files).bad
    seen = surveyed(tmp_path, "decoded", files, decode=True)
    assert len(seen.bad) == len(files) - 1 and seen.readable().size == 1


def test_the_lines_and_the_page(tmp_path):
    seen = surveyed(tmp_path, "train <&>", FILES)
    said = "\n".join(sentences(seen, None))
    for words in (
        "Images: 7.", "1 pictures beside an image (.mask.png) (e.g. a/0.mask.png)", "2 JPEG, 2 PNG, 1 WebP.",
        "width 20 to 200 px, median 70; height 30 to 100 px, median 90; 1 with a side below 64 px",
        "Classes: 2, from 3 images (a) to 4 (b).",
        "2 images have the bytes of another one, e.g. b/2.jpg those of a/0.jpg",
        "Unreadable: 2 of 7.",
    ):  # fmt: skip
        assert words in said, said
    page = render(seen, surveyed(tmp_path, "val", {"a/9.png": PNG}))
    assert "train &lt;&amp;&gt;" in page and "<&>" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page), "one file"
    for title in (
        "JPEG", "The smallest and the largest", "Classes with the fewest", "The same bytes", "Unreadable",
        "Passed over", "Between the two",
    ):  # fmt: skip
        assert title in page
    pictures = re.findall(r'src="data:image/jpeg;base64,', page)
    assert len(pictures) > 12 and page.count('class="none"') >= 3, "the unreadable have no picture"


def test_the_program(tmp_path, monkeypatch, capfd):
    train = images.write(tmp_path / "train", FILES)
    val = images.write(tmp_path / "val", {"a/9.png": PNG})

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["check_images.py", *map(str, words), "--jobs", "1"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "tools/check_images.py"), run_name="__main__")
        return ended.value.code

    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    assert run(val, "--html", tmp_path / "nowhere/page.html") == 2
    assert "name a file in a folder that is there" in capfd.readouterr().err
    assert run(tmp_path / "gone") == 2 and "gone is not a folder" in capfd.readouterr().err
    monkeypatch.setattr("mapet_ds.data.survey.ProcessPoolExecutor", Inline)
    assert run(train, "--val", val, "--html", tmp_path / "page.html") == 1
    out, err = capfd.readouterr()
    assert [line.partition("\t")[0] for line in out.splitlines()] == [f"{train}/b/3.jpg", f"{train}/b/5.tif"]
    assert "Unreadable: 2 of 7." in err and "whose bytes are in the first, too: 1 of 1" in err
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert run(val) == 0


class Inline:
    """A pool that works in this process."""

    def __init__(self, *_: object, **__: object) -> None:
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_the_picture_of_a_sample_is_small(tmp_path):
    big = images.encode(images.picture(1500, 900), "PNG")
    page = render(surveyed(tmp_path, "train", {"0.png": big}), None)
    assert len(page) < 40_000 < len(big)
    assert Image.open(tmp_path / "train/0.png").size == (1500, 900)
