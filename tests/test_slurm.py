"""The SLURM scripts in bash, with stand-ins for scontrol, squeue, srun and launchers that take notes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY

SCRIPTS = ["slurm/pretrain_vitb.sh", "slurm/pretrain_vitl.sh"]

SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'n1\\nn2\\n' | head -n "${NODES:-2}"; else echo "$*" >>"$NOTES/scontrol"; fi
"""

SQUEUE = """#!/bin/bash
echo "$*" >>"$NOTES/squeue"
echo "${STATE:-RUNNING}"
"""

# Notes its options, and is then the first of its hosts.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >>"$NOTES/srun"; shift; done
SLURM_NODEID=0 exec "$@"
"""

# Notes its arguments, one string a line, and the environment file; then behaves as a trainer would.
LAUNCHER = """#!/bin/bash
printf '%s\\n' "$@" >>"$NOTES/arguments"; echo --- >>"$NOTES/arguments"
cp "$DS_ENV_FILE" "$NOTES/env"
if [[ "$*" == *fit_codebook* ]]; then
    echo $$ >"$NOTES/fitting"
    [[ $FIT == slow ]] && exec sleep 60
    touch "$CODEBOOK_PATH"
    exit 0
fi
if [[ "$*" == *tokenize_images* ]]; then
    [[ $IDS == *fails ]] && exit 0
    mkdir "$IDS" && touch "$IDS/ids.json"
    exit 0
fi
touch "$NOTES/training"
case $TRAIN in
    done) echo "100 steps" >"$RUN_DIR/DONE" ;;
    crash) exit 0 ;;
    code) exit 7 ;;
    wait)
        rm -f "$RUN_DIR/STOP"
        for _ in {1..200}; do
            [[ -f $RUN_DIR/STOP ]] && { sleep 0.5; touch "$NOTES/saved"; exit 1; }
            sleep 0.1
        done ;;
    asked) touch "$RUN_DIR/STOP" ;;
esac
"""


@pytest.fixture
def job(tmp_path):
    """Starts a script as SLURM would, on two nodes of eight GPUs; paths have spaces in them."""
    notes, programs = tmp_path / "notes", tmp_path / "programs"
    notes.mkdir()
    programs.mkdir()
    stand_ins = {
        "scontrol": SCONTROL,
        "squeue": SQUEUE,
        "srun": SRUN,
        "deepspeed": LAUNCHER,
        "torchrun": LAUNCHER,
    }
    for name, text in stand_ins.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    run_dir, started = tmp_path / "a run", []

    def start(*overrides, script=SCRIPTS[1], **environment):
        spooled = tmp_path / "slurm_script"  # SLURM runs a copy, from another folder
        shutil.copy(REPOSITORY / script, spooled)
        full = {
            **os.environ, "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "NOTES": str(notes), "USER": "me", "SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": "41234",
            "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8", "DATA": str(tmp_path / "my data"),
            "RUN_DIR": str(run_dir),
            "TRAIN": "done", "FIT": "",
            "CODEBOOK_PATH": str(run_dir / "codebook.safetensors"), **environment,
        }  # fmt: skip
        process = subprocess.Popen(
            ["bash", str(spooled), *overrides], env=full, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    start.notes, start.run_dir = notes, run_dir
    yield start
    for process in started:
        process.kill()


def _wait_for(path: Path) -> None:
    for _ in range(300):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def _finish(process) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def _launches(job) -> list[list[str]]:
    return [text.strip().split("\n") for text in (job.notes / "arguments").read_text().split("---\n") if text]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_run_fits_its_codebook_and_trains(job, script):
    code, output = _finish(job("optim.lr=1e-3", script=script))
    assert code == 0, output
    assert (job.run_dir / "hostfile").read_text() == "n1 slots=8\nn2 slots=8\n"
    fit, train = _launches(job)
    hosts = ["--hostfile", str(job.run_dir / "hostfile"), "--master_addr", "n1", "--master_port", "11234"]
    assert fit[:6] == train[:6] == hosts
    recipe = f"mapet_ds/recipes/{Path(script).stem.replace('pretrain_', 'mapet_')}16.yaml"
    data = f"data.train={job.run_dir.parent / 'my data'}"
    codebook = f"tokenizer.path={job.run_dir / 'codebook.safetensors'}"
    assert fit[6:] == ["tools/fit_codebook.py", "--config", recipe, data, codebook, "optim.lr=1e-3"]
    assert train[6:] == [
        "mapet_ds/pretrain.py", "--config", recipe, "--deepspeed_config", "ds_configs/zero2.json",
        f"run_dir={job.run_dir}", "train.world_size=16", data, codebook, "optim.lr=1e-3",
    ]  # fmt: skip
    assert not (job.run_dir / "STOP").exists()
    assert not (job.notes / "scontrol").exists()


@pytest.mark.parametrize("recipe", ["saim_vitb16", "conmim_vitl16", "mvp_vitb16"])
def test_a_recipe_that_needs_no_codebook_fits_none(job, recipe):
    code, output = _finish(job(RECIPE=f"mapet_ds/recipes/{recipe}.yaml"))
    assert code == 0, output
    (train,) = _launches(job)
    assert train[6:9] == ["mapet_ds/pretrain.py", "--config", f"mapet_ds/recipes/{recipe}.yaml"]


def test_what_the_trainer_is_given_is_accepted_by_it(job, tmp_path):
    assert _finish(job())[0] == 0
    _, train = _launches(job)
    config = load_config(REPOSITORY / train[8], train[11:])
    assert config.run_dir == str(job.run_dir)
    assert config.train.world_size == 16
    assert load_deepspeed_config(REPOSITORY / train[10])["bf16"] == {"enabled": True}


def test_an_existing_codebook_is_used(job, tmp_path):
    codebook = tmp_path / "my codebook.safetensors"
    codebook.touch()
    assert _finish(job(CODEBOOK=str(codebook)))[0] == 0
    (train,) = _launches(job)
    assert f"tokenizer.path={codebook}" in train


def test_ids_that_are_asked_for_are_written_once(job, tmp_path):
    ids = tmp_path / "my ids"
    assert _finish(job("data.threads=8", IDS=str(ids)))[0] == 0
    fit, tokenize, train = _launches(job)
    assert not any(word.startswith("tokenizer.ids") for word in fit)
    assert tokenize[6:9] == ["tools/tokenize_images.py", "--config", "mapet_ds/recipes/mapet_vitl16.yaml"]
    assert tokenize[-2:] == train[-2:] == ["data.threads=8", f"tokenizer.ids={ids}"]
    (job.run_dir / "codebook.safetensors").unlink()
    (job.notes / "arguments").unlink()
    assert _finish(job(IDS=str(ids)))[0] == 0
    (train,) = _launches(job)
    assert train[6] == "mapet_ds/pretrain.py"


def test_without_the_ids_that_are_asked_for_there_is_no_training(job, tmp_path):
    code, output = _finish(job(IDS=str(tmp_path / "fails")))
    assert code == 1, output
    assert not (job.notes / "training").exists()


def test_the_sites_variables_reach_every_host(job):
    assert _finish(job())[0] == 0
    lines = (job.notes / "env").read_text().splitlines()
    variables = dict(
        line.split("=", 1) for line in lines
    )  # as deepspeed reads it: a line without = would stop it
    assert variables["TORCH_EXTENSIONS_DIR"] == "/tmp/me/torch_extensions"
    exported = re.findall(r"^export (\w+)=", (REPOSITORY / "slurm/cluster.env.sh").read_text(), re.MULTILINE)
    assert set(exported) <= set(variables)


def test_what_libraries_read_reaches_every_host_and_secrets_do_not(job):
    """deepspeed's remote shells show each variable to whoever lists the processes of a host."""
    given = {"HF_HOME": "/data/my models", "HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "INFO", "HF_TOKEN": "secret"}
    assert _finish(job(**given, NCCL_NOTE="two\nlines"))[0] == 0
    lines = (job.notes / "env").read_text().splitlines()
    assert {"HF_HOME=/data/my models", "HF_HUB_OFFLINE=1", "NCCL_DEBUG=INFO"} <= set(lines)
    assert not any("secret" in line or "NCCL_NOTE" in line for line in lines)
    assert len({line.partition("=")[0] for line in lines}) == len(lines)


def test_srun_starts_a_torchrun_on_each_host(job):
    code, output = _finish(job("optim.lr=1e-3", LAUNCHER="srun"))
    assert code == 0, output
    options = (job.notes / "srun").read_text().splitlines()
    assert options[:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n2"]
    fit, train = _launches(job)
    hosts = [
        "--node_rank=0", "--nnodes=2", "--nproc_per_node=8", "--master_addr=n1", "--master_port=11234",
    ]  # fmt: skip
    assert fit[:6] == [*hosts, "tools/fit_codebook.py"]
    assert train[:6] == [*hosts, "mapet_ds/pretrain.py"]
    assert train[-1] == "optim.lr=1e-3" and "train.world_size=16" in train
    assert f"run_dir={job.run_dir}" in train  # with its space


def test_another_launcher_is_refused(job):
    code, output = _finish(job(LAUNCHER="mpirun"))
    assert code != 0
    assert "LAUNCHER=mpirun is not known: it is ssh or srun." in output
    assert not (job.notes / "arguments").exists()


def test_one_node_needs_no_ssh(job):
    assert _finish(job(NODES="1"))[0] == 0
    fit, train = _launches(job)
    assert fit[6] == train[6] == "--no_ssh_check"
    assert "train.world_size=8" in train


LAUNCHERS = pytest.mark.parametrize("launcher", ["ssh", "srun"])


TASK = {"SLURM_ARRAY_JOB_ID": "41234", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
    ("number", "launcher", "task"),
    [(signal.SIGUSR1, "ssh", TASK), (signal.SIGTERM, "ssh", {}), (signal.SIGTERM, "srun", {})],
)
def test_a_warning_stops_the_ranks_in_order_and_requeues(job, number, launcher, task):
    """One task of an array has the array's number, and so names itself by both."""
    process = job(TRAIN="wait", LAUNCHER=launcher, **task)
    _wait_for(job.notes / "training")
    process.send_signal(number)
    code, output = _finish(process)
    assert code == 0, output
    assert (job.notes / "saved").exists()  # it waited for the ranks
    name = "41234_3" if task else "41234"
    assert (job.notes / "scontrol").read_text() == f"requeue {name}\n"
    assert (job.notes / "squeue").read_text() == f"--noheader --jobs {name} --format %T\n"
    assert not (job.run_dir / "STOP").exists()


@LAUNCHERS
def test_a_warning_while_the_codebook_is_fitted_requeues_without_training(job, launcher):
    process = job(FIT="slow", LAUNCHER=launcher)
    _wait_for(job.notes / "fitting")
    process.send_signal(signal.SIGUSR1)
    code, output = _finish(process)
    assert code == 0, output
    assert not (job.notes / "training").exists()
    assert (job.notes / "scontrol").read_text() == "requeue 41234\n"
    assert not Path(f"/proc/{(job.notes / 'fitting').read_text().strip()}").exists()


@LAUNCHERS
def test_a_cancelled_job_saves_and_is_not_requeued(job, launcher):
    """scancel and preemption send TERM to all processes of the job; preemption queues it again by itself."""
    process = job(TRAIN="wait", STATE="COMPLETING", LAUNCHER=launcher)
    _wait_for(job.notes / "training")
    os.killpg(process.pid, signal.SIGTERM)
    code, output = _finish(process)
    assert code == 0, output
    assert (job.notes / "saved").exists()  # the launcher has outlived the signal
    assert not (job.notes / "scontrol").exists()
    assert not (job.run_dir / "STOP").exists()


@pytest.mark.parametrize(("train", "expected"), [("crash", 1), ("code", 7)])
def test_ranks_that_die_are_a_failure_whatever_the_launcher_says(job, train, expected):
    job.run_dir.mkdir()
    (job.run_dir / "DONE").write_text("of an earlier run")
    code, output = _finish(job(TRAIN=train))
    assert code == expected
    assert "before the last step" in output
    assert not (job.notes / "scontrol").exists()


def test_a_users_stop_is_orderly_and_is_not_requeued(job):
    code, output = _finish(job(TRAIN="asked"))
    assert code == 0
    assert "submit the same job again" in output
    assert not (job.notes / "scontrol").exists()


@pytest.mark.parametrize("name", ["DATA", "RUN_DIR"])
def test_a_missing_setting_is_named(job, name):
    code, output = _finish(job(**{name: ""}))
    assert code != 0
    assert f"{name}=/" in output


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_batch_lines(script):
    lines = re.findall(r"^#SBATCH (\S+)$", (REPOSITORY / script).read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(lines)
    options = dict(line.removeprefix("--").split("=", 1) for line in lines if "=" in line)
    recipe = load_config(REPOSITORY / f"mapet_ds/recipes/{options['job-name']}16.yaml")
    world_size = int(options["nodes"]) * int(options["gpus-per-node"])
    assert recipe.train.global_batch_size % (world_size * recipe.train.micro_batch_size) == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(
        ["shellcheck", "-x", "--format=json", *map(str, sorted((REPOSITORY / "slurm").glob("*.sh")))],
        capture_output=True, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert json.loads(done.stdout) == []
