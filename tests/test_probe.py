"""The k-NN probe: the vote against a slow twin, and the program on folders of images."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import timm
import torch
from forked import TORCHRUN, start
from PIL import Image
from safetensors.numpy import load_file
from timm.models import save_for_hf
from towers import write_tower

from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.running import TrainConfig
from mapet_ds.config.sections import REPOSITORY, MAEConfig
from mapet_ds.data.index import Index
from mapet_ds.errors import ConfigError, DataError
from mapet_ds.results import features as forward
from mapet_ds.results import probe
from mapet_ds.results.attentive import Tokens, attentive
from mapet_ds.results.features import chosen, features, judged_feature, unit_length
from mapet_ds.results.probe import fit_heads, knn, linear, linear_sgd, load_timm
from mapet_ds.results.stored_features import Judged, is_stored, load, save

EVALUATE = REPOSITORY / "tools" / "evaluate.py"


def unit_vectors(rng, n, width=8):
    vectors = rng.normal(size=(n, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force_knn(train, train_labels, val, val_labels, k, temperature):
    right = 0
    for query, label in zip(val, val_labels, strict=True):
        cosines = [float(np.dot(query.astype(np.float64), row.astype(np.float64))) for row in train]
        votes = {}
        for i in sorted(range(len(train)), key=lambda i: -cosines[i])[:k]:
            votes[train_labels[i]] = votes.get(train_labels[i], 0.0) + math.exp(cosines[i] / temperature)
        right += max(votes, key=votes.get) == label
    return 100 * right / len(val)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 10.0), (60, 0.3)])
def test_knn_is_the_brute_force_vote(k, temperature):
    rng = np.random.default_rng(0)
    train, val = unit_vectors(rng, 60), unit_vectors(rng, 50)
    labels = [(vectors[:, 0] * 4).round().astype(np.int64) + 4 for vectors in (train, val)]
    expected = brute_force_knn(train, labels[0], val, labels[1], k, temperature)
    assert 20 < expected < 90  # neither chance nor a task that any vote solves
    assert knn(train, labels[0], val, labels[1], k, temperature) == pytest.approx(expected)


def test_vote_weighs_neighbours_by_similarity():
    train = np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32)
    labels, query = np.array([0, 1, 1]), np.array([[math.cos(0.5), math.sin(0.5)]], dtype=np.float32)
    assert (
        knn(train, labels, query, np.array([0]), k=3, temperature=0.07) == 100
    )  # the near one outweighs two far ones
    assert knn(train, labels, query, np.array([1]), k=3, temperature=10.0) == 100  # flat weights: a majority


def test_knn_refuses_more_neighbours_than_images():
    vectors = unit_vectors(np.random.default_rng(0), 5)
    with pytest.raises(DataError, match="k = 6 neighbours can't be found among 5"):
        knn(vectors, np.zeros(5, int), vectors, np.zeros(5, int), k=6)


@pytest.mark.gpu
@pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="no GPU that FAISS can use")
def test_knn_on_a_gpu_is_the_brute_force_vote():
    rng = np.random.default_rng(0)
    train, val = unit_vectors(rng, 600), unit_vectors(rng, 50)
    labels = [(vectors[:, 0] * 4).round().astype(np.int64) + 4 for vectors in (train, val)]
    expected = brute_force_knn(train, labels[0], val, labels[1], 20, 0.07)
    assert knn(train, labels[0], val, labels[1]) == pytest.approx(expected)


def test_the_linear_probe_finds_what_a_line_can_tell_and_no_scale_matters():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 400)
    points = generator.normal(size=(400, 8)).astype(np.float32) + 2.0 * np.eye(3, 8, dtype=np.float32)[labels]
    sets = points[:300], labels[:300], points[300:], labels[300:]
    accuracy = linear(*sets)
    nearest = ((points[300:, None] - 2.0 * np.eye(3, 8)[None]) ** 2).sum(-1).argmin(1)  # the best there is
    assert abs(accuracy - 100 * (nearest == labels[300:]).mean()) < 6
    scale = np.float32(1000) ** generator.uniform(-1, 1, 8).astype(np.float32)
    assert linear(
        points[:300] * scale + 5, labels[:300], points[300:] * scale + 5, labels[300:]
    ) == pytest.approx(accuracy, abs=1)
    separable = np.eye(3, 8, dtype=np.float32)[labels] * 9 + points
    assert linear(separable[:300], labels[:300], separable[300:], labels[300:]) == 100
    assert linear(points[:300], generator.permutation(labels[:300]), points[300:], labels[300:]) < 50


def tinted_points(seed=0, number=400):
    """Features and labels of two sets, which a line can mostly tell apart."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, number)
    points = (
        generator.normal(size=(number, 8)).astype(np.float32) + 2.0 * np.eye(3, 8, dtype=np.float32)[labels]
    )
    return points[:300], labels[:300], points[300:], labels[300:]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_heads_side_by_side_are_each_what_torch_trains_alone(batch_norm):
    """The slow twin: nn.Linear, and the rate in the solver."""
    x, y, *_ = map(torch.from_numpy, tinted_points())
    rows, rates, epochs = (
        torch.randperm(300, generator=torch.Generator().manual_seed(1))[:270],
        (0.05, 0.4),
        3,
    )
    found = fit_heads(x, y, rows, rates, epochs, batch_norm, torch.Generator().manual_seed(7))
    for i, rate in enumerate(rates):
        norm = (
            torch.nn.BatchNorm1d(8, affine=False, eps=1e-6, momentum=None)
            if batch_norm
            else torch.nn.Identity()
        )
        head = torch.nn.Linear(8, 3)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        solver, generator = (
            torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9),
            torch.Generator().manual_seed(7),
        )
        for epoch in range(epochs):  # 270 rows are one batch of 256
            solver.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
            batch = rows[torch.randperm(270, generator=generator)][:256]
            solver.zero_grad()
            torch.nn.functional.cross_entropy(head(norm(x[batch])), y[batch]).backward()
            solver.step()
        expected = head(norm.eval()(x))
        assert expected.std() > 0.05
        torch.testing.assert_close(found(x)[i], expected, atol=1e-5, rtol=1e-4)


def test_the_linear_probe_by_sgd_chooses_its_rate_without_the_validation_set():
    sets = tinted_points()
    rates = (1e38, 0.1)  # the first makes nothing but NaN
    state = torch.get_rng_state()
    probe = linear_sgd(*sets, rates, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert probe == linear_sgd(*sets, rates, seed=3)
    assert probe.learning_rate == 0.1 and list(probe.held_out) == list(rates)
    assert probe.held_out[0.1] == max(probe.held_out.values()) > min(probe.held_out.values())
    assert probe.accuracy == pytest.approx(linear(*sets), abs=5)
    other = linear_sgd(*sets[:3], (sets[3] + 1) % 3, rates, seed=3)
    assert other[1:] == probe[1:] and other.accuracy < 50
    alone = linear_sgd(*sets, (0.1,), seed=3)
    assert alone.held_out == pytest.approx({0.1: probe.held_out[0.1]})


def test_batch_norm_makes_scales_and_offsets_of_features_not_matter():
    train, train_labels, val, val_labels = tinted_points()
    scale = (np.float32(100) ** np.linspace(-1, 1, 8)).astype(np.float32)
    settings = {"learning_rates": (0.1,), "epochs": 20, "batch_norm": True}
    plain = linear_sgd(train, train_labels, val, val_labels, **settings).accuracy
    moved = linear_sgd(train * scale + 5, train_labels, val * scale + 5, val_labels, **settings).accuracy
    assert plain > 70 and moved == pytest.approx(plain, abs=1)


def test_too_few_images_to_hold_any_out():
    train, train_labels, *val = tinted_points()
    with pytest.raises(DataError, match="19 training images are too few to hold out a tenth"):
        linear_sgd(train[:19], train_labels[:19], *val)


def test_features_are_means_of_the_patch_tokens_or_class_tokens():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        depth=1,
        embed_dim=32,
        num_heads=2,
        reg_tokens=2,
        num_classes=0,
    )
    images, labels = torch.randn(5, 3, 32, 32), torch.tensor([3, 1, 2, 0, 4])
    loader = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    vectors, found_labels = features(model, loader, torch.device("cpu"), kinds=("token", "mean"))
    found = chosen(vectors, "mean", [0])
    with torch.no_grad():
        tokens = model.eval().forward_features(images).double().numpy()
    for i in range(5):
        mean = sum(tokens[i, 3:]) / 16  # behind the class token and two registers
        np.testing.assert_allclose(found[i], mean, atol=1e-6)
        np.testing.assert_allclose(unit_length(found)[i], mean / math.sqrt(sum(mean**2)), atol=1e-6)
    assert found_labels.tolist() == labels.tolist()
    token, both = (chosen(vectors, feature, [0]) for feature in ("token", "both"))
    np.testing.assert_allclose(token, tokens[:, 0], atol=1e-6)
    np.testing.assert_array_equal(both, np.concatenate([token, found], axis=1))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=32, num_heads=2, num_classes=0
    )
    save_for_hf(
        model, folder, safe_serialization=True, data_config={"input_size": (3, 32, 32), "crop_pct": 1.0}
    )
    return folder


@pytest.fixture(scope="module")
def image_folders(tmp_path_factory):
    """Colours with noise, so that random weights beat chance but not always; of several sizes and modes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 6)):
        for name, colour in (
            ("amber", (140, 120, 90)),
            ("blue", (120, 120, 130)),
            ("coral", (130, 100, 110)),
        ):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = np.array(colour) + rng.normal(0, 12, 3) + rng.normal(0, 40, (40 + i, 48, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image = image.convert("P") if i == 0 else image
                image.save(root / split / name / (f"{i}.png" if i == 0 else f"{i}.jpg"))
    return root


def accuracy_by_hand(model, images, k):
    """Own resize, crop and normalisation; own features; brute force."""
    cfg = model.pretrained_cfg
    sets = {}
    for split in ("train", "val"):
        vectors, labels = [], []
        for label, name in enumerate(sorted(os.listdir(images / split))):
            for path in sorted((images / split / name).iterdir(), key=lambda p: p.name):
                image = Image.open(path).convert("RGB")
                width, height = image.size
                side = min(width, height)
                # the shorter side to 32, then the central 32 x 32
                resized = image.resize((round(width * 32 // side), round(height * 32 // side)), Image.BICUBIC)
                left, top = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
                pixels = np.asarray(resized.crop((left, top, left + 32, top + 32)), dtype=np.float32) / 255
                pixels = (pixels - np.array(cfg["mean"])) / np.array(cfg["std"])
                with torch.no_grad():
                    tokens = model.forward_features(torch.tensor(pixels).permute(2, 0, 1)[None].float())
                vector = tokens[0, 1:].mean(0).numpy()
                vectors.append(vector / np.linalg.norm(vector))
                labels.append(label)
        sets[split] = np.stack(vectors), labels
    return brute_force_knn(*sets["train"], *sets["val"], k, 0.07)


def test_the_command(model_folder, image_folders):
    folders = ["--train", image_folders / "train", "--val", image_folders / "val"]
    settings = ["--k", "5", "--workers", "1", "--batch_size", "7", "--device", "cpu", "--json"]
    command = [sys.executable, EVALUATE, "knn", "--model", model_folder, *folders, *settings]
    done = start(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    expected = accuracy_by_hand(load_timm(model_folder), image_folders, 5)
    assert 40 < expected < 95
    assert result["knn_accuracy_percent"] == pytest.approx(expected)
    assert (result["k"], result["train_images"], result["val_images"], result["classes"]) == (5, 36, 18, 3)


@pytest.fixture
def run_tool(run_tool_with):
    def run(model, train, val, *arguments):
        return run_tool_with("knn", "--model", model, "--train", train, "--val", val, "--k", "5", *arguments)

    return run


def test_untrained_needs_no_weights_and_is_seeded(run_tool, model_folder, image_folders, tmp_path):
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    train, val = image_folders / "train", image_folders / "val"
    code, printed = run_tool(tmp_path, train, val, "--untrained")
    assert (
        code == 0
        and "k-NN (k = 5) accuracy" in printed.out
        and "untrained weights; 36 training, 18 validation images, 3 classes" in printed.out
    )
    weights = [load_timm(tmp_path, untrained=True, seed=seed).blocks[0].attn.qkv.weight for seed in (1, 1, 2)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
    trained = load_timm(model_folder)
    assert not trained.blocks[0].attn.qkv.weight.equal(
        load_timm(model_folder, untrained=True, seed=1).blocks[0].attn.qkv.weight
    )

    code, printed = run_tool(tmp_path, train, val)
    assert (
        code == 2 and "there are no weights" in printed.err and "model.safetensors is missing" in printed.err
    )


def test_weights_file_with_architecture(model_folder, tmp_path):
    weights = load_timm(model_folder).state_dict()
    assert (
        load_timm(model_folder / "model.safetensors").state_dict().keys() == weights.keys()
    )  # config.json beside it
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_for_hf(plain, tmp_path, safe_serialization=True)
    loaded = load_timm(tmp_path / "model.safetensors", "vit_tiny_patch16_224")
    assert loaded.state_dict()["pos_embed"].equal(plain.pos_embed)


def copy_tree(source, target):
    for path in source.rglob("*.*"):
        (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        (target / path.relative_to(source)).write_bytes(path.read_bytes())


def test_mistakes_are_sentences(run_tool, model_folder, image_folders, tmp_path):
    train, val = image_folders / "train", tmp_path / "val"

    def message(*arguments, model=model_folder, val=val):
        code, printed = run_tool(model, train, val, *arguments)
        (sentence,) = [line for line in printed.err.splitlines() if not line.endswith(" classes.")]
        assert code == 2
        return sentence

    assert str(val) in message()
    copy_tree(image_folders / "val", val)
    (val / "coral").rename(val / "crimson")
    assert "must have the same classes; only in one of them: coral, crimson." in message()
    (val / "crimson").rename(val / "coral")
    (val / "dune").mkdir()
    assert f"--val = {val}: class dune has no image." in message()
    (val / "dune").rmdir()
    assert "lower --k" in message("--k", "37", val=image_folders / "val")
    for option, says in (
        ("--k=0", "--k: 0 must be at least 1"), ("--batch_size=0", "must be at least 1"),
        ("--workers=-1", "-1 must be at least 0"),
        ("--temperature=0", "0 must be above 0"), ("--temperature=nan", "must be above 0"),
        ("--device=foo", "no device of this host"),
    ):  # fmt: skip
        code, printed = run_tool(model_folder, train, val, option)
        assert code == 2 and says in printed.err
    lone = tmp_path / "weights.safetensors"
    lone.write_bytes((model_folder / "model.safetensors").read_bytes())
    assert "add --arch" in message(model=lone)
    assert f"--model {tmp_path} is neither a folder with" in message(model=tmp_path)
    assert "timm can't load" in message("--arch", "vit_tiny_patch16_224", model=lone)
    lone.write_bytes(b"no weights")
    assert "can't be read as plain tensors" in message("--arch", "vit_tiny_patch16_224", model=lone)
    pickled = tmp_path / "weights.pth"
    for content in (b"hello", b"", pickle.dumps([1, 2])):
        pickled.write_bytes(content)
        assert "can't be read as plain tensors" in message("--arch", "vit_tiny_patch16_224", model=pickled)


def test_a_bad_image_is_left_out_and_counted_before_training_images_are_computed(
    run_tool, model_folder, image_folders, tmp_path, monkeypatch
):
    train, val = tmp_path / "train", tmp_path / "val"
    for split in (train, val):
        copy_tree(image_folders / split.name, split)
    bad, read, real = [val / "blue" / "2.jpg", train / "coral" / "3.jpg"], [], Index.read
    for path in bad:
        path.write_bytes(path.read_bytes()[:300])
    monkeypatch.setattr(Index, "read", lambda self, i: read.append(self.path(i)) or real(self, i))
    code, printed = run_tool(model_folder, train, val, "--json")
    assert code == 0
    assert f"Unreadable and left out of the evaluation: 1 of 18, e.g. {bad[0]}: cut off." in printed.err
    figures = json.loads(printed.out)
    counts = {"train_images": 35, "train_unreadable": 1, "val_images": 17, "val_unreadable": 1}
    assert {name: figures[name] for name in counts} == counts
    for path in bad:
        path.unlink()
    assert json.loads(run_tool(model_folder, train, val, "--json")[1].out) == figures | {
        "train_unreadable": 0,
        "val_unreadable": 0,
    }

    # One more of the validation images is too many. It is said before the training images are computed.
    for path in (bad[0], val / "amber" / "1.jpg"):
        path.write_bytes(b"<html>")
    read.clear()
    code, printed = run_tool(model_folder, train, val)
    assert code == 2 and "at least 2 of 18, more than the 1 that --max_bad_share = 0.01 allows" in printed.err
    assert "new run_dir" not in printed.err and "data.max" not in printed.err
    assert set(train.rglob("*.jpg")) - {Path(path) for path in read}, "most were not read"
    code, printed = run_tool(model_folder, train, val, "--max_bad_share", "0.1", "--workers", "1")
    assert code == 0 and "36 training" not in printed.out and "16 validation images" in printed.out


def test_a_set_is_not_judged_by_itself(run_tool, model_folder, image_folders, tmp_path):
    train, copy = image_folders / "train", tmp_path / "copy"
    code, printed = run_tool(model_folder, train, train)
    assert code == 2 and f"--val = {train}: 32 of 32 images that were looked at are in --train" in printed.err

    # Under other names the bytes are looked for.
    copy_tree(train, copy)
    for path in list(copy.rglob("*.*")):
        path.rename(path.with_name(f"copy_of_{path.name}"))
    code, printed = run_tool(model_folder, train, copy)
    assert code == 2 and "in --train, too, byte for byte" in printed.err and "Traceback" not in printed.err

    # Some of them are a warning.
    copy_tree(image_folders / "val", tmp_path / "mixed")
    assert "WARNING" not in run_tool(model_folder, train, tmp_path / "mixed")[1].err
    (tmp_path / "mixed" / "blue" / "again.jpg").write_bytes((train / "blue" / "4.jpg").read_bytes())
    code, printed = run_tool(model_folder, train, tmp_path / "mixed")
    assert code == 0 and "WARNING: --val = " in printed.err and "1 of 19 images" in printed.err


def test_the_parts_of_a_data_set_are_no_classes(run_tool, model_folder, image_folders):
    code, printed = run_tool(model_folder, image_folders, image_folders)
    assert code == 2 and "its folders train and val are parts of a data set, no classes" in printed.err
    assert f"Name one of them, e.g. {image_folders / 'train'}." in printed.err


def test_shards_and_two_ranks_give_the_folders_figures(run_tool, model_folder, image_folders, tmp_path):
    train, val = image_folders / "train", image_folders / "val"
    expected = json.loads(run_tool(model_folder, train, val, "--json")[1].out)
    for source in (train, val):
        packed = [sys.executable, REPOSITORY / "tools" / "make_shards.py", source, tmp_path / source.name]
        subprocess.run(packed, check=True, capture_output=True)
    shards = ["--train", tmp_path / "train", "--val", tmp_path / "val"]
    words = ["knn", "--model", model_folder, *shards, "--k", "5", "--workers", "0", "--json"]
    done = start(sys.executable, *TORCHRUN, "--nproc_per_node=2", EVALUATE, *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_features_are_computed_once_into_a_file(
    run_tool_with, model_folder, image_folders, tmp_path, monkeypatch
):
    sets = ["--train", image_folders / "train", "--val", image_folders / "val"]
    words, file = ["--model", model_folder, *sets, "--json"], tmp_path / "f.safetensors"
    code, printed = run_tool_with("features", *words, "--out", file)
    assert code == 0 and json.loads(printed.out)["features"] == str(file)
    stored = load_file(file)
    shapes = {"labels": (), "mean": (32,), "token": (32,)}
    assert stored.pop("train_places").tolist() == [*range(36)]
    assert {name: array.shape for name, array in stored.items()} == {
        f"{split}_{kind}": (number, *width)
        for split, number in (("train", 36), ("val", 18))
        for kind, width in shapes.items()
    }
    assert np.bincount(stored["val_labels"]).tolist() == [6, 6, 6] and stored["val_mean"].std() > 0.01

    # The probes find the same from it, of either feature, and compute none.
    every = ("--feature", "mean", "token", "both", "--epochs", "2")
    fresh = json.loads(run_tool_with("all", *words, *every)[1].out)
    alone = [
        json.loads(run_tool_with("knn", *words, "--k", "10", "--feature", name)[1].out) for name in every[1:4]
    ]
    assert [each["knn"][0]["knn_accuracy_percent"] for each in fresh["judged"]] == [
        each["knn_accuracy_percent"] for each in alone
    ]
    last = run_tool_with("knn", *words, "--k", "5", "--layer", "-1")[1].out
    assert json.loads(last) == json.loads(run_tool_with("knn", *words, "--k", "5")[1].out)
    monkeypatch.setattr(forward, "labelled_features", None)
    assert json.loads(run_tool_with("all", *words, *every, "--features", file)[1].out) == fresh

    # Those of anything else are refused.
    for differing, *other in (
        ("--exif_orientation", "--exif_orientation"),
        ("the model's weights", "--untrained", "--seed", "1"),
    ):
        code, printed = run_tool_with("knn", *words, "--features", file, *other)
        assert code == 2 and f"{file} holds features of other things: {differing} differ." in printed.err
    copy_tree(image_folders, tmp_path / "images")
    (tmp_path / "images" / "val" / "blue" / "1.jpg").unlink()
    words = ["--model", model_folder, "--features", file]
    words += ["--train", tmp_path / "images" / "train", "--val", tmp_path / "images" / "val"]
    code, printed = run_tool_with("knn", *words)
    assert code == 2 and "the images of --val, the labels of --val differ" in printed.err
    for content in (b"no features", (model_folder / "model.safetensors").read_bytes()):
        file.write_bytes(content)
        code, printed = run_tool_with("knn", *words)
        assert code == 2 and f"{file} is no file that `features` wrote" in printed.err


def test_mistakes_in_layers_are_sentences(run_tool, run_tool_with, model_folder, image_folders):
    sets = image_folders / "train", image_folders / "val"
    code, printed = run_tool(model_folder, *sets, "--layer", "1")
    assert code == 2 and "--layer 1: this model has layers 0 to 0, or -1" in printed.err
    code, printed = run_tool(model_folder, *sets, "--last", "2")
    assert code == 2 and "--last 2: this model has layers 0 to 0" in printed.err
    words = ["--model", model_folder, "--train", sets[0], "--val", sets[1]]
    code, printed = run_tool_with("features", *words)
    assert code == 2 and "features needs --out FILE.safetensors" in printed.err


def test_a_layer_is_what_hooks_see(image_folders):
    """The slow twin: the blocks' own outputs, then the model's norm."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=32, num_heads=2, num_classes=0
    ).eval()  # fmt: skip
    images, outputs = torch.randn(2, 3, 32, 32), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model.forward_features(images)
        tokens = [model.norm(output) for output in outputs]
    kinds = ("token", "mean")
    for layers, expected in (([0, 1, 2], tokens), ([1], tokens[1:2]), ([2], tokens[2:]), (None, tokens[2:])):
        found, _ = features(model, [(images, torch.zeros(2))], torch.device("cpu"), layers, kinds)
        for place, output in enumerate(expected):
            np.testing.assert_allclose(chosen(found, "mean", [place]), output[:, 1:].mean(1), atol=1e-5)
            np.testing.assert_allclose(chosen(found, "token", [place]), output[:, 0], atol=1e-5)
    assert chosen(
        features(model, [(images, torch.zeros(2))], torch.device("cpu"), [1, 2], kinds)[0], "both", [0, 1]
    ).shape == (2, 128)
    assert not torch.allclose(tokens[0], tokens[1], atol=0.1)


def test_blocks_of_a_vit_without_a_class_token():
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", **sizes).eval()
    batch = (torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    vectors, _ = features(model, [batch], torch.device("cpu"), layers=[0, 1])
    assert np.allclose(vectors["mean"][:, 1], model.forward_features(batch[0]).mean(1).detach(), atol=1e-6)


def test_a_file_of_several_blocks_gives_any_of_them(tmp_path):
    rng, file, key = np.random.default_rng(0), tmp_path / "f.safetensors", {"weights": "these"}
    train, val = ({kind: rng.normal(size=(n, 3, 4)) for kind in ("token", "mean")} for n in (5, 2))
    save(file, Judged(train, np.arange(5), val, np.arange(2)), [1, 4, 7], key, {"classes": 5})
    assert is_stored(file, key, [4, 7])
    judged, counts = load(file, [4, 7], ("mean",))
    np.testing.assert_array_equal(judged.val["mean"], val["mean"][:, 1:])
    np.testing.assert_array_equal(load(file, [1], ("token",))[0].train["token"], train["token"][:, :1])
    assert (judged.train_labels.tolist(), counts, list(judged.train)) == (
        [0, 1, 2, 3, 4],
        {"classes": 5},
        ["mean"],
    )
    with pytest.raises(ConfigError, match="holds features of layer 1, 4, 7, not of 3, 11"):
        is_stored(file, key, [3, 4, 11])


def test_an_export_is_judged_by_its_objectives_feature(monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay={"tag": "mae"}, depth=1)
    assert judged_feature(model) == "mean"
    monkeypatch.setattr(MAEConfig, "feature", "both")
    assert judged_feature(model) == "both"
    assert judged_feature(timm.create_model("vit_tiny_patch16_224", depth=1)) == "mean"


def test_the_teacher_itself_is_evaluated_by_the_same_tool(run_tool_with, image_folders, tmp_path):
    write_tower(tmp_path / "clip", "vit")
    (tmp_path / "recipe.yaml").write_text(f"teacher: {{name: 'local-dir:{tmp_path}/clip', img_size: 64}}\n")
    words = [
        "--teacher",
        tmp_path / "recipe.yaml",
        "--train",
        image_folders / "train",
        "--val",
        image_folders / "val",
        "--json",
    ]
    code, printed = run_tool_with("linear", *words)
    assert code == 0, printed.err
    assert 0 <= json.loads(printed.out)["linear_accuracy_percent"] <= 100
    code, printed = run_tool_with("knn", *words, "--feature", "token")
    assert code == 2 and "this model has no class token" in printed.err
    code, printed = run_tool_with("knn", *words, "--k", "5", "teacher.layer=9")
    assert code == 2 and "teacher.layer = 9" in printed.err


def test_everything_from_one_pass(run_tool_with, model_folder, image_folders, tmp_path):
    words = ["--model", model_folder, "--train", image_folders / "train", "--val", image_folders / "val"]
    out = tmp_path / "results.json"
    code, printed = run_tool_with("all", *words, "--epochs", "5", "--out", out, "--json")
    assert code == 0, printed.err
    results = json.loads(printed.out)
    assert results == json.loads(out.read_text())
    assert [each["k"] for each in results["knn"]] == [10, 20], "36 training images"
    fitted = [(each["solver"], each.get("batch_norm")) for each in results["linear"]]
    assert fitted == [("sgd", False), ("sgd", True), ("lbfgs", None)]
    own = ("knn", "linear", "effective_rank", "feature_cosine")
    basis = {key: value for key, value in results.items() if key not in own}
    assert 1 < results["effective_rank"] < 18 and results["feature_cosine"] < 1
    for command in (["knn", "--k", "10"], ["linear", "--solver", "sgd", "--epochs", "5"]):
        code, printed = run_tool_with(*command, *words, "--json")
        assert json.loads(printed.out) == results[command[0]][0] | basis
    code, printed = run_tool_with(
        "all", *words, "--epochs", "1", "--feature", "token", "--learning_rates", "0.01", "0.1"
    )
    assert len(printed.out.splitlines()) == 6 and "Effective rank " in printed.out
    assert "chosen on a tenth of the training images (0.01: " in printed.out and ", 0.1: " in printed.out


class Kept(Tokens):
    """Tokens that are there, in batches of 32."""

    def __init__(self, tokens, labels, alone):
        config = FinetuneConfig(train=TrainConfig(micro_batch_size=32))
        images = SimpleNamespace(classes=["a", "b", "c"])
        super().__init__(config, None, images, None, alone)
        self._kept = torch.from_numpy(tokens), torch.from_numpy(labels)

    def __len__(self):
        return len(self._kept[1])


def test_attention_finds_the_patch_that_tells_the_class(alone):
    """One patch of 16 has the class, in a few of its numbers; the others are noise that a mean drowns in."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    tokens = rng.normal(size=(600, 16, 8)).astype(np.float32)
    place = rng.integers(0, 16, 600)
    tokens[np.arange(600), place, :3] = 0
    tokens[np.arange(600), place, 3] = 6  # "look here"
    tokens[np.arange(600), place, labels] = 3
    sets = [Kept(tokens[part], labels[part], alone) for part in (slice(400), slice(400, 600))]
    state = torch.get_rng_state()
    found = attentive(*sets, 8, (1e-5, 1e-2), epochs=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.learning_rate == 1e-2 and found.accuracy > 90
    mean = tokens.mean(1)
    assert linear(mean[:400], labels[:400], mean[400:], labels[400:]) < found.accuracy - 15
    assert attentive(*sets, 8, (1e-2,), epochs=1) == attentive(*sets, 8, (1e-2,), epochs=1)
    sets[0]._kept[1][:] = torch.from_numpy(rng.permutation(labels[:400]))
    assert attentive(*sets, 8, (1e-2,), epochs=5).accuracy < 55
    with pytest.raises(DataError, match="19 training images are too few"):
        attentive(Kept(tokens[:19], labels[:19], alone), sets[1], 8)


def test_the_attentive_probe_finds_the_same_from_memory_and_computed_anew(
    run_tool_with, model_folder, image_folders, tmp_path
):
    copy_tree(image_folders, tmp_path)
    bad = tmp_path / "train" / "coral" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    words = ["--model", model_folder, "--train", tmp_path / "train", "--val", tmp_path / "val", "--json"]
    settings = ["--epochs", "3", "--learning_rates", "0.001", "0.01", "--batch_size", "8"]
    out = tmp_path / "a.json"
    code, printed = run_tool_with("attentive", *words, *settings, "--out", out)
    assert code == 0 and f"1 of 36, e.g. {bad}" in printed.err
    kept = json.loads(out.read_text())
    counts = {"train_images": 35, "train_unreadable": 1, "val_images": 18, "val_unreadable": 0, "kept": True}
    assert {name: kept[name] for name in counts} == counts
    assert len(kept["held_out_accuracy_percent"]) == 2 and kept["layer"] == 0
    anew = json.loads(run_tool_with("attentive", *words, *settings, "--memory_gb", "0")[1].out)
    assert anew == kept | {"kept": False}
    for options, says in (
        (["--layer", "1"], "--layer 1: this model has layers 0 to 0"),
        (["--feature", "mean"], "unrecognized arguments: --feature"),
        (["--max_bad_share", "0"], "more than the 0 that --max_bad_share"),
    ):
        code, printed = run_tool_with("attentive", *words, *options)
        assert code == 2 and says in printed.err


def test_the_attentive_probe_is_one_process(model_folder, image_folders):
    words = ["--model", model_folder, "--train", image_folders / "train", "--val", image_folders / "val"]
    done = start(sys.executable, *TORCHRUN, "--nproc_per_node=2", EVALUATE, "attentive", *words)
    assert done.returncode != 0
    assert "attentive runs in one process, not in 2: leave torchrun out." in done.stderr


@pytest.mark.parametrize(
    ("held_out", "end"),
    [
        ((70, 60, 50), "lowest"),
        ((50, 60, 70), "highest"),
        ((60, 70, 60), None),
        ((70, 70, 60), None),
        ((0, 0, 0), None),
    ],
)
def test_a_rate_at_an_end_of_those_tried_is_said(
    run_tool_with, model_folder, image_folders, monkeypatch, held_out, end
):
    tried = dict(zip((0.01, 0.1, 1.0), held_out))
    monkeypatch.setattr(
        probe, "linear_sgd", lambda *found, **settings: probe.Fitted(50.0, max(tried, key=tried.get), tried)
    )
    words = ["--model", model_folder, "--train", image_folders / "train", "--val", image_folders / "val"]
    code, printed = run_tool_with("linear", "--solver", "sgd", *words)
    assert code == 0, printed.err
    assert ("a better one may lie beyond" in printed.out) == bool(end)
    assert ("too small to choose by" in printed.out) == (held_out == (0, 0, 0))
    assert end is None or f"beyond the {end} of them: --learning_rates takes others" in printed.out


def test_mistakes_in_what_is_fitted_are_sentences(run_tool_with, model_folder, image_folders, tmp_path):
    words = ["--model", model_folder, "--train", image_folders / "train", "--val", image_folders / "val"]
    for options, says in (
        (["--learning_rates", "0.1", "0"], "0 must be above 0"),
        (["--learning_rates"], "expected at least one argument"),
        (["--epochs", "0"], "0 must be at least 1"), (["--solver", "adam"], "invalid choice"),
        (["--feature", "max"], "invalid choice"),
        (["--layer", "0", "--last", "1"], "not allowed with argument"),
        (["--layer", "first"], "first is neither a whole number nor all"),
        (["--out", tmp_path / "no" / "file"], "can't be written: name a file in a folder that is there"),
        (["--out", tmp_path], "can't be written"),
    ):  # fmt: skip
        code, printed = run_tool_with("linear", *words, *options)
        assert code == 2 and says in printed.err
