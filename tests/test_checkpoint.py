"""Checkpoint folders: whole or passed over, never another run's, never a pickle."""

import json
import pickle

import pytest
import torch

from mapet_ds.config.running import flatten
from mapet_ds.config.sections import Config, DataConfig
from mapet_ds.errors import ResumeError
from mapet_ds.training import checkpoint

DEFAULTS = flatten(Config().to_dict())


def write(run_dir, step, keep=3, skipped=()):
    files = {
        "model": {"w": torch.full((3,), float(step))},
        "optimizer": {"exp_avg.w": torch.ones(3)},
        "target": {},
    }
    state = {"step": step, "skipped": list(skipped), "identity": {"seed": 0}}
    folder = checkpoint.save(run_dir, state, files)
    checkpoint.secure(folder, keep)
    return folder


def test_round_trip_and_retention(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"step_{s:08d}" for s in (2, 3, 4)
    ]
    newest = checkpoint.newest(tmp_path)
    assert newest.run["step"] == 4
    assert torch.equal(newest.load("model")["w"], torch.full((3,), 4.0))
    assert newest.load("target") == {}


def test_a_checkpoint_is_whole_before_the_disk_has_it_and_older_ones_stay_until_then(tmp_path, monkeypatch):
    """A launcher kills a rank whose disk is too slow: then it has saved all the same."""

    def flush(path):
        flushed.append(path)
        assert checkpoint.newest(tmp_path).run["step"] == 2
        assert (tmp_path / "checkpoints/step_00000001").is_dir()

    write(tmp_path, 1)
    flushed = []
    monkeypatch.setattr("mapet_ds.files.flush", flush)
    folder = checkpoint.save(tmp_path, {"step": 2, "skipped": []}, {"model": {"w": torch.ones(3)}})
    assert flushed == []
    checkpoint.secure(folder, keep=1)
    assert set(flushed) == {*folder.iterdir(), folder, folder.parent}
    assert checkpoint.checkpoint_folders(tmp_path) == [folder]


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def flip(folder):
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def lose(folder):
    (folder / "optimizer.safetensors").unlink()


def garble(folder):
    (folder / "run.json").write_text('{"step": ')


@pytest.mark.parametrize("harm", [truncate, flip, lose, garble])
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path, harm):
    write(tmp_path, 1)
    harm(write(tmp_path, 2))
    said = []
    assert checkpoint.newest(tmp_path, report=said.append).run["step"] == 1
    assert len(said) == 1
    assert "step_00000002" in said[0]


def test_a_checkpoint_that_has_learnt_from_what_is_passed_over_is_not_taken(tmp_path):
    """One whose run had passed over it already is."""
    said = []
    write(tmp_path, 2)
    with pytest.raises(
        ResumeError, match="whole and free of the steps that rollbacks.json passes over; remove them"
    ):
        checkpoint.newest(tmp_path, {1, 2}, said.append)
    says = "it has learnt from step 1, which rollbacks.json passes over."
    assert said == [f"Passing over {tmp_path}/checkpoints/step_00000002: {says}"]
    assert checkpoint.newest(tmp_path, {2, 3}, said.append).run["step"] == 2
    write(tmp_path, 4, skipped=[2])
    assert checkpoint.newest(tmp_path, {2, 3}, said.append).run["step"] == 2
    write(tmp_path, 6, skipped=[2, 3])
    assert checkpoint.newest(tmp_path, {2, 3}, said.append).run["step"] == 6


def test_what_has_learnt_from_what_is_passed_over_is_dropped_and_takes_no_place(tmp_path):
    """A stop at 320, a jump before 330, back to 300: 300 must stay beside 400."""
    write(tmp_path, 300, keep=2)
    write(tmp_path, 320, keep=2)
    checkpoint.drop(tmp_path, range(310, 330))
    assert [path.name for path in checkpoint.checkpoint_folders(tmp_path)] == ["step_00000300"]
    write(tmp_path, 400, keep=2, skipped=range(310, 330))
    checkpoint.drop(tmp_path, range(310, 330))
    assert [path.name for path in checkpoint.checkpoint_folders(tmp_path)] == [
        "step_00000400",
        "step_00000300",
    ]


def test_only_damaged_checkpoints_stop_the_run(tmp_path):
    truncate(write(tmp_path, 1))
    with pytest.raises(ResumeError, match="is whole"):
        checkpoint.newest(tmp_path, report=lambda _: None)
    write(tmp_path, 2)
    with pytest.raises(ResumeError, match="is whole"):
        checkpoint.newest(tmp_path, {1}, report=lambda _: None)


def test_a_half_written_folder_is_not_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    partial = tmp_path / "checkpoints" / ".step_00000002.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path).run["step"] == 1
    write(tmp_path, 2)
    assert not partial.exists()


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.newest(tmp_path) is None


def test_a_pickle_in_place_of_weights_executes_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    folder = write(tmp_path, 1)
    path = folder / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    run = json.loads((folder / "run.json").read_text())
    run["files"][path.name] = checkpoint.checksum(path)  # even with a matching checksum
    (folder / "run.json").write_text(json.dumps(run))
    found = checkpoint.newest(tmp_path)
    with pytest.raises(ResumeError, match="model.safetensors"):
        found.load("model")
    assert not (tmp_path / "pwned").exists()


def identity(**changes):
    knobs = {k: v for k, v in changes.items() if k in ("seed", "objective", "run_dir")}
    config = Config(**knobs, data=DataConfig(shuffle_window=changes.get("shuffle_window", 0)))
    return checkpoint.identity(
        config, changes.get("data", "abc"), {"codebook": changes.get("codebook", "123")}
    )


def test_a_knob_that_is_newer_than_the_checkpoint_had_its_default(tmp_path):
    then = identity()
    del then["data.shuffle_window"]
    found = checkpoint.Checkpoint(tmp_path, {"identity": then})
    checkpoint.check_identity(found, identity(), DEFAULTS)
    with pytest.raises(ResumeError, match="data.shuffle_window: 0 in the checkpoint, 65536 now"):
        checkpoint.check_identity(found, identity(shuffle_window=65_536), DEFAULTS)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"objective": "beit"}, "objective"),
        ({"data": "x"}, "data.fingerprint"),
        ({"codebook": "9"}, "target.codebook"),
        ({"shuffle_window": 65_536}, "data.shuffle_window"),
    ],
)
def test_another_run_is_refused_naming_both_values(tmp_path, change, key):
    state = {"step": 1, "skipped": [], "identity": identity()}
    checkpoint.save(tmp_path, state, {"model": {"w": torch.ones(1)}})
    found = checkpoint.newest(tmp_path)
    checkpoint.check_identity(found, identity(run_dir="elsewhere"), DEFAULTS)
    says = (
        rf"{key}.*: .* in the checkpoint, .* now\n(.|\n)*tools/export_timm.py .* OUT, and model.init_from=OUT"
    )
    with pytest.raises(ResumeError, match=says):
        checkpoint.check_identity(found, identity(**change), DEFAULTS)
