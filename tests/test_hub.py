"""An export's card says where the weights are from, nothing of the machine; what is pushed is the export."""

import inspect
import json
import runpy
import subprocess
import sys

import pytest
import yaml
from forked import ENVIRONMENT
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from test_export import MODELS, TOOL, write_checkpoint

from mapet_ds.config.sections import Config, ModelConfig
from mapet_ds.results import card as hub
from mapet_ds.results.card import model_card
from mapet_ds.results.export import export_timm
from mapet_ds.training.checkpoint import newest

SECRET = "somebodys-home"


@pytest.fixture
def run(tmp_path):
    """A run whose settings name folders of a machine, and whose identity is a k-CLIP run's."""
    write_checkpoint(tmp_path / "run", MODELS["patch4"], step=5)
    path = newest(tmp_path / "run").path / "run.json"
    run = json.loads(path.read_text())
    run["config"]["data"]["train"] = f"/{SECRET}/imagenet/train"
    run["config"]["teacher"] |= {"name": f"local-dir:/{SECRET}/demo_teacher", "weights": f"/{SECRET}/x.pt"}
    run["config"]["tokenizer"]["path"] = run["config"]["run_dir"] = f"/{SECRET}/codebook.safetensors"
    run["config"]["model"]["init_from"] = f"/{SECRET}/vit_from_before"
    run |= {
        "images": 12345, "versions": {"torch": "2.14.1"},
        "identity": {
            "objective": "mapet", "train.global_batch_size": 2048,
            "model.init_from": f"/{SECRET}/vit_from_before",
            "init_from.sha256": "b" * 64, "data.fingerprint": "f" * 64,
            "target.teacher.sha256": "c" * 64, "target.codebook": "d" * 64,
        },
    }  # fmt: skip
    path.write_text(json.dumps(run))
    return tmp_path / "run"


def test_the_card_names_everything_by_value_and_no_folder(run, tmp_path):
    export = export_timm(run, tmp_path / "out", license="apache-2.0", repository="me/vit")
    text = (tmp_path / "out" / "README.md").read_text()
    assert SECRET not in text and str(tmp_path) not in text
    data = ModelCard(text).data  # the hub's own reader
    assert (data.library_name, data.license, data.base_model) == ("timm", "apache-2.0", None)
    assert "mapet" in data.tags
    for row in (
        "| steps | 5 of 1809 |", "| images per step | 2048 |", "| data | 12345 images, `train` |",
        "| teacher | demo_teacher |",
        f"| fingerprint of the data | {'f' * 64} |", "| began from | vit_from_before |",
        f"| sha256 of these | {'b' * 64} |",
        f"| sha256 of the teacher | {'c' * 64} |", f"| sha256 of the codebook | {'d' * 64} |",
        "| weights | student |",
        f"| sha256 of the checkpoint | {newest(run).run['files']['model.safetensors']} |",
        "| versions | torch 2.14.1 |",
        f"to the run's | {export.difference:.3g} |", 'timm.create_model("hf-hub:me/vit", pretrained=True)',
    ):  # fmt: skip
        assert row in text
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert settings == {
        "objective": "mapet", "train.global_batch_size": 2048, "model.init_from": "vit_from_before",
        "data.fingerprint": "f" * 64
    }  # fmt: skip


def test_what_a_card_cannot_know_it_leaves_out(tmp_path):
    """Of a checkpoint of random weights without identity; license and repository are the user's to state."""
    write_checkpoint(tmp_path / "run", MODELS["patch4"])
    export_timm(tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(text).data.license is None and "Not stated" in text
    assert "hf-hub:USER/NAME" in text and "| began from | fresh weights |" in text
    assert "None" not in text and text.count("sha256") == 1  # the checkpoint's


def test_a_tag_is_the_base_model_and_a_public_teacher_is_named():
    config = Config(model=ModelConfig(init_from="timm:vit_base_patch16_224.augreg_in21k"))
    run = {"step": 1, "files": {"model.safetensors": "a"}, "identity": {"target.teacher.sha256": "c"}}
    text = model_card(run, config, "student", 0.0)
    assert ModelCard(text).data.base_model == "timm/vit_base_patch16_224.augreg_in21k"
    assert "| teacher | RN50x64, openai |" in text and "No labels" not in text
    assert "what its teacher and the weights that it began from had seen, labels or captions, is not" in text
    own = model_card(run | {"identity": {}}, Config(objective="mae"), "student", 0.0)
    assert "No labels took part." in own and "teacher" not in own.partition("## License")[0]


def push(run, out, monkeypatch, capsys, *words):
    """Exit code, what it prints and what it complains of, in this process."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(run), str(out), "--push_to_hub", *words])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(TOOL), run_name="__main__")
    return exit.value.code, *capsys.readouterr()


def test_the_command_pushes_the_export(run, tmp_path, monkeypatch, capsys):
    calls = []

    class Hub(HfApi):
        """The hub's own interface, but for the two calls that reach out."""

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))
            return RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *args, **options):
            given = inspect.signature(HfApi.upload_folder).bind(self, *args, **options).arguments
            here = sorted(path.name for path in given["folder_path"].iterdir())
            sent = filter_repo_objects(here, allow_patterns=given["allow_patterns"])
            calls.append(("upload", given["repo_id"], {name: (out / name).stat().st_size for name in sent}))

    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_made_up")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("not for the hub")
    code, says, error = push(run, out, monkeypatch, capsys, "me/vit", "--private", "--license", "cc-by-4.0")
    assert code == 0, error
    assert says.endswith("Pushed to https://huggingface.co/me/vit\n")
    sizes = {name: (out / name).stat().st_size for name in ("README.md", "config.json", "model.safetensors")}
    assert calls == [("create", "me/vit", {"private": True, "exist_ok": True}), ("upload", "me/vit", sizes)]
    assert "license: cc-by-4.0" in (out / "README.md").read_text()


def test_without_a_token_or_with_a_wrong_name_nothing_is_done(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    for name, says in (
        ("me/vit", "needs a token that may write: `hf auth login`"),
        ("a/b/c", "the hub names models USER/NAME"),
        ("vit", "the user is missing"),
    ):  # fmt: skip
        code, _, error = push(run, tmp_path / "out", monkeypatch, capsys, name)
        assert code == 2 and says in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_without_a_network_the_export_stays_and_a_sentence_says_so(run, tmp_path):
    environment = {**ENVIRONMENT, "HF_TOKEN": "hf_made_up", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, TOOL, run, tmp_path / "out", "--push_to_hub", "me/vit"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{tmp_path / 'out'} was exported, but not pushed to me/vit: " in done.stderr
    assert (tmp_path / "out" / "README.md").is_file()


def test_an_export_into_a_closed_pipe_is_no_traceback(run, tmp_path):
    words = f"{sys.executable} {TOOL} {run} {tmp_path / 'out'} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "roken pipe" not in done.stderr
    assert (tmp_path / "out/model.safetensors").is_file()
