"""Few labels: published lists of names, and keyed draws, for probes and for fine-tuning."""

import json
import statistics

import numpy as np
import pytest
from line import write_classes, write_judged

from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.recipe import load_config
from mapet_ds.data.few_labels import drawn, listed
from mapet_ds.data.index import open_index
from mapet_ds.errors import DataError
from mapet_ds.files import write_whole
from mapet_ds.finetuning.task import Finetuning
from mapet_ds.results import features

LIST, SHOTS = ("--labels", "--train"), ("--shots", "--train")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    write_judged(folder)
    return folder


@pytest.fixture(scope="module")
def index(images, tmp_path_factory):
    return open_index(str(images / "train"), tmp_path_factory.mktemp("index"))


def names(index, places):
    return ["/".join(index.path(place).split("/")[-2:]) for place in places]


def test_a_list_names_files_or_ends_of_paths(index, tmp_path, capsys):
    file, (first, last) = tmp_path / "1percent.txt", (index.path(0), index.path(35))
    file.write_text(f"{last.split('/')[-1]}\n\n{'/'.join(first.split('/')[-2:])}\n")
    few = listed(index, file, LIST, 0.0)
    assert [places.tolist() for places in few.draws] == [[0, 35]]
    assert few.figures == {"labels": "1percent.txt", "names": 2, "names_missing": 0}
    said = capsys.readouterr().err
    assert f"--labels = {file} names no image of 1 of 3 classes, e.g. of b." in said

    # One name more than the set has is said; where the share is larger, it is refused.
    file.write_text("\n".join([*names(index, range(36)), "n01440764_10026.JPEG"]))
    assert len(listed(index, file, LIST, 0.01).draws[0]) == 36
    said = capsys.readouterr().err
    assert f"1 of 37 names are not in --train = {index.root}, e.g. n01440764_10026.JPEG: left out" in said
    assert "names no image" not in said
    with pytest.raises(DataError, match="1 of 37 names are not in --train .* name the set that the list is"):
        listed(index, file, LIST, 0.0)


def test_mistakes_in_a_list_are_sentences(index, tmp_path):
    file = tmp_path / "list.txt"
    with pytest.raises(DataError, match=f"--labels = {file} can't be read as a list of file names"):
        listed(index, file, LIST, 0.1)
    file.write_text(" \n\n")
    with pytest.raises(DataError, match="is empty: it names an image a line, e.g. n01440764_10026.JPEG"):
        listed(index, file, LIST, 0.1)
    file.write_text("no.jpg\n")
    with pytest.raises(DataError, match="1 of 1 names are not in"):
        listed(index, file, LIST, 1.0)


def test_a_name_of_two_images_is_refused_without_its_folder(tmp_path):
    for name in "ab":
        write_classes(tmp_path / "train" / name, 1, 0, classes="x")
    index = open_index(str(tmp_path / "train"), tmp_path / "index")
    (tmp_path / "list").write_text("000.png\n")
    with pytest.raises(
        DataError, match=r"000.png may be .*/a/x/000.png or .*/b/x/000.png. Write the class's"
    ):
        listed(index, tmp_path / "list", LIST, 0.0)
    (tmp_path / "list").write_text("b/x/000.png\n")
    assert listed(index, tmp_path / "list", LIST, 0.0).draws[0].tolist() == [1]


def test_a_draw_takes_as_many_of_each_class_and_nests(index):
    labels = index.labels()
    draws = {
        (seed, draw): drawn(index, 3, seed, draw, SHOTS) for seed, draw in [(0, 0), (0, 1), (0, 2), (1, 0)]
    }
    for places in draws.values():
        assert np.bincount(labels[places]).tolist() == [3, 3, 3] and (np.diff(places) > 0).all()
    assert len({tuple(places) for places in draws.values()}) == 4
    assert {*drawn(index, 2, 0, 1, SHOTS)} < {*draws[0, 1]}
    assert drawn(index, 12, 0, 0, SHOTS).tolist() == [*range(36)]
    with pytest.raises(DataError, match="--shots = 13: 3 of 3 classes of --train .* e.g. a has 12. Lower it"):
        drawn(index, 13, 0, 0, SHOTS)


def test_every_image_is_as_likely_in_a_draw(index):
    taken = np.concatenate([drawn(index, 3, 0, draw, SHOTS) for draw in range(2000)])
    share = np.bincount(taken, minlength=36) / 2000
    assert abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_probes_learn_from_few_labels_alone(run_tool_with, images, index, tmp_path, monkeypatch):
    """The figures are those of a set that holds no other images; no other image is computed."""
    few = [drawn(index, 4, 7, draw, SHOTS) for draw in (0, 1)]
    data = ["--val", images / "val", "--json", "--seed", "7"]
    model = ["--model", images / "timm"]
    expected = []
    for draw, places in enumerate(few):
        for name in names(index, places):
            path = tmp_path / f"{draw}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((images / "train" / name).read_bytes())
        code, printed = run_tool_with("knn", *model, "--train", tmp_path / f"{draw}", *data, "--k", "3")
        assert code == 0, printed.err
        expected.append(json.loads(printed.out)["knn_accuracy_percent"])
    assert expected[0] != expected[1]

    computed, real = [], features.labelled_features

    def counting(*given, **more):
        computed.append(len(given[2]))
        return real(*given, **more)

    monkeypatch.setattr(features, "labelled_features", counting)
    whole = [*model, "--train", images / "train", *data, "--shots", "4", "--draws", "2", "--k", "3"]
    found = json.loads(run_tool_with("knn", *whole)[1].out)
    assert [each["knn_accuracy_percent"] for each in found["draws"]] == expected
    assert found["knn_accuracy_percent"] == pytest.approx(statistics.mean(expected))
    assert found["standard_deviation"] == pytest.approx(statistics.stdev(expected))
    assert computed == [18, len({*few[0]} | {*few[1]})]
    assert (found["shots"], [each["labelled_images"] for each in found["draws"]]) == (4, [12, 12])

    # Rows of a file are found again, although one image of it is unreadable.
    bad = tmp_path / "whole" / names(index, [0])[0]
    for place in range(36):
        path = tmp_path / "whole" / names(index, [place])[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((images / "train" / names(index, [place])[0]).read_bytes()[: None if place else -30])
    write_whole(tmp_path / "list", "\n".join(names(index, sorted({*few[0]} - {0}))))
    words = [*model, "--train", tmp_path / "whole", *data[:3], "--k", "3", "--labels", tmp_path / "list"]
    alone = json.loads(run_tool_with("knn", *words)[1].out)
    file = ["--features", tmp_path / "f.safetensors"]
    code, printed = run_tool_with("knn", *words, *file)
    assert code == 0 and str(bad) in printed.err
    counts = {"train_images": 35, "train_unreadable": 1}
    assert json.loads(printed.out) == alone | counts
    assert alone["labels"] == "list" and alone["labelled_images"] == len({*few[0]} - {0})


def test_few_labels_in_words_and_mistakes(run_tool_with, images, tmp_path):
    words = ["--model", images / "timm", "--train", images / "train", "--val", images / "val"]
    code, printed = run_tool_with("linear", *words, "--shots", "1", "4", "--feature", "mean", "token")
    assert code == 0, printed.err
    lines = printed.out.splitlines()
    assert len(lines) == 4 and all("mean of 3 draws, standard deviation " in line for line in lines)
    assert "; 1 label a class (mean of the patches; trained weights; 18 validation images" in lines[0]
    assert "; 4 labels a class (class token; " in lines[3]
    words_of_knn = [*words, "--shots", "2", "--k", "1", "--json"]
    figures = json.loads(run_tool_with("knn", *words_of_knn)[1].out)
    assert (figures["k"], figures["temperature"], len(figures["draws"])) == (1, 0.07, 3)
    assert run_tool_with("knn", *words_of_knn[:-1])[1].out.startswith("k-NN (k = 1) accuracy ")
    rates = ["--solver", "sgd", "--shots", "7", "--learning_rates", "1e-9", "1e-8", "--epochs", "1"]
    assert "; no rate was better than another in 3 of them" in run_tool_with("linear", *words, *rates)[1].out
    for options, says in (
        (["--shots", "0"], "0 must be at least 1"),
        (["--shots", "13"], "--shots = 13: 3 of 3 classes of --train"),
        (["--labels", tmp_path / "no"], "can't be read as a list of file names"),
    ):
        code, printed = run_tool_with("linear", *words, *options)
        assert code == 2 and says in printed.err


def test_fine_tuning_learns_from_the_same_draw_or_list(images, index, alone, tmp_path):
    (tmp_path / "list").write_text("\n".join(names(index, [0, 14, 30])))

    def task(**data):
        data = {"train": str(images / "train"), "val": str(images / "val"), **data}
        settings = {"data": data, "model": {"path": str(images / "timm")}, "seed": 5}
        settings["run_dir"] = str(tmp_path / "run")
        write_whole(tmp_path / "recipe.yaml", json.dumps(settings))
        (tmp_path / "run").mkdir(exist_ok=True)
        return Finetuning(load_config(tmp_path / "recipe.yaml", (), FinetuneConfig), alone)

    whole, first, second, named = (
        task(),
        task(shots=2),
        task(shots=2, draw=1),
        task(labels=f"{tmp_path}/list"),
    )
    expected = drawn(index, 2, 5, 1, SHOTS)
    assert [second.index.path(i) for i in range(6)] == [index.path(place) for place in expected]
    assert second.index.labels().tolist() == index.labels()[expected].tolist()
    assert second.index.read(3) == index.read(int(expected[3]))
    assert [named.index.path(i) for i in range(3)] == [index.path(place) for place in (0, 14, 30)]
    tasks = [whole, first, second, named]
    assert len({each.index.fingerprint for each in tasks}) == 4, "a run doesn't go on with other labels"
    assert whole.index.classes == named.index.classes == ["a", "b", "c"]
    config = load_config(tmp_path / "recipe.yaml", ["data.shots=2", "data.labels=/no/list"], FinetuneConfig)
    sentences = [*config.rules()]
    assert any("both choose images: take one" in each for each in sentences)
    assert any("data.labels = /no/list is no file that this host can see" in each for each in sentences)
