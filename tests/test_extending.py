"""What docs/extending.md shows works as it stands there: objective, tokenizer, teachers and students."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from forked import ENVIRONMENT, start
from line import command, losses, make_line
from safetensors.torch import load_file

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_method
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import ConfigError
from mapet_ds.targets.towers import weights_tag
from mapet_ds.training.checkpoint import newest
from mapet_ds.vit import build_vit

TEXT = (REPOSITORY / "docs/extending.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)
FILES = {code.split()[1]: code for language, code in BLOCKS if language == "python"}
ROWS = re.findall(r"^\| `((?:teacher|model)\.name=[^`]+)`", TEXT, re.M)
WORD = re.compile(r"\S+=\{[^}]*\}|\S+")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_line(tmp_path_factory.mktemp("extending"))


def run(folder, recipe, *words, steps=3):
    """So many steps in all by the user's command, `folder` on PYTHONPATH; gives the newest checkpoint."""
    done = start(
        "env", f"PYTHONPATH={folder}:{REPOSITORY}", *command(recipe, 1, f"train.stop_at_step={steps}", *words)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = Path(yaml.safe_load(recipe.read_text())["run_dir"])
    assert len(losses(run_dir)) == steps
    return newest(run_dir)


def test_the_page_shows_the_example():
    example = (REPOSITORY / "examples/pixels.py").read_text()
    assert FILES["pixels.py"] == f"# pixels.py\n{example}"


ONE_AFTER_ANOTHER = """
import json, runpy, sys
sys.path[0] = folder = sys.argv[1]
for program, *words in json.loads(sys.argv[2]):
    sys.argv = [f"{folder}/{program}", *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, program
"""
OWN = ("objective=pixels:Pixels", "own.hidden_share=0.4")


def test_an_objective_of_ones_own_lives_outside(recipe, tmp_path):
    """It trains, goes on, is refused with other settings, is exported, reported and planned."""
    shutil.copy(REPOSITORY / "examples/pixels.py", tmp_path)
    run(tmp_path, recipe, *OWN)
    other = start("env", f"PYTHONPATH={tmp_path}:{REPOSITORY}", *command(recipe, 1, OWN[0]))
    assert other.returncode == 2 and "own.hidden_share: 0.4 in the checkpoint, 0.6 now" in other.stderr
    folder = Path(load_config(recipe).run_dir)
    end = run(tmp_path, folder / "config.yaml", "train.stop_at_step=6", steps=6)
    assert end.load("model")["head.weight"].shape == (3 * 8**2, 32)
    assert load_file(end.path / "optimizer.safetensors")["exp_avg.mask_token"].abs().sum() > 0, "it learns"
    assert yaml.safe_load((folder / "config.yaml").read_text())["own"] == {"hidden_share": 0.4}

    # What reads the run finds the module in the current folder; the export is timm's.
    programs = [
        ["export_timm.py", folder, tmp_path / "out"],
        ["report.py", folder, "--out", tmp_path / "page.html", "--sample", "8"],
        ["plan.py", "--gpu", "h100", "--gpus_per_node", "1", "--json", "--config", recipe, *OWN],
    ]
    words = json.dumps([[str(word) for word in program] for program in programs])
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, REPOSITORY / "tools", words],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out/README.md").read_text()
    assert "# vit_tiny_patch16_224.Pixels" in card and "`pixels:Pixels`" in card
    page = (tmp_path / "page.html").read_text()
    assert "distance" in page and "2 starts, each with what differs from the one before" in page
    assert "from step 3; train.stop_at_step: 3, now 6" in page

    found, learnt = json.loads(done.stdout.splitlines()[-1])["predicted"], end.load("model").values()
    rows, patches, hidden, width, pixels = 17, 16, 6, 32, 3 * 8**2
    blocks = 3 * (24 * rows * width**2 + 4 * rows**2 * width)
    flops = 4 * patches * pixels * width + 3 * (blocks + 2 * hidden * width * pixels)
    assert found["gflop_per_image"]["student"] == flops / 1e9
    assert found["parameters"] == sum(tensor.numel() for tensor in learnt)


OBJECTIVE = "class Own(Objective):\n    settings = Settings"
HEAD = """
from mapet_ds.config.knobs import Share, knobs
from mapet_ds.config.objectives import ObjectiveConfig
from mapet_ds.objectives.objective import Objective
"""
SECTION = "@knobs\nclass Settings(ObjectiveConfig):\n    hidden_share: Share"
MISTAKES = {
    "nowhere:Pixels": ("", "objective = nowhere:Pixels can't be resolved: No module named 'nowhere'"),
    "mine_1:Pixel": ("", "has no attribute 'Pixel'. Its module must be installed, on PYTHONPATH or in"),
    "mine_2:Own": ("Own = 3", "objective = mine_2:Own is a int, not a class: derive one of mapet_ds."),
    "mine_3:Own": ("class Own: pass", "lacks draw, forward, patch_predictions, build_target, settings. It"),
    "mine_4:Own": (
        f"{SECTION} = 0.5\n{OBJECTIVE}\n    def forward(self): ...",
        "mine_4:Own lacks draw, build_target. It must be a subclass of mapet_ds.objectives.objective.Obj",
    ),
    "mine_5:Own": (f"{SECTION}\n{OBJECTIVE}", "mine_5:Own: Settings.hidden_share needs a default."),
    "mine_6:Own": (
        f"{SECTION[7:]} = 0.5\n{OBJECTIVE}",
        "mine_6:Own: put @knobs (mapet_ds.config.knobs) above Settings.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_an_objective_lacks_is_a_sentence(name, tmp_path, monkeypatch):
    code, says = MISTAKES[name]
    if not name.startswith("nowhere"):
        (tmp_path / f"{name.partition(':')[0]}.py").write_text(HEAD + code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ConfigError) as caught:
        load_config("mapet_vitb16", [f"objective={name}"])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "own.hidden=0.5",
            "own.hidden = 0.5 (from the command line) is not a knob; did you mean own.hidden_",
        ),
        (
            "own.hidden_share=2",
            "own.hidden_share = 2 (from the command line): input should be less than or eq",
        ),
        ("own.hidden_share=0", "own.hidden_share = 0.0 hides 0 of 196 patches; at least one must be hidden"),
    ],
)
def test_settings_of_ones_own_are_checked(override, says, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    with pytest.raises(ConfigError) as caught:
        check_method(load_config("mapet_vitb16", [OWN[0], override]))
    assert says in str(caught.value)


def test_a_tokenizer_of_ones_own(recipe, tmp_path):
    (tmp_path / "grey_levels.py").write_text(FILES["grey_levels.py"])
    given = re.search(r"tokenizer\.name=\S+ tokenizer\.vocab_size=\d+", TEXT)[0].split()
    own = tmp_path / "own.yaml"
    own.write_text(recipe.read_text().replace("/run\n", "/other\n"))
    assert run(tmp_path, own, *given).run["identity"]["target.levels"] == 16


def test_there_are_teachers_and_students():
    assert (
        sum(row.startswith("teacher") for row in ROWS) > 4
        and sum(row.startswith("model") for row in ROWS) > 3
    )


@pytest.mark.parametrize("row", [row for row in ROWS if "local-dir" not in row])
def test_teachers_fit_the_grid_and_students_can_be_built(row):
    depth = ["model.args={depth: 1}"] if "large" in row or "base" in row else []
    config = load_config(REPOSITORY / "mapet_ds/recipes/mapet_vitb16.yaml", [*depth, *WORD.findall(row)])
    check_method(config)
    if row.startswith("model"):
        build_vit(config.model)
    else:
        assert weights_tag(config.teacher), "a tag of this model"
