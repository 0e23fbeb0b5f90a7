"""The suite: one document, features taken once, results that go on, a table in the model's card."""

import json

import pytest
import yaml
from line import write_judged

from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.suite import load_suite
from mapet_ds.errors import ConfigError
from mapet_ds.results import features
from mapet_ds.results.card import with_evaluation
from mapet_ds.results.report.history import read_record
from mapet_ds.results.report.page import Sizes, render
from mapet_ds.results.suite import Results, table

DOCUMENT = {
    "features": ["mean", "token"], "seed": 3, "knn": {"k": [1, 5]},
    "linear": {"solver": "sgd", "batch_norm": True, "learning_rates": [0.1, 1.0], "epochs": 2},
    "attentive": {"epochs": 1, "learning_rates": [0.001]},
    "few": {"shots": [2], "draws": 2, "knn": {"k": [1]}, "linear": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    write_judged(folder)
    (folder / "timm" / "README.md").write_text("# A model\n\nWords.\n\n## Settings\n\nMore.\n")
    data = {"train": str(folder / "train"), "val": str(folder / "val")}
    (folder / "suite.yaml").write_text(yaml.safe_dump(DOCUMENT | {"data": data}))
    return folder


def test_a_suite_measures_goes_on_and_writes_the_card(run_tool_with, folder, monkeypatch):
    words = ["suite", "--model", folder / "timm", "--suite", folder / "suite.yaml"]
    computed, real = [], features.labelled_features

    def counting(*given, **more):
        computed.append(len(given[2]))
        return real(*given, **more)

    monkeypatch.setattr(features, "labelled_features", counting)
    code, printed = run_tool_with(*words, "attentive=null", "few.shots=[]")
    assert code == 0, printed.err
    assert computed == [18, 36], "features are taken once"
    first = json.loads((folder / "timm/suite/results.json").read_text())
    assert len(first["results"]) == 6

    # What is there is not done again: the whole document takes features from the file.
    code, printed = run_tool_with(*words)
    assert code == 0, printed.err
    assert "has 6 of 9 rows already" in printed.out and computed == [18, 36]
    whole = json.loads((folder / "timm/suite/results.json").read_text())
    assert [*whole["results"]] == [
        "k-NN, k = 1, mean of the patches", "k-NN, k = 5, mean of the patches", "linear, mean of the patches",
        "k-NN, k = 1, mean of the patches, 2 labels a class",
        "k-NN, k = 1, class token", "k-NN, k = 5, class token", "linear, class token",
        "k-NN, k = 1, class token, 2 labels a class", "attentive probe",
    ]  # fmt: skip
    assert first["results"].items() <= whole["results"].items()
    assert "9 of 9 rows already" in run_tool_with(*words)[1].out

    # The figures are those of the single commands.
    sets = ["--train", folder / "train", "--val", folder / "val", "--seed", "3", "--json"]
    sets += ["--model", folder / "timm"]
    few = ["--shots", "2", "--draws", "2", "--feature", "token", "--k", "1"]
    alone = json.loads(run_tool_with("knn", *sets, *few)[1].out)
    found = whole["results"]["k-NN, k = 1, class token, 2 labels a class"]["figures"]
    names = ("knn_accuracy_percent", "standard_deviation", "draws")
    assert {name: found[name] for name in names} == {name: alone[name] for name in names}
    norm = ["--solver", "sgd", "--batch_norm", "--epochs", "2", "--learning_rates", "0.1", "1"]
    alone = json.loads(run_tool_with("linear", *sets, *norm)[1].out)
    found = whole["results"]["linear, mean of the patches"]["figures"]
    assert found["top1"] == alone["linear_accuracy_percent"]

    # The table is in the card, once, before the settings.
    card, lines = (folder / "timm/README.md").read_text(), table(whole)
    assert card.count(lines) == 1 and lines == (folder / "timm/suite/table.md").read_text()
    assert card.index(lines) < card.index("## Settings") and card.startswith("# A model\n\nWords.\n")
    assert str(folder) not in card, "a card tells nothing of the machine"
    row = [line for line in lines.splitlines() if "class token, 2 labels" in line]
    assert " ± " in row[0] and "draws: " in row[0]

    # Other settings are refused with both values, other images by name.
    code, printed = run_tool_with(*words, "linear.epochs=3", "seed=4")
    assert code == 2 and "linear, class token, epochs: 2 then, 3 now" in printed.err
    assert "k-NN, k = 1, class token, 2 labels a class, seed: 3 then, 4 now" in printed.err
    assert json.loads((folder / "timm/suite/results.json").read_text()) == whole
    code, printed = run_tool_with(*words, f"data.val={folder}/train", f"data.train={folder}/val")
    assert code == 2 and "the images of --train: " in printed.err and "Name another --out" in printed.err


def test_mistakes_in_a_suite_are_sentences_before_anything_runs(run_tool_with, folder, tmp_path):
    words = ["suite", "--model", folder / "timm", "--suite", folder / "suite.yaml", "--out", tmp_path]
    for override, says in (
        ("few.shot=[1]", "few.shot = [1] (from the command line) is not a knob; did you mean few.shots?"),
        ("knn={kk: 3}", "knn.kk = 3 (from the command line) is not a knob"),
        ("knn.k=[1, 1]", "knn.k = [1, 1] must name each value once"),
        ("data.val=", "data.val is empty"),
        ("few.lists=[/no/list]", "few.lists: /no/list is no file that this host can see"),
        ("few.knn=null", "few.knn and few.linear are both null"),
        ("features=[max]", "features"),
        ("few.shots=[13]", "few.shots = 13: 3 of 3 classes"),
        ("few.knn.k=[5, 7]", "few.knn.k = 7 neighbours can't be found: 2 labels a class: 6 images."),
        ("few.linear={solver: sgd}", "few.linear.solver = sgd holds out a tenth of 20 images or more"),
    ):
        code, printed = run_tool_with(*words, override)
        assert code == 2 and says in printed.err, printed.err
    (tmp_path / "results.json").write_text("{}")
    code, printed = run_tool_with(*words)
    assert code == 2 and "holds no results of a suite" in printed.err
    assert not (tmp_path / "features.safetensors").exists()


def test_the_shipped_suite_can_be_read():
    data = ["data.train=a", "data.val=b"]
    assert load_suite("imagenet", data).linear.batch_norm
    nothing = ["knn=null", "linear=null", "attentive=null", "few.shots=[]", "accuracy=null"]
    with pytest.raises(ConfigError, match="The suite imagenet: The suite measures nothing"):
        load_suite("imagenet", [*data, *nothing])


def test_a_table_replaces_an_earlier_one():
    once = with_evaluation("# Name\n", "| a |\n")
    assert "| a |" in once
    twice = with_evaluation(once + "\nMore.\n", "| b |\n")
    assert "| a |" not in twice and twice.count("## Evaluation") == 1 and twice.endswith("\nMore.\n")


def test_results_of_an_earlier_document_stay(tmp_path):
    file, about = tmp_path / "results.json", {}
    Results(file, {"weights": "a"}, about).add("old", {"k": 1}, {"top1": 1.0}, ["old"])
    results = Results(file, {"weights": "a"}, about)
    assert results.missing({"new": {"k": 2}}) == ["new"]
    results.add("new", {"k": 2}, {"top1": 2.0}, ["new"])
    assert [*json.loads(file.read_text())["results"]] == ["new", "old"]
    with pytest.raises(ConfigError, match="weights: a then, b now"):
        Results(file, {"weights": "b"}, about)


def test_the_page_of_a_run_shows_what_a_suite_has_measured(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(FinetuneConfig().to_dict()))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    sizes = Sizes(images=1, sample=1, patches=1)
    assert "Evaluation" not in render([read_record(tmp_path)], sizes)
    (tmp_path / "timm/suite").mkdir(parents=True)
    results = Results(tmp_path / "timm/suite/results.json", {}, {})
    figures = {"top1": 41.25, "top5": 70.0, "standard_deviation": 1.5, "note": "<b>"}
    results.add("k-NN, k = 1, 5 labels a class", {}, figures, [])
    text = render([read_record(tmp_path)], sizes)
    row = "<td>k-NN, k = 1, 5 labels a class</td><td>41.25 ± 1.50</td><td>70.00</td><td>&lt;b&gt;</td>"
    assert row in text and f"{tmp_path}/timm</h3>" in text
