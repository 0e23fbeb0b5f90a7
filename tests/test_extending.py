"""What docs/extending.md shows works as it stands there: objective, tokenizer, teachers and students."""

import json
import os
import re
import shutil
import subprocess
import sys

import open_clip
import pytest
from forked import ENVIRONMENT
from line import command, losses, make_line
from safetensors.torch import load_file

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_method
from mapet_ds.config.sections import REPOSITORY
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


def run(root, recipe, *words):
    """Three steps of the repository at `root`, by the user's command; losses and newest checkpoint."""
    python, program, *rest = command(recipe, 1, f"run_dir={root}/run", "train.stop_at_step=3", *words)
    path = f"{root}{os.pathsep}{REPOSITORY}"
    words = [python, root / program if (root / program).exists() else program, *rest]
    done = subprocess.run(
        words, cwd=REPOSITORY, env={**ENVIRONMENT, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(root / "run")) == 3
    return newest(root / "run")


def apply(diff, root):
    """Each hunk begins with the name of its file; its text before must be there once."""
    for hunk in diff.split("--- ")[1:]:
        name, *lines = hunk.splitlines()
        before, after = (
            "".join(f"{line[1:]}\n" for line in lines if line[0] in kinds) for kinds in (" -", " +")
        )
        text = (root / name).read_text()
        assert text.count(before) == 1, f"{name}: {before}"
        (root / name).write_text(text.replace(before, after))


def test_an_objective_is_its_file_its_section_and_two_lines(recipe, tmp_path):
    for folder in ("mapet_ds", "ds_configs"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "mapet_ds/objectives/pixels.py").write_text(FILES["objectives/pixels.py"])
    apply(next(code for language, code in BLOCKS if language == "diff"), tmp_path)
    end = run(tmp_path, recipe, "objective=pixels", "pixels.hidden_share=0.4")
    assert end.load("model")["head.weight"].shape == (3 * 8**2, 32)
    assert load_file(end.path / "optimizer.safetensors")["exp_avg.mask_token"].abs().sum() > 0, "it learns"
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    plan = [sys.executable, "tools/plan.py", "--gpu", "h100", "--gpus_per_node", "1", "--json"]
    plan += ["--config", recipe, "objective=pixels"]
    done = subprocess.run(plan, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, learnt = json.loads(done.stdout)["predicted"], end.load("model").values()
    rows, patches, hidden, width, pixels = 17, 16, 10, 32, 3 * 8**2
    blocks = 3 * (24 * rows * width**2 + 4 * rows**2 * width)
    flops = 4 * patches * pixels * width + 3 * (blocks + 2 * hidden * width * pixels)
    assert found["gflop_per_image"]["student"] == flops / 1e9
    assert found["parameters"] == sum(tensor.numel() for tensor in learnt)


def test_a_tokenizer_of_ones_own(recipe, tmp_path):
    (tmp_path / "grey_levels.py").write_text(FILES["grey_levels.py"])
    given = re.search(r"tokenizer\.name=\S+ tokenizer\.vocab_size=\d+", TEXT)[0].split()
    assert run(tmp_path, recipe, *given).run["identity"]["target.levels"] == 16


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
        assert open_clip.get_pretrained_cfg(config.teacher.name, config.teacher.weights), (
            "a tag of this model"
        )
