"""Two hosts for real: deepspeed over ssh, and the SLURM scripts under SLURM. `make drill` runs it."""

import json
import os
import signal
import subprocess
import sys
import time

import cluster
import psutil
import pytest
from forked import free_port
from line import command, losses, make_line, pretrain, steps

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.training.checkpoint import newest

pytestmark = [pytest.mark.drill, pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())]
SETTINGS = ["train.epochs=200", "checkpoint.every_steps=50", "log.images_every_steps=0"]  # 1125 steps


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_line(tmp_path_factory.mktemp("line"))


@pytest.fixture(scope="module")
def straight(recipe):
    """Losses of the uninterrupted run on two ranks."""
    done = pretrain(recipe, 2, f"run_dir={recipe.parent}/straight", *SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(recipe.parent / "straight")


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    with cluster.hosts(tmp_path_factory.mktemp("hosts")) as environment:
        yield environment


@pytest.fixture
def by_hostfile(two_hosts, tmp_path):
    """Starts a program under deepspeed on the hosts that are named."""

    def start(names, program, *arguments):
        hostfile, environment = tmp_path / "hosts", tmp_path / "environment"
        environment.write_text("SEEN=yes\nOMP_NUM_THREADS=1\n")
        hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
        words = [
            "deepspeed",
            "--hostfile",
            hostfile,
            "--master_addr",
            "n1",
            "--master_port",
            free_port(),
            program,
            *arguments,
        ]
        words[0] = os.path.join(os.path.dirname(sys.executable), "deepspeed")
        return subprocess.Popen(
            [str(word) for word in words], cwd=REPOSITORY,
            env={**two_hosts, "DS_ENV_FILE": str(environment)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def training(recipe, run_dir, *more):
    return ["mapet_ds/pretrain.py", *command(recipe, 1, f"run_dir={run_dir}", *SETTINGS, *more)[2:]]


def ranks(run_dir):
    """Processes of this run's ranks and launchers, and the ssh that lead to them."""
    found = [
        each
        for each in psutil.process_iter(["cmdline"])
        if str(run_dir) in " ".join(each.info["cmdline"] or [])
    ]
    return [each for each in found if each.pid != os.getpid()]


def test_the_launchers_environment_file_reaches_every_host(by_hostfile, tmp_path):
    (tmp_path / "program.py").write_text(
        "import os\nprint('rank', os.environ['RANK'], os.environ.get('SEEN'))\n"
    )
    said, _ = by_hostfile(["n1", "n2"], tmp_path / "program.py").communicate(timeout=120)
    assert {"rank 0 yes", "rank 1 yes"} <= {line.partition(": ")[2] for line in said.splitlines()}


def test_two_hosts_by_ssh_are_the_same_run(by_hostfile, recipe, straight, tmp_path):
    run_dir = tmp_path / "a run"
    process = by_hostfile(["n1", "n2"], *training(recipe, run_dir))
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-3000:]
    assert losses(run_dir) == straight
    assert (run_dir / "DONE").exists()


def test_a_host_that_dies_ends_the_run_and_the_same_command_continues(
    by_hostfile, recipe, straight, tmp_path
):
    run_dir = tmp_path / "run"
    process = by_hostfile(["n1", "n2"], *training(recipe, run_dir))
    cluster.wait_for(lambda: steps(run_dir) > 120, 120)
    for each in ranks(run_dir):
        with_node = " ".join(each.cmdline())
        if "--node_rank=1" in with_node or each.environ().get("RANK") == "1":
            each.send_signal(signal.SIGKILL)
    process.communicate(timeout=90)
    cluster.wait_for(lambda: not ranks(run_dir), 30)
    assert not (run_dir / "DONE").exists()
    assert newest(run_dir).run["step"] >= 100
    process = by_hostfile(["n1", "n2"], *training(recipe, run_dir))
    process.communicate(timeout=400)
    assert losses(run_dir) == straight


def test_a_host_that_is_not_there_ends_the_start_with_a_sentence(by_hostfile, recipe, tmp_path):
    process = by_hostfile(["n1", "n3"], *training(recipe, tmp_path / "run", "train.hang_seconds=20"))
    said, _ = process.communicate(timeout=120)
    assert "1 of 2 ranks" in said
    assert process.returncode != 0
    assert not ranks(tmp_path / "run")


@pytest.fixture(scope="module")
def slurm(two_hosts, tmp_path_factory):
    with cluster.slurm(tmp_path_factory.mktemp("slurm"), two_hosts) as environment:
        yield environment


@pytest.fixture
def submit(slurm, recipe, tmp_path):
    """Queues a script with the tiny recipe on both nodes; gives the job's number."""

    def submit(*options, launcher="ssh", script="slurm/pretrain_vitl.sh"):
        environment = {
            **slurm, "LAUNCHER": launcher, "DATA": str(recipe.parent / "train"),
            "RUN_DIR": str(tmp_path / "run"), "RECIPE": str(recipe),
            "CODEBOOK": str(recipe.parent / "codebook.safetensors"), "ENGINE": "ds_configs/zero2_cpu.json",
        }  # fmt: skip
        words = [
            "sbatch",
            "--parsable",
            "--partition=low",
            "--nodes=2",
            "--gpus-per-node=1",
            f"--output={tmp_path}/job.out",
        ]
        words += [*options, script, *SETTINGS]
        done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return submit


def state(slurm, job):
    return cluster.ask(slurm, "scontrol", "show", "job", job).partition("JobState=")[2].split()[0]


def ended(run_dir, seconds=600):
    cluster.wait_for(lambda: (run_dir / "DONE").exists(), seconds)


BY = pytest.mark.parametrize("launcher", ["ssh", "srun"])


@BY
def test_a_preempted_job_comes_back_and_ends_as_if_nothing_had_been(
    slurm, submit, straight, tmp_path, launcher
):
    run_dir = tmp_path / "run"
    job = submit(launcher=launcher)
    cluster.wait_for(lambda: steps(run_dir) > 120, 200)
    words = ["sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"]
    subprocess.run(words, env=slurm, check=True, stdout=subprocess.DEVNULL)
    cluster.wait_for(lambda: state(slurm, job) in ("PENDING", "REQUEUED"), 100)
    saved = newest(run_dir).run["step"]
    assert saved == steps(run_dir) > 120, "it saved where it was"
    ended(run_dir)
    assert losses(run_dir) == straight
    assert "Restarts=1" in cluster.ask(slurm, "scontrol", "show", "job", job)


@BY
def test_a_time_limit_is_a_pause(slurm, submit, straight, tmp_path, launcher):
    job = submit("--time=2", "--signal=B:USR1@50", launcher=launcher)
    ended(tmp_path / "run")
    assert losses(tmp_path / "run") == straight
    assert int(cluster.ask(slurm, "scontrol", "show", "job", job).partition("Restarts=")[2].split()[0]) >= 1


@BY
def test_a_cancelled_job_saves_and_stays_away(slurm, submit, straight, tmp_path, launcher):
    run_dir = tmp_path / "run"
    job = submit(launcher=launcher)
    cluster.wait_for(lambda: steps(run_dir) > 120, 200)
    subprocess.run(["scancel", job], env=slurm, check=True)
    cluster.wait_for(lambda: state(slurm, job) == "CANCELLED" and not ranks(run_dir), 100)
    assert newest(run_dir).run["step"] == steps(run_dir) > 120
    time.sleep(10)
    assert state(slurm, job) == "CANCELLED"
    submit(launcher=launcher)
    ended(run_dir)
    assert losses(run_dir) == straight


def test_a_drained_node_lets_the_job_end(slurm, submit, straight, tmp_path):
    run_dir = tmp_path / "run"
    submit()
    cluster.wait_for(lambda: steps(run_dir) > 120, 200)
    update = ["scontrol", "update", "nodename=n2"]
    subprocess.run([*update, "state=drain", "reason=drill"], env=slurm, check=True)
    ended(run_dir)
    subprocess.run([*update, "state=resume"], env=slurm, check=True)
    assert losses(run_dir) == straight


def test_a_rank_that_dies_ends_a_job_under_srun(slurm, submit, tmp_path):
    run_dir = tmp_path / "run"
    job = submit(launcher="srun")
    cluster.wait_for(lambda: steps(run_dir) > 60, 200)
    for each in ranks(run_dir):
        if each.environ().get("RANK") == "1":
            each.send_signal(signal.SIGKILL)
    cluster.wait_for(lambda: state(slurm, job) == "FAILED" and not ranks(run_dir), 100)
    assert not (run_dir / "DONE").exists()
    assert "before the last step" in (tmp_path / "job.out").read_text()


@BY
def test_the_first_day_passes_what_can_run_here(slurm, submit, tmp_path, launcher):
    job = submit(launcher=launcher, script="slurm/first_day.sh")
    cluster.wait_for(lambda: state(slurm, job) in ("COMPLETED", "FAILED"), 900)
    said = (tmp_path / "job.out").read_text()
    assert state(slurm, job) == "COMPLETED", said
    lines = [json.loads(line) for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    left_out = {line["step"] for line in lines if line["verdict"] == "left out"}
    assert left_out == {"stand_in_codebook", "plan"}  # the line has a codebook, and these are CPUs
    figures = {line["step"]: line["figures"] for line in lines}
    assert figures["hosts"]["ranks"] == figures["allreduce"]["ranks"] == 2
    assert figures["all_nodes"]["losses_differ_by"] < 1e-3
    assert "sbatch --nodes=2 slurm/pretrain_vitb.sh" in said
