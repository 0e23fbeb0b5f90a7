"""Experiment trackers: what they are told, over kills and rollbacks, and that none can stop a run."""

import json
import sys

import pytest
import torch
import yaml
from forked import REPOSITORY, start
from images import photos, write
from line import command, losses

from mapet_ds.config.rules import check
from mapet_ds.config.sections import Config, LogConfig
from mapet_ds.errors import ConfigError, RunError
from mapet_ds.training import trackers
from mapet_ds.training.checkpoint import newest

PAGE = trackers.Trackers._page
TAPE = '''
"""A tracker that writes what it is told, a JSON line each."""
import json


class Tape:
    def __init__(self, run):
        self.path, self.id = run.folder / "tape", run.id or f"{run.name} 1"
        self.write("begins", self.id, run.settings["train.global_batch_size"])

    def write(self, *words):
        with self.path.open("a") as file:
            file.write(json.dumps(words) + "\\n")

    def log(self, record, step):
        self.write("record", step, record["loss"])

    def image(self, name, picture, step):
        self.write("picture", step, picture.size)

    def page(self, path):
        self.write("page", path.name, path.read_text()[:15])

    def close(self):
        self.write("closes")


class Broken(Tape):
    def log(self, record, step):
        raise ConnectionError("no route to the server")


class Strange(Tape):
    def log(self, record, step):
        raise StopIteration


class Deaf(Tape):
    def log(self, record, step):
        import threading
        threading.Event().wait()
'''


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run's folder; the module `tape` can be imported."""
    (tmp_path / "tape.py").write_text(TAPE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trackers.Trackers, "_page", page)
    monkeypatch.delitem(sys.modules, "tape", raising=False)
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def page(self):
    (self._run / "report.html").write_text("<!doctype html>")
    return self._run / "report.html"


def told(run_dir):
    return [json.loads(line) for line in (run_dir / "trackers/tape").read_text().splitlines()]


def go(run_dir, names, steps, done=False):
    """One start of a run: a record each step, a picture each second one."""
    following = trackers.Trackers(Config(run_dir=str(run_dir), log=LogConfig(trackers=tuple(names))))
    for step in steps:
        if step % 2 == 0:
            following.show(step, "view", torch.rand(3, 4, 6))
        following.log({"step": step, "loss": 1 / step, "epoch": step / 2})
    following.close(done)


def test_a_run_that_cannot_go_on_tells_what_it_knows(run_dir):
    following = trackers.Trackers(Config(run_dir=str(run_dir), log=LogConfig(trackers=("tape:Tape",))))
    with pytest.raises(RunError), following:
        following.log({"step": 1, "loss": 2.0})
        raise RunError("the disk is full")
    assert [word[0] for word in told(run_dir)] == ["begins", "record", "closes"]


def test_no_step_is_told_twice(run_dir):
    """Killed at 5 and going on at 3, rolled back from 7 to 6, done, and started again."""
    go(run_dir, ["tape:Tape"], [1, 2, 3, 4, 5])
    go(run_dir, ["tape:Tape"], [4, 5, 6, 7, 7, 8], done=True)
    go(run_dir, ["tape:Tape"], [], done=True)
    heard = told(run_dir)
    assert [word for word in heard if word[0] == "begins"] == 3 * [["begins", "run 1", 2048]]
    assert [word[1] for word in heard if word[0] == "record"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [word[1:] for word in heard if word[0] == "picture"] == [[step, [6, 4]] for step in (2, 4, 6, 8)]
    assert [word for word in heard if word[0] == "page"] == [["page", "report.html", "<!doctype html>"]]
    assert heard.count(["closes"]) == 3 and heard[-1] == ["closes"]
    assert json.loads((run_dir / "trackers/tape.Tape.json").read_text())["id"] == "run 1"


def test_a_step_may_have_two_pictures_each_told_once(run_dir):
    config = Config(run_dir=str(run_dir), log=LogConfig(trackers=("tape:Tape",)))
    for steps in ((1, 2), (2, 3)):
        following = trackers.Trackers(config)
        for step in steps:
            following.show(step, "crop", torch.rand(3, 4, 6))
            following.show(step, "image", torch.rand(3, 4, step))
        following.close(done=False)
    pictures = [tuple(word[1:]) for word in told(run_dir) if word[0] == "picture"]
    assert pictures == [(step, size) for step in (1, 2, 3) for size in ([6, 4], [step, 4])]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("broken", ["Broken", "Strange", "Deaf", "Nothing"])
def test_a_tracker_that_fails_stops_nothing(run_dir, broken, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.5)
    go(run_dir, [f"tape:{broken}", "tape:Tape"], [1, 2, 3, 4])
    said = capsys.readouterr().err
    sentences = {
        "Broken": "tape:Broken fails, and gets nothing more until the next start: ConnectionError no route",
        "Deaf": "tape:Deaf has not kept pace: 6 of its records and pictures are lost. metrics.jsonl has",
        "Nothing": "tape:Nothing can't be resolved: module 'tape' has no attribute 'Nothing'",
    }
    assert sentences.get(broken, "") in said and said.count("The tracker") == (broken != "Strange")
    assert [word[1] for word in told(run_dir) if word[0] == "record"] == [1, 2, 3, 4]


def test_what_waits_for_a_tracker_is_bounded(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.1)
    monkeypatch.setattr(trackers, "BACKLOG", 3)
    go(run_dir, ["tape:Deaf"], range(1, 20))
    assert "tape:Deaf has not kept pace" in capsys.readouterr().err


def test_trackers_that_are_not_there_are_refused(tmp_path, monkeypatch):
    def says(names):
        with pytest.raises(ConfigError) as caught:
            check(Config(run_dir=str(tmp_path), log=LogConfig(trackers=tuple(names))), 1)
        return str(caught.value)

    assert "log.trackers names wandbb; there are wandb, trackio, mlflow and package.module:factory." in says(
        ["wandbb"]
    )
    monkeypatch.setattr("mapet_ds.config.rules.find_spec", lambda name: None)
    assert "log.trackers names wandb, which is not installed: pip install 'mapet_ds[wandb]'." in says(
        ["wandb"]
    )


def wandb_records(data):
    """The records of a .wandb file: LevelDB's log, blocks of 32 KiB, after seven bytes of header."""
    start, record = 7, b""
    while start + 7 <= len(data):
        if 2**15 - start % 2**15 < 7:  # the rest of a block
            start += 2**15 - start % 2**15
            continue
        length, kind = int.from_bytes(data[start + 4 : start + 6], "little"), data[start + 6]
        record += data[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # whole, last
            yield record
            record = b""


def test_wandb_keeps_one_run_offline(run_dir, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    go(run_dir, ["wandb"], [1, 2, 3])
    go(run_dir, ["wandb"], [2, 3, 4], done=True)
    steps, ids, keys = [], set(), set()
    for path in sorted((run_dir / "trackers/wandb").glob("offline-run-*/*.wandb")):
        for record in map(Record.FromString, wandb_records(path.read_bytes())):
            ids |= {record.run.run_id} - {""}
            values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            keys |= values.keys()
            steps += [int(values["_step"])] if "loss" in values else []
    assert steps == [1, 2, 3, 4] and {"epoch", "view", "report"} <= keys
    assert ids == {json.loads((run_dir / "trackers/wandb.json").read_text())["id"]}


def test_a_tracker_without_login_says_so_once(run_dir, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # the settings of the test before
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    go(run_dir, ["wandb"], [1, 2])
    said = capsys.readouterr().err
    assert said.count("The tracker wandb fails, and gets nothing more until the next start") == 1


def test_mlflow_keeps_one_run_in_a_folder(run_dir, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (run_dir / "mlruns").as_uri())
    go(run_dir, ["mlflow"], [1, 2, 3])
    go(run_dir, ["mlflow"], [2, 3, 4], done=True)
    client, run_id = mlflow.MlflowClient(), json.loads((run_dir / "trackers/mlflow.json").read_text())["id"]
    assert [each.step for each in client.get_metric_history(run_id, "loss")] == [1, 2, 3, 4]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["train.global_batch_size"] == "2048"
    assert {"report.html", "images"} <= {each.path for each in client.list_artifacts(run_id)}


def test_trackio_keeps_one_run(run_dir, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(run_dir / "trackio"))  # read at its import
    trackio = pytest.importorskip("trackio")
    go(run_dir, ["trackio"], [1, 2, 3])
    go(run_dir, ["trackio"], [2, 3, 4], done=True)
    (run,) = trackio.Api().runs(trackers.PROJECT)
    assert run.name == json.loads((run_dir / "trackers/trackio.json").read_text())["id"]


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import sys, pathlib; pathlib.Path(sys.argv[3]).write_text(sys.argv[1])", ""),
        ("import sys; sys.exit('wait\\nno room')", "report.html is missing for the trackers: no room"),
    ],
)
def test_the_report_is_a_program_of_its_own(run_dir, monkeypatch, capsys, program, says):
    monkeypatch.setattr(trackers.Trackers, "_page", PAGE)
    monkeypatch.setattr(trackers, "SHIPPED", run_dir)
    (run_dir / "tools").mkdir()
    (run_dir / "tools/report.py").write_text(program)
    go(run_dir, ["tape:Tape"], [1], done=True)
    assert says in capsys.readouterr().err
    pages = [word for word in told(run_dir) if word[0] == "page"]
    assert pages == ([] if says else [["page", "report.html", str(run_dir)[:15]]])


RECIPE = {
    "objective": "mae",
    "model": {
        "name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8,
        "args": {"depth": 1, "embed_dim": 32, "num_heads": 2},
    },
    "mae": {"decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2},
    "optim": {"warmup_epochs": 0.5},
    "train": {"epochs": 2, "global_batch_size": 8, "micro_batch_size": 4},
    "checkpoint": {"every_steps": 1},
    "log": {"every_steps": 1, "images_every_steps": 4, "progress": False, "trackers": ["tape:Tape"]},
}  # fmt: skip


@pytest.mark.slow
def test_a_run_tells_its_trackers_and_goes_on(tmp_path):
    """Two starts, of which the second makes step 3 anew."""
    write(tmp_path / "train", photos(24))
    (tmp_path / "tape.py").write_text(TAPE)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            RECIPE
            | {"data": {"train": str(tmp_path / "train"), "threads": 1}, "run_dir": str(tmp_path / "run")}
        )
    )
    folder, path = tmp_path / "run", f"PYTHONPATH={tmp_path}:{REPOSITORY}"
    for stop in (3, 5):
        done = start("env", path, *command(recipe, 1, f"train.stop_at_step={stop}"))
        assert done.returncode == 0, done.stderr
        if stop == 3:
            newest(folder).path.rename(tmp_path / "lost")
    heard, lines = told(folder), losses(folder)
    assert [word[1] for word in heard if word[0] == "record"] == [1, 2, 3, 4, 5] == [*lines]
    assert [word[1] for word in heard if word[0] == "picture"] == [1, 3, 4, 5]
    assert all(word[2] == pytest.approx(lines[word[1]], rel=1e-5) for word in heard if word[0] == "record")
    assert [word[0] for word in heard].count("begins") == 2 and heard[-1] == ["closes"]
