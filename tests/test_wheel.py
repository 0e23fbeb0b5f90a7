"""The package works outside of its repository: a wheel, its command, its recipes and programs by name."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from forked import ENVIRONMENT
from packaging.requirements import Requirement

from mapet_ds import __version__
from mapet_ds.__main__ import programs
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.config.shipped import ENGINES, RECIPES, shipped_file, shipped_names

FOLDERS = ("mapet_ds", "tools", "ds_configs", "slurm")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel was installed by pip, as into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, folder / "source" / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run(wheel, check=True)
    (file,) = folder.glob("*.whl")
    assert file.name.startswith(f"mapet_ds-{__version__}-")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", file], check=True)
    shutil.rmtree(folder / "source")
    return folder / "site"


def mapet(installed, *words):
    environment = {**ENVIRONMENT, "PYTHONPATH": str(installed)}
    command = [sys.executable, installed / "bin/mapet", *words]
    return subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True)


def test_everything_that_the_repository_ships_is_in_it(installed):
    def files(folder):
        return {
            path.relative_to(folder)
            for path in folder.rglob("*")
            if path.is_file() and path.suffix in (".py", ".yaml", ".json", ".html", ".sh")
        }

    package = files(REPOSITORY / "mapet_ds")
    assert package <= files(installed / "mapet_ds")
    for name in FOLDERS[1:]:
        assert files(REPOSITORY / name) == files(installed / "mapet_ds/shipped" / name)


def test_its_command_names_programs_recipes_and_where_things_are(installed):
    done = mapet(installed)
    assert done.returncode == 0, done.stderr
    for word in ("pretrain", "fit_codebook", "mapet_vitb16", "zero2", f"{installed}/mapet_ds/shipped/slurm"):
        assert word in done.stdout
    wrong = mapet(installed, "pretrian")
    assert wrong.returncode == 2
    assert wrong.stderr == "mapet pretrian: there is no such program. Did you mean pretrain?\n"


def test_a_recipe_and_an_engine_are_found_by_name(installed, tmp_path):
    (tmp_path / "images").mkdir()
    settings = [
        f"data.train={tmp_path}/images",
        f"tokenizer.path={tmp_path}/missing",
        f"run_dir={tmp_path}/run",
    ]
    done = mapet(
        installed, "pretrain", "--check", "--config", "mapet_vitb16", "--deepspeed_config", "zero2_cpu",
        "train.micro_batch_size=2048", *settings,
    )  # fmt: skip
    assert done.returncode == 2 and "missing is not a file" in done.stderr, done.stderr
    wrong = mapet(installed, "pretrain", "--config", "mapet_vitb61", "--deepspeed_config", "zero2", *settings)
    assert wrong.returncode == 2 and "Did you mean mapet_vitb16?" in wrong.stderr, wrong.stderr


def test_a_program_runs_as_a_script(installed, tmp_path):
    done = mapet(installed, "export_timm", tmp_path, tmp_path / "out")
    assert done.returncode == 2 and "nothing to export" in done.stderr, done.stderr
    helped = mapet(installed, "benchmark", "--help")
    assert helped.returncode == 0 and "teacher" in helped.stdout, helped.stderr


def test_names_are_found_from_any_folder_and_ones_own_files_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_file("mapet_ds/recipes/mapet_vitb16.yaml", RECIPES) == RECIPES / "mapet_vitb16.yaml"
    assert shipped_file("ds_configs/zero3.json", ENGINES) == shipped_file("zero3", ENGINES)
    assert {RECIPES / f"{name}.yaml" for name in shipped_names(RECIPES)} == set(RECIPES.glob("*.yaml"))
    (tmp_path / "mapet_vitb16").write_text("own")
    assert os.fspath(shipped_file("mapet_vitb16", RECIPES)) == "mapet_vitb16"
    assert os.fspath(shipped_file("mine/mapet_vitb16.yaml", RECIPES)) == "mine/mapet_vitb16.yaml"
    assert {"pretrain", "finetune", "evaluate"} <= programs().keys()


def test_the_pinned_versions_are_those_that_the_package_asks_for():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    pins = {pin.name: pin.specifier for pin in (Requirement(line) for line in lines if line[:1].isalpha())}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(line) for line in project["dependencies"] + extras["train"]]
    assert {requirement.name for requirement in asked} <= pins.keys()
    exact = [pin for pin in pins if str(pins[pin]).startswith("==")]
    assert len(exact) > 10
    for requirement in asked:
        if requirement.name in exact:
            pinned = str(pins[requirement.name]).removeprefix("==")
            assert requirement.specifier.contains(pinned), requirement
