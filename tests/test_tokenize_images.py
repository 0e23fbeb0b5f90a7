"""tools/tokenize_images.py and training from its ids, through the user's own commands."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import start
from line import IMAGES, command, losses, make_line, pretrain

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.data.batch import Batch
from mapet_ds.data.index import open_index
from mapet_ds.data.loader import Loader
from mapet_ds.data.stored_ids import CHUNKS, NO_ID, IdsWriter, StoredIds, settings_of
from mapet_ds.draws import Place
from mapet_ds.errors import ConfigError, DataError
from mapet_ds.methods import build_target
from mapet_ds.training.command_line import check_files

CPU = torch.device("cpu")
BAD = (
    3,
    4,
    44,
)  # in the index's order: two in one micro-batch, and the last, for which the first one stands in
DYING = """
import os
import signal

from mapet_ds.targets.kclip import KClip

class Dying(KClip):
    calls = 0

    def __call__(self, images):
        self.calls += 1
        if str(self.calls) == os.environ.get("DIES_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(images)
"""


def tokenize(recipe, *arguments, ranks=1, **environment):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    )
    variables = [f"{name}={value}" for name, value in environment.items()]
    return start(
        "env",
        *variables,
        sys.executable,
        *launcher,
        "tools/tokenize_images.py",
        "--config",
        recipe,
        *arguments,
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Central crops; three images are cut off."""
    recipe = make_line(tmp_path_factory.mktemp("ids"), crop="center", flip=0.0, max_bad_share=0.1)
    index = open_index(str(recipe.parent / "train"), recipe.parent / "listed")
    for number in BAD:
        path = Path(index.path(number))
        path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    return recipe


@pytest.fixture(scope="module")
def written(recipe):
    """The folder of one plain process, and what was printed."""
    done = tokenize(recipe, f"tokenizer.ids={recipe.parent}/ids")
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.parent / "ids", done


@pytest.fixture
def copy(written, tmp_path):
    return Path(shutil.copytree(written[0], tmp_path / "copy"))


def settings(recipe, ids, *overrides):
    return load_config(recipe, [f"tokenizer.ids={ids}", f"run_dir={recipe.parent}/in_tests", *overrides])


def test_every_image_has_its_ids_and_an_unreadable_one_none(recipe, written):
    """Against the ids on the fly in the run's own order, whose micro-batches are made of other images."""
    folder, done = written
    stored, config = StoredIds(folder), load_config(recipe)
    assert stored.rows.shape == (IMAGES, 16) and (folder / "ids.bin").stat().st_size == 2 * 16 * IMAGES
    assert np.flatnonzero((stored.rows == NO_ID).all(axis=1)).tolist() == list(BAD)
    index = open_index(config.data.train, folder / "index")
    assert stored.unreadable == {
        str(i): f"{index.path(i)}: JPEG cut off: no end marker after its scans" for i in BAD
    }
    assert "3 images are unreadable and have no ids" in done.stdout
    target = build_target(config, CPU)
    loader = Loader(
        config, index, student=True, teacher=target.teacher_view, rank=0, world_size=1, local_rank=0
    )
    seen = set()
    for _ in range(-(-IMAGES // 4)):
        batch = next(loader)
        seen |= set(batch.index.tolist())
        assert np.array_equal(target(batch), stored.rows[batch.index])
    assert len(seen) == IMAGES - len(BAD)


def test_killed_and_gone_on_with_by_two_ranks_gives_the_same_bytes(recipe, written, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    path = {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
    words = (recipe, f"tokenizer.ids={tmp_path}/ids", "tokenizer.name=dying:Dying")
    done = tokenize(*words, DIES_AT=3, **path)
    assert done.returncode == -9
    assert not (tmp_path / "ids").exists()
    with pytest.raises(ConfigError, match=r"is not finished: .*the same command goes on"):
        StoredIds(tmp_path / "ids")
    done = tokenize(*words, ranks=2, **path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Going on with {tmp_path}/ids.partial at image 8 of 45." in done.stdout
    assert not (tmp_path / "ids.partial").exists()
    assert (tmp_path / "ids/ids.bin").read_bytes() == (written[0] / "ids.bin").read_bytes()
    found, expected = (
        json.loads((folder / "ids.json").read_text()) for folder in (tmp_path / "ids", written[0])
    )
    assert found.pop("settings").pop("tokenizer.name") == "dying:Dying" and expected.pop("settings")
    assert found == expected


def test_a_run_from_ids_is_the_run_and_needs_neither_teacher_nor_codebook(recipe, written):
    """Bit for bit, past an epoch's end (step 5.6), and gone on with on the fly."""
    folder = recipe.parent
    for name, overrides in (("fly", []), ("read", [f"tokenizer.ids={written[0]}", "train.stop_at_step=9"])):
        hidden = [
            (folder / name, folder / f"away_{name}")
            for name in ("teacher", "codebook.safetensors")
            if overrides
        ]
        for path, away in hidden:
            path.rename(away)
        done = pretrain(recipe, 1, f"run_dir={folder}/{name}", *overrides)
        for path, away in hidden:
            away.rename(path)
        assert done.returncode == 0, done.stderr[-3000:]
    assert list(losses(folder / "read").items()) == list(losses(folder / "fly").items())[:9]
    done = pretrain(recipe, 1, f"run_dir={folder}/read")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Continuing" in done.stdout
    found, expected = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("read", "fly")
    )
    for name in (
        "step",
        "loss",
        "token_accuracy",
        "grad_norm",
        "codebook_perplexity",
        "codebook_used",
        "quarantined",
    ):
        assert [line[name] for line in found] == [line[name] for line in expected], name


def test_ids_that_differ_are_counted(recipe, copy):
    ids = np.memmap(copy / "ids.bin", "<u2", "r+", shape=(IMAGES, 16))
    ids[20, :3] = (ids[20, :3] + 1) % 16
    ids.flush()
    done = tokenize(recipe, f"tokenizer.ids={copy}", "--check", "99", "train.micro_batch_size=7")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 of 720 ids differ (0.417 %), in 1 of 45 images." in done.stdout


def test_a_whole_folder_is_left_as_it_is(recipe, written):
    before = (written[0] / "ids.json").stat().st_mtime_ns
    done = tokenize(recipe, f"tokenizer.ids={written[0]}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Nothing is left to do: {written[0]} is whole." in done.stdout
    assert (written[0] / "ids.json").stat().st_mtime_ns == before


def test_damaged_ids_are_refused(recipe, copy):
    data = bytearray((copy / "ids.bin").read_bytes())
    data[40 * 32] ^= 1
    (copy / "ids.bin").write_bytes(data)
    with pytest.raises(
        ConfigError, match=f"{copy}/ids.bin is damaged: part 40 of 45 hasn't the checksum of ids.json"
    ):
        build_target(settings(recipe, copy), CPU)
    assert StoredIds(copy).damaged(1, 2) is None, "the other half is whole"


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (
            lambda folder: (folder / "ids.bin").write_bytes(bytes(99)),
            "is damaged: ids.bin has 99 bytes for 45 images of 16 ids",
        ),
        (lambda folder: (folder / "ids.json").write_text("{"), "can't be opened: JSONDecodeError"),
        (lambda folder: (folder / "ids.json").write_text("{}"), "can't be opened: KeyError"),
        (
            lambda folder: (folder / "ids.bin").unlink(),
            "has no .*ids.bin: tools/tokenize_images.py writes it",
        ),
        (shutil.rmtree, "has no .*ids.json"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(recipe, copy, harm, says):
    harm(copy)
    with pytest.raises(ConfigError, match=says):
        check_files(settings(recipe, copy))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.crop=random"], "data.crop = random makes new ones every epoch: set data.crop=center"),
        (["data.crop=random", "data.flip=0.5"], "set data.crop=center"),
        (["data.flip=0.5"], "data.flip = 0.5 has no effect with data.crop = center"),
        (["tokenizer.vocab_size=17"], "tokenizer.vocab_size = 16, but this recipe has 17"),
        (["tokenizer.name=vqkd"], "tokenizer.name = kclip, but this recipe has vqkd"),
        (["teacher.layer=1"], "teacher.layer = -1, but this recipe has 1"),
        (["teacher.name=RN50"], "teacher.name = local-dir:.*, but this recipe has RN50"),
        (["teacher.precision=bf16"], "teacher.precision = auto, but this recipe has bf16"),
        (["model.patch_size=4"], "patches along a side = 4, but this recipe has 8"),
        (["tokenizer.path=LICENSE"], "the sha256 of tokenizer.path = [0-9a-f]+, but this recipe has"),
    ],
)
def test_a_run_of_another_recipe_is_refused(recipe, written, overrides, says):
    others = ["tokenizer.path=/gone", "data.color_jitter=0.1", "teacher.shard=none", "teacher.ahead=true"]
    check_files(settings(recipe, written[0], *others))
    with pytest.raises(ConfigError, match=says):
        config = settings(recipe, written[0], *overrides)
        check(config, 1)
        check_files(config)


def test_a_mistake_of_a_run_is_one_sentence(recipe, written):
    done = start(*command(recipe, 1, f"tokenizer.ids={written[0]}", "teacher.layer=1"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "teacher.layer" in done.stderr


def test_ids_of_other_images_are_refused(recipe, written, tmp_path):
    shutil.copytree(recipe.parent / "train", tmp_path / "train")
    moved = settings(recipe, written[0], f"data.train={tmp_path}/train", f"run_dir={tmp_path}/moved")
    assert build_target(moved, CPU).dim == 16
    next((tmp_path / "train/a").iterdir()).unlink()
    other = settings(recipe, written[0], f"data.train={tmp_path}/train", f"run_dir={tmp_path}/other")
    with pytest.raises(
        ConfigError, match=f"was written for other images than data.train = {tmp_path}/train holds"
    ):
        build_target(other, CPU)


def test_an_image_without_ids_that_has_become_readable_is_a_sentence(recipe, written):
    target = build_target(settings(recipe, written[0]), CPU)
    assert target.teacher_view is None
    batch = Batch(None, None, torch.tensor([5, 7]), Place(0, 0))
    ids = target(batch)
    assert ids.dtype == torch.long and ids.tolist() == StoredIds(written[0]).rows[[5, 7]].tolist()
    target.note(ids)
    assert target.counts.sum() == 32
    with pytest.raises(
        DataError, match=r"has no ids of image 44 of the index.*written \(/.*jpg: JPEG cut off"
    ):
        target(batch._replace(index=torch.tensor([5, 44])))


def test_a_pass_of_another_recipe_is_not_gone_on_with(recipe, written, copy):
    copy.rename(copy.with_name("ids.partial"))
    stored = StoredIds(written[0])
    about = {"settings": stored.settings, "identity": stored.identity, "fingerprint": stored.fingerprint}
    for key, value, says in (
        (
            "settings",
            settings_of(load_config(recipe, ["teacher.layer=1"])),
            "teacher.layer = -1, but this recipe has 1",
        ),
        (
            "identity",
            {**stored.identity, "dtype": "torch.bfloat16"},
            "the tokenizer's dtype = torch.float32, but this",
        ),
        ("fingerprint", "0" * 64, "the index's fingerprint = [0-9a-f]+, but this recipe has 0000"),
    ):
        with pytest.raises(ConfigError, match=f"is the beginning of a pass with {says}"):
            IdsWriter(copy.with_name("ids"), {**about, key: value}, IMAGES, 16)
    (copy.with_name("ids.partial") / "ids.bin").write_bytes(
        (written[0] / "ids.bin").read_bytes()[: 33 * 32 - 1]
    )
    assert IdsWriter(copy.with_name("ids"), about, IMAGES, 16).done == 32, "what is damaged is written anew"


def test_rows_come_in_any_portions_and_a_chunk_is_safe_once_written(tmp_path):
    images = 3 * CHUNKS + 50  # four a chunk, two in the last one
    rows = np.random.default_rng(0).integers(0, 1000, (images + 9, 5)).astype("<u2")
    about = {"settings": {}, "identity": {}, "fingerprint": "f"}
    done = 0
    while done < images:
        writer = IdsWriter(tmp_path / "ids", about, images, 5)  # the one before was cut off
        begin = writer.done // 7 * 7
        for first in range(begin, begin + 21, 7):
            writer.add(first, rows[first : first + 7], {})
        assert done < writer.done
        done = writer.done
    writer.finish()
    assert np.array_equal(StoredIds(tmp_path / "ids").rows, rows[:images])
    assert StoredIds(tmp_path / "ids").damaged() is None
    assert len(StoredIds(tmp_path / "ids").sha256) == -(-images // 4) <= CHUNKS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "tokenizer.ids is empty: name the folder to write"),
        (["tokenizer.ids=x", "data.crop=random"], "data.crop = random makes new ones every epoch"),
        (["tokenizer.ids=x", "tokenizer.vocab_size=65536"], "at most 65535 ids can be stored"),
        (["tokenizer.ids=x", "tokenizer.path=/gone"], "tokenizer.path = /gone is not a file"),
        (["tokenizer.ids=docs"], "tokenizer.ids = docs is something else, and not empty"),
        (["tokenizer.ids=/proc/x"], "tokenizer.ids = /proc/x can't be written"),
        (["tokenizer.ids=x", "--check", "5"], "tokenizer.ids = x has no"),
        (["tokenizer.ids=x", "data.train=/gone"], "data.train = /gone is not a folder"),
    ],
)
def test_mistakes_are_sentences(recipe, arguments, says):
    done = tokenize(recipe, *arguments)
    assert done.returncode == 2
    assert re.search(says, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_looking_ids_up_does_not_make_the_host_wait(recipe, written):
    target = build_target(settings(recipe, written[0]), torch.device("cuda"))
    batch = Batch(None, None, torch.tensor([5, 7]), Place(0, 0))
    target(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = target(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ids.tolist() == StoredIds(written[0]).rows[[5, 7]].tolist()
