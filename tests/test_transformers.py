"""transformers opens what is exported, and computes what timm computes."""

import json

import pytest
import timm
import torch
from images import photos, write
from test_export import MODELS, write_checkpoint

from mapet_ds.config.finetune import ClassifierConfig, FinetuneConfig
from mapet_ds.finetuning.classifier import build_model, export_classifier
from mapet_ds.results.export import evaluation_data, export_timm, read_vit
from mapet_ds.training.checkpoint import newest

transformers = pytest.importorskip("transformers")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An export of pre-training."""
    folder = tmp_path_factory.mktemp("plain")
    write_checkpoint(folder / "run", MODELS["patch4"])
    return export_timm(folder / "run", folder / "timm").folder


@pytest.fixture(scope="module")
def classifier(plain):
    """An export of fine-tuning from it, with a head for three classes."""
    config = FinetuneConfig(model=ClassifierConfig(path=str(plain), img_size=32, head_scale=1.0))
    torch.manual_seed(1)
    vit, _ = build_model(config.model, 3)
    data_config = evaluation_data(read_vit(newest(plain.parent / "run"))[0])
    export_classifier(config, vit.state_dict(), ["cat", "dog", "owl"], data_config, plain.parent / "fine")
    return plain.parent / "fine"


def timm_model(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@torch.no_grad()
def test_features_are_timms(plain):
    model = transformers.AutoModel.from_pretrained(plain).eval()
    own = timm_model(plain)
    found = model(pixel_values=IMAGES)
    assert (found.last_hidden_state - own.forward_features(IMAGES)).abs().max() < 1e-6
    assert (found.pooler_output - own(IMAGES)).abs().max() < 1e-6
    assert own.num_classes == 0 and own.num_features == 32


@torch.no_grad()
def test_logits_are_timms_and_classes_have_their_names(classifier):
    model = transformers.AutoModelForImageClassification.from_pretrained(classifier).eval()
    own = timm_model(classifier)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"} and own.num_classes == 3
    assert (model(pixel_values=IMAGES).logits - own(IMAGES)).abs().max() < 1e-6


def test_the_pipeline_classifies_a_file(classifier, tmp_path):
    write(tmp_path, photos(1))
    photo = next(tmp_path.rglob("*.jpg"))
    found = transformers.pipeline("image-classification", model=str(classifier))(str(photo))
    assert {line["label"] for line in found} == {"cat", "dog", "owl"}
    assert sum(line["score"] for line in found) == pytest.approx(1, abs=1e-5)


def test_an_older_folder_is_read_as_before(classifier, tmp_path):
    """Earlier exports named the number of classes among model_args, and the classes in pretrained_cfg."""
    description = json.loads((classifier / "config.json").read_text())
    description["model_args"]["num_classes"] = description["num_classes"]
    description["pretrained_cfg"]["label_names"] = description.pop("label_names")
    (tmp_path / "config.json").write_text(json.dumps(description))
    (tmp_path / "model.safetensors").write_bytes((classifier / "model.safetensors").read_bytes())
    old, new = timm_model(tmp_path), timm_model(classifier)
    assert old.pretrained_cfg["label_names"] == new.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]
    with torch.no_grad():
        assert torch.equal(old(IMAGES), new(IMAGES))
