"""An ONNX graph computes what timm's model does, for any number of images, or nothing is written."""

import importlib.util
import runpy
import sys

import pytest
import timm
import torch
from test_init_from import write_source

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import ConfigError

TOOL = REPOSITORY / "tools" / "export_onnx.py"


@pytest.fixture(scope="module")
def tool():
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="ONNX is optional: pip install -e '.[onnx]'")
    return runpy.run_path(str(TOOL))


def run_graph(path, images):
    """By name, what the graph makes of images."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX is optional: pip install -e '.[onnx]'")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {"images": images.numpy()}))))


@pytest.mark.parametrize(
    ("name", "classes", "fp16"),
    [
        ("vit_tiny_patch16_224", 0, False),
        ("vit_tiny_patch16_224", 5, True),
        ("beit_base_patch16_224", 5, False),
    ],
)
def test_the_graph_is_the_model(tmp_path, tool, name, classes, fp16):
    write_source(
        tmp_path / "timm",
        name=name,
        num_classes=classes,
        init_values=0.5,
        global_pool="avg" if classes else "token",
    )
    found = tool["export_onnx"](tmp_path / "timm", tmp_path / "deep" / "vit.onnx", fp16)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["vit.onnx"]
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        features = model.forward_features(images)
        expected = {"features": features, "embedding": model.forward_head(features, pre_logits=True)}
        expected |= {"logits": model(images)} if classes else {}
    given = run_graph(tmp_path / "deep" / "vit.onnx", images)
    assert given.keys() == expected.keys() == found.keys()
    for name, output in given.items():
        assert output.dtype == torch.float32 and expected[name].std() > 0.1
        torch.testing.assert_close(output, expected[name], atol=0.05 if fp16 else 1e-4, rtol=0)


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, tool, monkeypatch):
    write_source(tmp_path / "timm")
    forward = timm.models.VisionTransformer.forward_head

    def traced(self, features, pre_logits=False):
        return forward(self, features, pre_logits) * (1.001 if torch.compiler.is_exporting() else 1.0)

    monkeypatch.setattr(timm.models.VisionTransformer, "forward_head", traced)
    with pytest.raises(
        ConfigError, match=r"Nothing was written: onnxruntime's outputs differ .* embedding 0\.00"
    ):
        tool["export_onnx"](tmp_path / "timm", tmp_path / "out" / "vit.onnx", False)
    assert [path.name for path in tmp_path.iterdir()] == ["timm"]


@pytest.mark.parametrize(
    ("absent", "says"),
    [
        ("onnxscript", "ONNX needs onnxscript, not installed here: python -m pip install -e '.[onnx]'"),
        (
            None,
            "empty is no timm model: it lacks config.json and model.safetensors. "
            "tools/export_timm.py RUN OUT writes one.",
        ),
    ],
)
def test_mistakes_are_sentences(tmp_path, monkeypatch, capsys, absent, says):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else "there")
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path / "empty"), str(tmp_path / "out.onnx")])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(TOOL), run_name="__main__")
    message = capsys.readouterr().err
    assert exit.value.code == 2 and says in message and len(message.splitlines()) == 1
    assert not (tmp_path / "out.onnx").exists()
