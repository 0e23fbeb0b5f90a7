"""docs/library.md, block after block; the notebooks; mistakes in a program of one's own as sentences."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from images import photos, write
from PIL import Image
from torch.testing import assert_close
from towers import write_tower

import mapet_ds
from mapet_ds.config.sections import REPOSITORY, Config
from mapet_ds.errors import ConfigError, ExportError, ShapeError
from mapet_ds.launch import claim
from mapet_ds.results.export import write_timm

TEXT = (REPOSITORY / "docs/library.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the page's blocks leave behind, in a folder that looks like make_demo's, and what they printed."""
    folder, printed = tmp_path_factory.mktemp("library"), []
    write(folder / "data/train", photos(40))
    write_tower(folder / "data/teacher", "resnet")
    names = {"print": lambda *words: printed.append(" ".join(map(str, words)))}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCKS:
            exec(block, names)
    return folder, names, printed


def test_the_page_works_as_it_stands(page):
    folder, names, printed = page
    assert printed[0] == "mapet 64 0.75" and printed[1].startswith("torch.Size([32, ")
    assert printed[-1] in TEXT
    view, tokens = (Image.open(folder / f"{name}.png") for name in ("view", "tokens"))
    assert view.size == (64, 64) and tokens.size == (224, 224)
    assert len(tokens.getcolors()) == len(names["ids"][0].unique())


def test_the_table_names_the_surface():
    shown = set(
        re.findall(r"`(\w+)[(`]", TEXT[TEXT.index("| from mapet_ds") : TEXT.index("`import mapet_ds`")])
    )
    assert {*mapet_ds.__all__} - {"__version__"} <= shown
    for name in mapet_ds.__all__:
        assert getattr(mapet_ds, name) is not None and name in dir(mapet_ds)
    with pytest.raises(AttributeError, match="no attribute 'load_recipes'; it has __version__, Codebook, "):
        mapet_ds.load_recipes  # noqa: B018


def test_importing_the_package_is_light():
    code = "import sys, mapet_ds; sys.exit(str({'torch', 'timm', 'numpy', 'nvidia'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


def test_pictures_and_tensors_give_the_same_batch(page):
    names = page[1]
    pixels = np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).movedim(2, 0)[None] / 255
    ours, theirs = (
        mapet_ds.make_batch(names["config"], images, names["target"])
        for images in (tensor, [Image.fromarray(pixels)])
    )
    assert_close(ours.images, theirs.images)
    assert_close(ours.teacher_images, theirs.teacher_images)
    back = np.asarray(mapet_ds.view_image(names["config"], ours.images[0]), float)
    whole = Image.fromarray(pixels[10:80]).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(back - np.asarray(whole, float)).mean() < 2


def test_ids_are_counted_without_a_process_group(page):
    target, ids = page[1]["target"], page[1]["ids"]
    target.note(ids)
    assert target.metrics()["codebook_used"] == len(ids.unique()) / 32


def test_what_does_not_fit_is_a_sentence(page):
    config, objective, batch, ids, draw = (
        page[1][name] for name in ("config", "objective", "batch", "ids", "draw")
    )
    images, mistakes = batch.images, []

    def says(sentence, work):
        with pytest.raises(ShapeError) as caught:
            work()
        mistakes.append(str(caught.value))
        assert sentence in mistakes[-1]

    says(
        "images have the shape [4, 3, 32, 64]; the student takes [B, 3, 64, 64].",
        lambda: objective(images[:, :, :32], ids, draw),
    )
    says(
        "target has the shape [3, 64]; 4 images of 64 patches want", lambda: objective(images, ids[:3], draw)
    )
    says("draw.mask is of 4 images, not 2", lambda: objective(images[:2], ids[:2], draw))
    says("make_batch takes pictures, or float", lambda: mapet_ds.make_batch(config, images[0]))
    says("ids are torch.int64 [4, 64]; token_image takes", lambda: mapet_ds.token_image(ids))
    says("The batch has no teacher_images", lambda: page[1]["target"](batch._replace(teacher_images=None)))
    conmim = mapet_ds.load_recipe(
        "demo_cpu", "objective=conmim", "conmim.bn_group=4", "conmim.projector_dim=8"
    )
    student = mapet_ds.build_objective(conmim, 256)
    keys = torch.zeros(6, 64, 256)
    says(
        "6 images are no multiple of conmim.bn_group = 4",
        lambda: student(torch.zeros(6, 3, 64, 64), keys, student.draw(0, 0, 6)),
    )
    assert len(set(mistakes)) == 7

    with pytest.raises(ConfigError, match="objective = dino is not known; there are: mapet"):
        mapet_ds.build_objective(Config(objective="dino"), 8)
    with pytest.raises(ConfigError, match="objective = dino is not known"):
        mapet_ds.build_target(Config(objective="dino"))


def test_a_folder_that_this_process_holds_is_refused_at_once(tmp_path):
    held = claim(tmp_path)
    with pytest.raises(
        ConfigError, match=r"is in use by process \d+ on .*, which is this one: delete the Run"
    ):
        claim(tmp_path)
    held.close()
    claim(tmp_path).close()


def test_an_export_is_loaded_with_its_transform(tmp_path):
    with pytest.raises(ExportError, match=r"is no export: it lacks config.json and model.safetensors. A run"):
        mapet_ds.load_export(tmp_path)
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, img_size=32, num_classes=0)
    write_timm(vit, tmp_path, {"input_size": (3, 32, 32)})
    model, transform = mapet_ds.load_export(tmp_path)
    picture = Image.new("RGB", (50, 40))
    assert model.forward_features(transform(picture)[None]).shape == (1, 5, 12)


@pytest.mark.slow
def test_the_notebooks_run(tmp_path, monkeypatch):
    """Both in one folder, with few steps; what they show when they are read is small, and no mistake."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    for name, number in {"TEACHER_STEPS": 2, "STEPS": 3, "EPOCHS": 2}.items():
        monkeypatch.setenv(name, str(number))
    size = 0
    for name in ("first_steps", "own_objective"):
        path = REPOSITORY / f"examples/{name}.ipynb"
        notebook, size = nbformat.read(path, 4), size + path.stat().st_size
        shown = pictures(notebook)
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=400, kernel_name="python3", resources=resources).execute()
        assert pictures(notebook) == shown > 0
    assert size < 300_000
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open()] == [5, 10, 15, 20]


def pictures(notebook):
    """How many pictures a notebook shows; none of its outputs is a mistake."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert all(output.output_type != "error" for output in outputs)
    return sum("image/jpeg" in output.get("data", {}) for output in outputs)
