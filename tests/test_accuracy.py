"""Top-1 and top-5 of a fine-tuned model: classes by name, wnid and number, sub-sets, ReaL, in a suite."""

import json
import pkgutil
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from line import write_classes
from PIL import Image
from timm.models import save_for_hf

from mapet_ds.errors import DataError
from mapet_ds.results.accuracy import accuracies, imagenet_names, read_classes, real_labels, subset_outputs
from mapet_ds.results.export import write_timm

WNIDS = imagenet_names()
NUMBERS = [6, 11, 0, 3]
"""ImageNet's numbers of the model's classes: two of ImageNet-A, two that are not."""
OURS = [WNIDS[number] for number in NUMBERS]
LACKED = 13


def model_of(names, outputs=None):
    cfg = {"label_names": names, "num_classes": outputs or len(names)}
    return SimpleNamespace(pretrained_cfg=cfg, num_classes=outputs or len(names))


def test_classes_are_read_by_name_wnid_or_number():
    def outputs(model, classes):
        return read_classes(model, classes, "SET").outputs.tolist()

    # A model of some of ImageNet's classes, in an order of its own.
    assert outputs(model_of(OURS), [WNIDS[0], WNIDS[13], WNIDS[11]]) == [2, -1, 1]
    assert outputs(model_of(OURS), ["0", "13", "0011"]) == [2, -1, 1]
    # A model of all of them, whose names nobody has kept, or that learnt from numbers.
    for model in (model_of([], 1000), model_of([*map(str, range(1000))])):
        assert outputs(model, [WNIDS[999], WNIDS[7]]) == outputs(model, ["999", "7"]) == [999, 7]
    # Names of one's own, and their numbers.
    assert outputs(model_of(["amber", "blue"]), ["blue"]) == [1]
    assert outputs(model_of(["amber", "blue"]), ["1", "0"]) == [1, 0]
    assert outputs(model_of(["7", "3"]), ["3"]) == [1], "names come first"


def test_the_reading_is_said():
    said = read_classes(model_of(OURS), ["0"], "SET").words
    assert said == "numbers, read in the order of ImageNet's 1,000 wnids; the model's class names"
    said = read_classes(model_of([], 1000), [WNIDS[0]], "SET").words
    assert said == "wnids, read by the order of imagenet-1k, by the model's 1000 outputs"
    assert read_classes(model_of(["a", "b"]), ["1"], "SET").words == (
        "numbers, read as those of the model's outputs"
    )


def test_what_cannot_be_mapped_is_a_sentence():
    for model, classes, says in (
        (
            model_of(OURS),
            [WNIDS[0], "cat"],
            "SET: 1 of its 2 classes can't be mapped to the model's, e.g. cat",
        ),
        (model_of(["a", "b"]), [WNIDS[0]], "the model's are a, b. Name folders as the model's classes"),
        (model_of([], 7), [WNIDS[0]], "the model's are not known by name"),
        (model_of(["a", "b"]), ["2"], "class 2 is beyond the 2 that its numbers go by"),
        (model_of(OURS), ["1000"], "class 1000 is beyond the 1,000"),
        (model_of(OURS), [WNIDS[LACKED]], "the model has none of its 1 classes"),
    ):
        with pytest.raises(DataError) as refused:
            read_classes(model, classes, "SET")
        assert says in str(refused.value)


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r", "mini_imagenet"])
def test_sub_sets_are_timms(name, tmp_path):
    indices = list(map(int, pkgutil.get_data("timm.data", f"_info/{name}_indices.txt").split()))
    assert sorted(subset_outputs(model_of([], 1000), "--classes", name)) == sorted(indices)
    with pytest.raises(DataError, match=f"--classes = {name}: the model (lacks|has none)"):
        subset_outputs(model_of(OURS), "--classes", name)
    (tmp_path / "list").write_text(f"{WNIDS[11]}\n{WNIDS[6]}\n")
    assert subset_outputs(model_of(OURS), "--classes", f"{tmp_path}/list").tolist() == [1, 0]
    with pytest.raises(DataError, match="is none of imagenet_a, imagenet_r, mini_imagenet, and no file"):
        subset_outputs(model_of(OURS), "--classes", "imagenet_x")


def test_a_hit_is_any_of_the_right_outputs():
    predicted = np.array([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [5, 6, 7, 8, 9], [0, 1, 2, 3, 4]])
    assert accuracies(predicted, [[0], [0, 3], [1], {9, 4}]) == (25.0, 75.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier of four of ImageNet's classes, and images of three of them and of one that it lacks."""
    folder = tmp_path_factory.mktemp("accuracy")
    torch.manual_seed(3)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, global_pool="avg", **sizes)
    torch.nn.init.normal_(model.head.weight)
    data = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic"}
    (folder / "timm").mkdir()
    write_timm(model, folder / "timm", data, OURS)
    headless = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    save_for_hf(headless, folder / "pretrained", safe_serialization=True, data_config=data)

    write_classes(folder / "drawn", 60, 5, classes="abcd", noise=250, tint=30)
    for letter, number in zip("abcd", [0, 6, 11, LACKED]):
        for place, path in enumerate(sorted((folder / "drawn" / letter).iterdir())):
            name = f"ILSVRC2012_val_{1 + place + 15 * 'abcd'.index(letter):08d}.png"
            for root in (folder / "wnids" / WNIDS[number], folder / "numbers" / str(number)):
                root.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, root / name)
    return folder


def logits_by_hand(folder):
    """Of every image of a class that the model has, by timm alone: the logits, the label, the name."""
    model = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    for label, wnid in enumerate(OURS):
        for path in sorted((folder / "wnids" / wnid).glob("*")):
            with torch.no_grad():
                yield model(transform(Image.open(path).convert("RGB"))[None])[0], label, path.stem


def test_the_command_finds_what_timm_alone_finds(run_tool_with, folder, tmp_path):
    found = list(logits_by_hand(folder))
    assert len(found) == 45
    every = 100 * np.mean([logits.argmax() == label for logits, label, _ in found])
    among = 100 * np.mean([logits[:3].argmax() == label for logits, label, _ in found])
    assert 5 < every < among < 95, "the choice among three classes of four matters"

    words = ["--model", folder / "timm", "--json", "--batch_size", "7"]
    code, printed = run_tool_with("accuracy", *words, "--images", folder / "wnids")
    assert code == 0, printed.err
    figures = json.loads(printed.out)
    assert (figures["top1"], figures["top1_among_all_classes"]) == pytest.approx((among, every))
    assert (figures["top5"], figures["images"], figures["left_out"]) == (100, 45, 15)
    by_number = json.loads(run_tool_with("accuracy", *words, "--images", folder / "numbers")[1].out)
    assert by_number.pop("read_as").startswith("numbers, read in the order of ImageNet's")
    assert by_number == {name: value for name, value in figures.items() if name != "read_as"}

    # Two classes alone.
    (tmp_path / "two").write_text("11\n6\n")
    two = [(logits[:2].argmax() == label) for logits, label, _ in found if label < 2]
    words += ["--images", folder / "wnids"]
    figures = json.loads(run_tool_with("accuracy", *words, "--classes", tmp_path / "two")[1].out)
    assert figures["top1"] == pytest.approx(100 * np.mean(two)) and figures["classes"] == 2
    assert (figures["images"], figures["left_out"]) == (30, 30)


def test_real_labels(run_tool_with, folder, tmp_path):
    rng = np.random.default_rng(0)
    real = [[NUMBERS[i] for i in range(4) if rng.random() < 0.4] + [500] for _ in range(60)]
    real[:5] = [[], [500], [], [], []]
    (tmp_path / "real.json").write_text(json.dumps(real))
    hits = []
    for logits, _, name in logits_by_hand(folder):
        right = [NUMBERS.index(each) for each in real[int(name[-8:]) - 1] if each != 500]
        hits += [logits.argmax().item() in right] if right else []
    assert 0 < np.mean(hits) < 1 and len(hits) < 41
    words = ["accuracy", "--model", folder / "timm", "--images", folder / "wnids"]
    code, printed = run_tool_with(*words, "--real", tmp_path / "real.json", "--json")
    assert code == 0, printed.err
    figures = json.loads(printed.out)
    assert (figures["real_top1"], figures["real_images"]) == pytest.approx((100 * np.mean(hits), len(hits)))

    # Without a file timm's own is taken: other labels.
    code, printed = run_tool_with(*words, "--real")
    assert code == 2 and "no image has a label of ReaL's that the model knows" in printed.err
    (tmp_path / "real.json").write_text("{}")
    code, printed = run_tool_with(*words, "--real", tmp_path / "real.json")
    assert code == 2 and "ILSVRC2012_val_00000001.JPEG" in printed.err
    (tmp_path / "real.json").write_text("[3]")
    code, printed = run_tool_with(*words, "--real", tmp_path / "real.json")
    assert code == 2 and "is no real.json, a list of lists of classes" in printed.err
    with pytest.raises(
        DataError, match=r"none of its wnids: leave ReaL out \(of a suite by accuracy.real=null"
    ):
        real_labels(model_of(["amber", "blue"]), [], "SET", None)


def test_words_and_mistakes(run_tool_with, folder):
    words = ["--images", folder / "wnids"]
    code, printed = run_tool_with("accuracy", "--model", folder / "timm", *words)
    assert code == 0 and printed.out.startswith("Top-1 ")
    for says in (
        "45 images; wnids, read by the model's class names; it chooses among 3 of its 4 classes",
        "15 images of other classes are left out",
    ):
        assert says in printed.out
    code, printed = run_tool_with("accuracy", "--model", folder / "pretrained", *words)
    assert code == 2 and "has no classifier, so no top-1: tools/finetune.py trains one" in printed.err
    code, printed = run_tool_with("accuracy", "--model", folder / "timm", "--images", folder / "drawn")
    assert code == 2 and "4 of its 4 classes can't be mapped to the model's, e.g. a, b, c" in printed.err


def test_a_suite_has_the_accuracies(run_tool_with, folder, tmp_path):
    for split in ("train", "val"):  # the images of a suite have the same classes in both
        for wnid in OURS[:2]:
            (tmp_path / split / wnid).mkdir(parents=True)
            for place, path in enumerate(sorted((folder / "wnids" / wnid).iterdir())):
                if (place < 10) == (split == "train"):
                    shutil.copy(path, tmp_path / split / wnid)
    real = [[6, 11]] * 60
    (tmp_path / "real.json").write_text(json.dumps(real))
    sets = {"numbers": {"images": f"{folder}/numbers"}, "of_a": {"images": f"{folder}/wnids"}}
    sets["of_a"]["classes"] = f"{tmp_path}/two"
    (tmp_path / "two").write_text("6\n11\n")
    document = {
        "data": {"train": f"{tmp_path}/train", "val": f"{tmp_path}/val"}, "knn": {"k": [3]}, "linear": None,
        "accuracy": {"real": f"{tmp_path}/real.json", "sets": sets},
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(document))
    words = ["suite", "--suite", tmp_path / "suite.yaml", "--out", tmp_path / "out"]
    code, printed = run_tool_with(*words, "--model", folder / "timm")
    assert code == 0, printed.err
    found = json.loads((tmp_path / "out/results.json").read_text())["results"]
    rows = ["fine-tuned, val", "fine-tuned, val, ReaL", "fine-tuned, numbers", "fine-tuned, of_a"]
    assert [*found] == ["k-NN, k = 3, mean of the patches", *rows]
    alone = ["accuracy", "--model", folder / "timm", "--json", "--images"]
    for row, images in ((rows[0], tmp_path / "val"), (rows[2], folder / "numbers")):
        figures = json.loads(run_tool_with(*alone, images)[1].out)
        assert {name: found[row]["figures"][name] for name in ("top1", "top5", "images")} == {
            name: figures[name] for name in ("top1", "top5", "images")
        }
    assert found[rows[1]]["figures"]["top1"] >= found[rows[0]]["figures"]["top1_among_all_classes"]
    assert f"| {rows[2]} | " in (folder / "timm/README.md").read_text()

    # ReaL can be left out; another reading of a set is refused; a model without a classifier has the rest.
    without = [*words[:3], "--out", tmp_path / "without", "--model", folder / "timm", "accuracy.real=null"]
    code, printed = run_tool_with(*without)
    assert code == 0 and rows[0] in printed.out and rows[1] not in printed.out
    code, printed = run_tool_with(*words, "--model", folder / "timm", "accuracy.sets.of_a.classes=")
    assert code == 2 and "fine-tuned, of_a, classes: " in printed.err
    code, printed = run_tool_with(*words[:3], "--model", folder / "pretrained", "--out", tmp_path / "other")
    assert code == 0 and "has no classifier: the suite's `accuracy` is left out" in printed.err
    assert len(json.loads((tmp_path / "other/results.json").read_text())["results"]) == 1
