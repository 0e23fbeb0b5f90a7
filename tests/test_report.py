"""The page about a run: its figures are the run's, hostile names are inert, what is missing is said."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forked import start
from line import make_line, pretrain
from PIL import Image

from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.recipe import load_config
from mapet_ds.data.index import open_index
from mapet_ds.data.loader import Loader
from mapet_ds.methods import METHODS, build_objective, build_target
from mapet_ds.results.collapse import effective_rank
from mapet_ds.results.report import sample as report
from mapet_ds.targets.codebook import Codebook
from mapet_ds.training import checkpoint
from mapet_ds.vit import build_vit
from tools import report as program

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CPU = torch.device("cpu")
IMAGES = 16
"""Two steps of the run."""
SETTINGS = {
    "mapet": [],
    "beit": ["beit.hidden_share=0.9"],
    "mvp": ["teacher.features=projected", "mvp.hidden_share=0.9"],
    "saim": ["model.layer_scale=null", "saim.target=features", "saim.loss=cosine"],
    "conmim": ["conmim.bn_group=4", "conmim.projector_dim=32"],
    "cae": ["cae.regressor_depth=2", "cae.decoder_depth=1"],
    "mae": ["mae.decoder_depth=2", "mae.decoder_width=16", "mae.decoder_heads=2"],
}
"""Of each objective. With so large a share, rectangles hide fewer patches in some images than in others."""


class Page(HTMLParser):
    """Elements with their attributes, and the text by the id of the last heading and by class."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.sections, self.words, self.open = [], {}, {}, []
        self.here = "summary"
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "h2":
            self.here = attributes["id"]
        if tag not in ("meta", "img", "br"):
            self.open.append((tag, attributes.get("class")))

    def handle_endtag(self, tag):
        while self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        self.sections[self.here] = self.sections.get(self.here, "") + data
        for _, name in self.open:
            self.words.setdefault(name, []).append(data)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_line(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def run(recipe):
    """A run stopped after 4 of 12 steps, a checkpoint at 3 beside the one at 4."""
    done = pretrain(recipe, 1, "train.stop_at_step=4")
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.parent / "run"


@pytest.fixture
def make_page(tmp_path, monkeypatch):
    """The program, in this process: the page of these runs, and its text."""

    def make(*runs, sample=IMAGES, out=tmp_path / "page.html"):
        sizes = f"--images 3 --sample {sample} --patches 4".split()
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, runs), "--out", str(out), *sizes])
        assert program.main() == 0
        text = out.read_text()
        return Page(text), text

    return make


def copy(run, to):
    return shutil.copytree(run, to, ignore=shutil.ignore_patterns("tensorboard"))


def edit(path, change):
    """Change what a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def untrained(recipe, name, spoil=lambda objective: None):
    """A checkpoint at step 0 of a run of this objective: its folder, settings, target and objective."""
    folder = recipe.parent / f"fresh_{name}"
    config = load_config(recipe, [f"objective={name}", f"run_dir={folder}", *SETTINGS[name]])
    target = build_target(config, CPU)
    objective = build_objective(config, target.dim)
    spoil(objective)
    index = open_index(config.data.train, folder / "index")
    identity = checkpoint.identity(config, index.fingerprint, target.identity)
    record = {"step": 0, "skipped": [], "config": config.to_dict(), "identity": identity, "versions": {}}
    weights = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    checkpoint.save(folder, record, {"model": weights, "target": target.state_dict()})
    return folder, config, target, objective.eval()


def replay(config, target, objective):
    """The run's first step by the parts of the trainer alone: batch, draw, target, loss."""
    train = dataclasses.replace(config.train, micro_batch_size=config.train.global_batch_size)
    config = dataclasses.replace(config, train=train)
    index, teacher = open_index(config.data.train, Path(config.run_dir) / "index"), target.teacher_view
    loader = Loader(config, index, student=True, teacher=teacher, rank=0, world_size=1, local_rank=0)
    batch = next(loader)
    loader.close()
    draw, wanted = objective.draw(0, 0, len(batch.index)), target(batch)
    with torch.no_grad():
        return batch, draw, wanted, objective(batch.images, wanted, draw)


def test_the_page_of_a_run_has_its_figures(recipe, run, make_page):
    page, text = make_page(run, sample=8)
    config = load_config(recipe, [])
    target = build_target(config, CPU)
    objective = build_objective(config, target.dim).eval()
    objective.load_state_dict(checkpoint.newest(run).load("model"))
    _, draw, ids, loss = replay(config, target, objective)
    hits = {}
    for image in range(8):
        for patch in range(config.num_patches):
            rank = int(draw.order[image, patch])
            if rank >= objective.num_visible:
                hits.setdefault(rank, []).append(bool(loss.prediction[image, patch] == ids[image, patch]))
    cells = [word for word in page.words["by-rank"] if word.strip()]
    assert cells[:3] == ["rank", "right", "in the top 5"]
    given = {int(cells[i]): float(cells[i + 1]) for i in range(3, len(cells), 3)}
    assert given == pytest.approx({rank: np.mean(values) for rank, values in hits.items()}, abs=1e-4)
    assert int(page.words["dead"][0]) == (np.bincount(ids.flatten(), minlength=16) == 0).sum()
    assert "Step 4, mean of 8 images" in page.sections["predictions"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['loss']:.4g} at step 4" in text and f"{last['grad_norm']:.4g} at step 4" in text
    assert "not finished" in page.sections["summary"]
    settings = yaml.safe_load("".join(page.words["settings"]))
    assert settings == yaml.safe_load((run / "config.yaml").read_text())
    assert "mapet_ds/pretrain.py" in page.sections["environment"]


def test_the_page_stands_alone_and_is_the_same_again(run, make_page):
    page, text = make_page(run)
    sources = ("src", "href", "xlink:href", "srcset", "data", "action")
    loads = [a[key] for _, a in page.elements for key in sources if key in a]
    assert loads and all(load.startswith(("data:image/png;base64,", "#")) for load in loads)
    assert not re.search(r"url\((?!#)|@import", text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    assert all("alt" in a for tag, a in page.elements if tag == "img")
    assert all(a.get("aria-label") for tag, a in page.elements if tag == "svg")
    names = [a["id"] for tag, a in page.elements if "id" in a]
    assert len(names) == len(set(names))
    links = {a["href"][1:] for tag, a in page.elements if tag == "a"}
    assert links == {a["id"] for tag, a in page.elements if tag in ("h2", "header")}
    assert make_page(run)[1] == text


@pytest.mark.parametrize("name", METHODS)
def test_the_sample_is_what_the_objective_predicts(recipe, name):
    folder, config, target, objective = untrained(recipe, name)
    whole = report.take_sample(report.open_trained(folder), IMAGES)
    assert whole.views.shape == (IMAGES, 32, 32, 3) and len(whole.index.unique()) == IMAGES
    sample = report.Sample(*(None if field is None else field[:8] for field in whole))
    batch, draw, wanted, loss = replay(config, target, objective)
    assert torch.equal(batch.index, sample.index) and torch.equal(draw.mask, sample.mask)

    def mean(values):
        return pytest.approx(np.mean(report.mean_by_image(sample, values)), abs=1e-5)

    if name in ("mapet", "beit", "cae"):
        assert torch.equal(sample.prediction, loss.prediction) and torch.equal(sample.ids, wanted)
        assert sample.hit.any() and (sample.top5 | ~sample.hit).all()
        assert loss.metrics["token_accuracy"].item() == mean(sample.hit)
    else:
        assert torch.equal(sample.distance.isnan(), ~sample.mask)
    if name == "mvp":
        assert len(set(sample.mask.sum(dim=1).tolist())) > 1
        assert 1 - loss.metrics["cosine"].item() == mean(sample.distance)
    if name == "saim":
        assert loss.loss.item() / 2 == mean(sample.distance)
    if name == "conmim":
        assert loss.metrics["match_accuracy"].item() == mean(sample.hit)


@pytest.mark.parametrize("name", ["mapet", "beit"])
def test_the_top_five_are_of_the_patch_itself(recipe, name):
    """A head that always ranks the ids 7, 8, .. 15, 0, .. 6."""

    def spoil(objective):
        objective.head.weight.data.zero_()
        objective.head.bias.data.copy_(-((torch.arange(16) - 7) % 16).float())

    sample = report.take_sample(report.open_trained(untrained(recipe, name, spoil)[0]), IMAGES)
    assert torch.equal(sample.hit, (sample.ids == 7) & sample.mask)
    assert torch.equal(sample.top5, (sample.ids >= 7) & (sample.ids < 12) & sample.mask)
    assert sample.top5.any()


def test_codes_and_their_patches(run):
    sample = report.take_sample(report.open_trained(run), IMAGES)
    counts = report.code_counts(sample, 16)
    assert counts.tolist() == [int((sample.ids == code).sum()) for code in range(16)]
    codes = report.codes_to_show(counts, 5)
    assert codes[0] == counts.argmax() and counts[codes[-1]] == counts[counts > 0].min()
    places = report.patches_of(sample, codes[0], 4)
    distances = [float(sample.code_distance[place]) for place in places]
    of_images = sample.code_distance.where(sample.ids == codes[0], torch.inf).amin(dim=1)
    assert distances == sorted(of_images.tolist())[: len(places)]
    tile = report.surroundings(sample.views[0], 5, 8)  # row 1, column 1 of 4 x 4 patches
    assert np.array_equal(tile[8:16, 8:16], sample.views[0][8:16, 8:16])
    assert np.array_equal(tile[0], (sample.views[0][0, :24].numpy() * 0.45).astype(np.uint8))


def test_attention_is_that_of_the_last_block(recipe):
    def sharpen(objective):
        objective.vit.blocks[-1].attn.qkv.weight.data.mul_(20)

    folder, config, target, objective = untrained(recipe, "mapet", sharpen)
    views, maps, tokens = report.look(report.open_trained(folder), 3)
    images, vit = replay(config, target, objective)[0].images[:3], objective.vit
    with torch.no_grad():
        rows = vit._pos_embed(vit.patch_embed(images))
        for block in vit.blocks[:-1]:
            rows = block(rows)
        last = vit.blocks[-1]
        parts = last.attn.qkv(last.norm1(rows)).chunk(3, dim=2)
        q, k, _ = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in parts)
        weights = (q @ k.transpose(2, 3) / 4).softmax(dim=-1)
        assert torch.allclose(tokens, vit.forward_features(images)[:, 1:], atol=1e-5)
    assert torch.allclose(maps, weights[:, :, 1:, 1:].mean(dim=2), atol=1e-5)
    assert not torch.allclose(maps, weights[:, :, 0, 1:], atol=1e-2)  # those of the class token's query
    mean, std = (torch.tensor(values) for values in (config.data.mean, config.data.std))
    assert torch.allclose(views / 255, (images.movedim(1, 3) * std + mean).clamp(0, 1), atol=0.51 / 255)


def test_colours_of_features_are_principal_components_of_fixed_sign():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2 * 50, 3)) * (9, 3, 1)
    scores -= scores.mean(0)
    scores = np.linalg.qr(scores)[0] * (90, 30, 10)  # uncorrelated, so that they are the components
    axes = np.linalg.qr(rng.normal(size=(6, 3)))[0].T
    axes *= np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])[:, None]
    patches = torch.from_numpy(scores @ axes + 5).view(2, 50, 6)
    colours = report.principal_colours(patches)
    for each in range(3):
        low, high = np.quantile(scores[:, each], (0.02, 0.98))
        expected = 255 * ((scores[:, each] - low) / (high - low)).clip(0, 1)
        assert np.abs(colours[..., each].flatten().numpy() - expected).max() < 0.6
    flat = torch.from_numpy(scores[:, :1] @ axes[:1]).view(2, 50, 6)
    assert (report.principal_colours(flat)[..., 1:] == 128).all(), "components without spread are grey"
    assert (report.principal_colours(torch.ones(1, 4, 8)) == 128).all()


def test_images_alike_are_those_of_the_nearest_features(recipe, run):
    trained = report.open_trained(run)
    alike = report.look_alike(trained, 3, 12)
    loader = Loader(
        trained.config, trained.index, student=True, teacher=None, rank=0, world_size=1, local_rank=0
    )
    images = torch.cat([next(loader).images for _ in range(12)])[:12]
    loader.close()
    vit = build_vit(trained.config.model).eval()
    vit.load_state_dict(trained.vit)
    with torch.no_grad():
        rows = vit.forward_features(images)[:, 1:].mean(1)
    for i in range(3):
        cosine = torch.nn.functional.cosine_similarity(rows[i], rows, dim=1)
        cosine[i] = -2
        assert alike.nearest["trained"][i].tolist() == cosine.argsort(descending=True)[:5].tolist()
    assert alike.rank["trained"] == pytest.approx(effective_rank(rows.numpy()), rel=1e-3)
    assert not torch.equal(alike.nearest["trained"], alike.nearest["fresh"]), "other weights, other places"
    assert alike.views.shape[0] == 12


def test_hostile_names_are_inert(run, make_page, tmp_path):
    folder = copy(run, tmp_path / "<i>run&")
    evil = "<script>alert(1)</script>"
    row = f'3\t/data/{evil}.jpg\t"><img src=x onerror=alert(2)>'
    (folder / "quarantine.tsv").write_text(f"# unreadable images\n{row}\n")
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 5, f"{evil}_$x^{{2}}": 0.5}) + "\n")
    page, text = make_page(folder)
    assert "<script" not in text and "<i>" not in text and "<img src=x" not in text
    assert f"/data/{evil}.jpg" in page.sections["unreadable"]
    assert "1 met so far" in page.sections["unreadable"]
    assert evil in page.sections["curves"]
    assert not any(key.startswith("on") for _, a in page.elements for key in a)


def test_what_is_gone_is_said_in_its_section(recipe, run, make_page, tmp_path):
    folder = copy(run, tmp_path / "moved")
    record = folder / "checkpoints" / "step_00000004" / "run.json"
    edit(record, lambda run: run["config"]["tokenizer"].update(path="/nowhere/codebook.safetensors"))
    page, _ = make_page(folder)
    assert "/nowhere/codebook.safetensors' is not a file" in page.sections["predictions"]
    assert "/nowhere/codebook.safetensors' is not a file" in page.sections["codebook"]
    assert "times the average patch's" in page.sections["attention"]
    assert "patch features" in page.sections["attention"]
    codebook = Codebook.load(recipe.parent / "codebook.safetensors")
    Codebook(codebook.centroids + 1, codebook.provenance).save(tmp_path / "other.safetensors")
    edit(record, lambda run: run["config"]["tokenizer"].update(path=str(tmp_path / "other.safetensors")))
    assert "not that of the run any more: target.codebook" in make_page(folder)[0].sections["predictions"]
    edit(folder / "index" / "index.json", lambda index: index.update(root="/nowhere/train"))
    page, _ = make_page(folder)
    for name in ("predictions", "codebook", "attention"):
        assert "/nowhere/train is not a folder" in page.sections[name]
    assert "Learning rate" in page.sections["curves"]


def test_runs_without_a_checkpoint_or_of_labels_give_their_curves(run, make_page, tmp_path):
    early = copy(run, tmp_path / "early")
    shutil.rmtree(early / "checkpoints")
    with (early / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 5, "knn_accuracy_percent": 41.5}\n{"step": 6, "lo')  # the last is being written
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.yaml").write_text(yaml.safe_dump(FinetuneConfig().to_dict()))
    with (tuned / "metrics.jsonl").open("w") as lines:
        for step in (1, 2):
            line = {"step": step, "loss": 2 / step, "val_top1": 10.0 * step, "val_top5": 20.0 * step}
            lines.write(json.dumps(line) + "\n")
    page, text = make_page(early, tuned)
    assert page.sections["predictions"].count("no checkpoint yet") == 1, "fine-tuning has no tokens"
    assert "k-NN accuracy, %" in page.sections["curves"] and "41.5 at step 5" in text
    assert "val top5: 20 at step 1, 40 at step 2" in text
    assert "None" not in page.sections["summary"]


def test_runs_are_compared_by_the_real_command(run, tmp_path):
    other = copy(run, tmp_path / "other")
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["optim"]["lr"] = 0.125
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "both.html"
    done = start(sys.executable, "tools/report.py", run, other, "--out", out, "--sample", 8, "--images", 2)
    assert done.returncode == 0, done.stderr
    assert "2 runs" in done.stdout
    page = Page(out.read_text())
    assert [word for word in page.words["differing"] if word.strip()][-3:] == ["optim.lr", "0.002", "0.125"]
    assert page.sections["settings"].index("optim.lr") < page.sections["settings"].index("config.yaml")
    assert page.sections["predictions"].count("Step 4, mean of 8 images") == 2


def test_mistakes_end_with_a_sentence(run, tmp_path, monkeypatch, capsys):
    done = start(sys.executable, "tools/report.py", tmp_path, "--out", tmp_path / "page.html")
    assert done.returncode == 2
    assert "is not the folder of a run" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "--out", str(tmp_path / "no" / "page.html")])
    assert program.main() == 2
    assert "name a file in a folder" in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    monkeypatch.setattr(sys, "argv", ["report.py", str(damaged), "--out", str(tmp_path / "page.html")])
    lines = ("{1}\n", "3\n", '{"loss": 1}\n', '{"step": 1, "epoch": "x"}\n')
    others = ("config.yaml", "data: null"), ("config.yaml", "3"), ("environment.json", '{"versions": ["a"]}')
    for name, text in [*(("metrics.jsonl", line) for line in lines), *others]:
        (damaged / "metrics.jsonl").write_text("")
        (damaged / name).write_text(text)
        assert program.main() == 2
        assert f"The records of {damaged} can't be read" in capsys.readouterr().err
        (damaged / name).unlink()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
def test_a_browser_shows_it_and_asks_for_nothing_else(run, make_page, tmp_path):
    _, text = make_page(run)
    control = text.replace("<main>", '<main><img src="http://example.com/a.png" alt="">')
    for name, page, quiet in (("page", text, True), ("control", control, False)):
        path, shot = tmp_path / f"{name}.html", tmp_path / f"{name}.png"
        path.write_text(page)
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        words += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}/{name}"]
        words += ["--window-size=1300,2500", f"--screenshot={shot}", path.as_uri()]
        done = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=200)
        assert ("CONSOLE" not in done.stderr) == quiet, done.stderr
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    assert (pixels.reshape(-1, 3) == pixels[0, 0]).all(axis=1).mean() < 0.95
