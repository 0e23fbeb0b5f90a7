"""--knobs lists every knob, --check answers without a launcher, and a run needs no git."""

import json
import os
import signal
import subprocess
import sys

import pytest

from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.knobs import describe, knobs_of, known_keys
from mapet_ds.config.sections import REPOSITORY, Config, DataConfig
from mapet_ds.config.segment import SegmentationConfig
from mapet_ds.errors import ConfigError
from mapet_ds.training import record
from mapet_ds.training.record import write_record

PROGRAMS = {
    "mapet_ds/pretrain.py": Config,
    "tools/finetune.py": FinetuneConfig,
    "tools/segment.py": SegmentationConfig,
}
RECIPE = ["--config", "mapet_ds/recipes/mapet_vitb16.yaml", "--deepspeed_config", "ds_configs/zero2.json"]


def run(*words, **environment):
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("settings", PROGRAMS.values(), ids=lambda settings: settings.__name__)
def test_every_knob_has_a_type_a_default_and_a_meaning(settings):
    for name, knob in knobs_of(settings).items():
        assert knob.text.endswith((".", ")")) and len(knob.text) > 10 and knob.kind, name


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_knobs_are_listed(program):
    listed = run(program, "--knobs").stdout
    for key in known_keys(PROGRAMS[program]):
        assert f"\n{key} = " in f"\n{listed}", key
    optim = run(program, "--knobs", "optim")
    assert (optim.returncode, optim.stderr) == (0, "")
    keys = [key for key in known_keys(PROGRAMS[program]) if key.startswith("optim.")]
    assert f"\n{optim.stdout}".count("\noptim.") == len(keys)
    wrong = run(program, "--knobs", "optimizer")
    assert wrong.returncode == 2 and "no such section or knob; there are run_dir, " in wrong.stderr


def test_what_a_knob_may_be_is_said_in_words():
    text = describe(Config)
    assert "optim.lr = 0.0015   (number > 0)\n    Learning rate" in text
    assert "train.spike_factor = 1.5   (number > 1 or null)" in text
    assert 'resume = "auto"   (auto | never)' in text
    assert "optim.betas = [0.9, 0.999]   (2 values, each: number >= 0, <= 1)" in text
    text = "Passes over the data set; the number of steps is rounded up."
    epochs = f"train.epochs = 300.0   (number > 0)\n    {text}"
    assert describe(Config, "train.epochs") == epochs


@pytest.fixture
def sound(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "codebook.safetensors").touch()
    words = [f"data.train={tmp_path}/images", f"tokenizer.path={tmp_path}/codebook.safetensors"]
    return [*RECIPE, *words, f"run_dir={tmp_path}/run"]


def test_settings_are_checked_without_a_launcher(sound, tmp_path):
    done = run("mapet_ds/pretrain.py", "--check", *sound)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sound for 1 rank." in done.stdout and not (tmp_path / "run").exists()
    assert "sound for 8 ranks" in run("mapet_ds/pretrain.py", "--check", *sound, "train.world_size=8").stdout
    for wrong, sentence in (
        ("train.world_size=3", "is not a multiple of train.micro_batch_size 128 x 3 ranks"),
        ("optim.lrr=3", "did you mean optim.lr"),
        ("data.train=/nowhere", "data.train = /nowhere is not a folder"),
        (f"tokenizer.path={tmp_path}/no", f"{tmp_path}/no is not a file"),
    ):
        done = run("mapet_ds/pretrain.py", "--check", *sound, wrong)
        assert done.returncode == 2 and sentence in done.stderr, wrong


def test_a_check_imports_no_torch(sound):
    script = (
        "import sys, runpy, atexit; atexit.register(lambda: print('torch' in sys.modules));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    assert run("-c", script, "mapet_ds/pretrain.py", "--check", *sound).stdout.splitlines()[-1] == "False"


def test_each_start_is_recorded_and_the_first_stays(tmp_path, monkeypatch):
    write_record(Config(seed=1), {"bf16": {}}, tmp_path, {"images": 3})
    first = json.loads((tmp_path / "environment.json").read_text())
    monkeypatch.setattr(record, "versions", lambda: first["versions"] | {"timm": "1.0.24"})
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "data.threads=3"])
    write_record(Config(seed=1, data=DataConfig(threads=3)), {}, tmp_path, {}, step=20)
    second = json.loads((tmp_path / "environment.json").read_text())
    assert {k: v for k, v in second.items() if k != "starts"} == {
        k: v for k, v in first.items() if k != "starts"
    }
    old, new = second["starts"]
    assert [old] == first["starts"] and (old["step"], old["changed"]) == (0, {})
    assert (new["step"], new["command"]) == (20, ["pretrain.py", "data.threads=3"])
    assert new["changed"] == {"data.threads": [2, 3], "timm": [first["versions"]["timm"], "1.0.24"]}
    write_record(Config(seed=2), {}, tmp_path, {})
    assert len(json.loads((tmp_path / "environment.json").read_text())["starts"]) == 1


def test_versions_that_fail_are_refused_and_untested_ones_named(monkeypatch):
    assert record.check_versions() == ""
    installed = record.versions()
    monkeypatch.setattr(record, "versions", lambda: installed | {"open_clip_torch": "2.32.0"})
    named = "Not tested with these versions: open_clip_torch 2.32.0 (tested: 3.3.0)."
    assert record.check_versions() == named
    others = record.other_versions(installed)
    assert others == f"open_clip_torch 2.32.0 (was {installed['open_clip_torch']})"
    monkeypatch.setattr(record, "versions", lambda: installed | {"timm": "1.0.19"})
    with pytest.raises(ConfigError, match="timm 1.0.19 is too old: 1.0.24"):
        record.check_versions()


def test_a_run_without_git_records_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    write_record(Config(), {}, tmp_path, {})
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["git"] == {"commit": None, "changed": []} and environment["versions"]["torch"]
    assert (tmp_path / "config.yaml").read_text().startswith("run_dir: ''")


def test_ctrl_c_is_a_sentence_and_the_process_dies_by_it():
    """By the signal, not by an exit code: a shell then ends the loop that started it."""
    work = "lambda: signal.raise_signal(signal.SIGINT)"
    program = f"import signal; from mapet_ds.terminal import answer; answer({work})"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "\nStopped by Ctrl-C.\n")
