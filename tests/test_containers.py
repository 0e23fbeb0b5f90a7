"""Containers and clouds: what a build takes in, the versions it installs, when a start is tried again.

No daemon, cluster or cloud is asked: docs/containers.md says what was not run.
"""

import os
import re
import shlex
import subprocess
import time
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY

CONTAINERS = REPOSITORY / "containers"
DOCKERFILE = (CONTAINERS / "Dockerfile").read_text()
APPTAINER = (CONTAINERS / "mapet_ds.def").read_text()
RUNTIME, TRAIN_JOB = yaml.safe_load_all((REPOSITORY / "examples/kubernetes.yaml").read_text())
SKYPILOT = yaml.safe_load((REPOSITORY / "examples/skypilot.yaml").read_text())

PIP = """#!/bin/bash
echo "$*" >>"$NOTES"
cat >>"$NOTES"
"""

# The trainer's check, whose exit code is CHECK.
PYTHON = """#!/bin/bash
[[ "$*" == "mapet_ds/pretrain.py --check"* ]] || exit 99
exit "$CHECK"
"""

# A launch that ends as TRAIN says; `wait` until it is asked to.
TORCHRUN = """#!/bin/bash
echo "$PET_NPROC_PER_NODE $*" >"$NOTES"
case $TRAIN in
    done) echo "100 steps" >"$RUN/DONE" ;;
    asked) touch "$RUN/STOP" ;;
    elsewhere) ;;
    crash) exit 1 ;;
    wait)
        trap 'touch "$RUN/saved"; exit 1' TERM
        touch "$RUN/training"
        for _ in {1..200}; do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Starts a script of containers/ with stand-ins of these programs; gives the process."""
    (tmp_path / "programs").mkdir()
    (tmp_path / "run").mkdir()

    def start(name, *arguments, programs=(), **environment):
        for program, text in dict(programs).items():
            (tmp_path / "programs" / program).write_text(text)
            (tmp_path / "programs" / program).chmod(0o755)
        environment |= {"PATH": f"{tmp_path}/programs:{os.environ['PATH']}", "NOTES": f"{tmp_path}/notes"}
        return subprocess.Popen(
            ["bash", str(CONTAINERS / name), *arguments],
            env={**os.environ, **environment}, cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def pinned(lines):
    wanted = [Requirement(line) for line in lines if line[:1].isalpha()]
    return {requirement.name: str(requirement.specifier) for requirement in wanted}


def test_what_is_installed_is_what_requirements_pin(script, tmp_path):
    assert script("install.sh", "13", programs={"pip": PIP}).wait() == 0
    command, *lines = (tmp_path / "notes").read_text().splitlines()
    assert pinned(lines) == pinned((REPOSITORY / "requirements.txt").read_text().splitlines())
    assert command == "install --no-cache-dir -r /dev/stdin"
    assert "-e" not in " ".join(lines)


def test_for_cuda_12_torch_comes_from_its_index_and_the_rest_as_in_the_extra(script, tmp_path):
    assert script("install.sh", "12", "https://index", programs={"pip": PIP}).wait() == 0
    first, rest = (tmp_path / "notes").read_text().split("install --no-cache-dir")[1:]
    assert first.startswith(" --index-url https://index ")
    pins = pinned((REPOSITORY / "requirements.txt").read_text().splitlines())
    assert pinned(first.splitlines()) == {name: pins.pop(name) for name in ("torch", "torchvision")}
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for other in ("nvidia-dali-cuda130", "faiss-gpu"):
        del pins[other]
    got = pinned(rest.splitlines())
    assert got == pins | pinned(extras["train-cuda12"])


def test_another_cuda_is_a_sentence(script):
    process = script("install.sh", "11", programs={"pip": PIP})
    assert process.communicate()[0].startswith("CUDA = 11: it is 13 or 12.")
    assert process.returncode == 2


ARGUMENTS = ("--config", "recipe", "--deepspeed_config", "zero2")


@pytest.mark.parametrize(
    ("train", "check", "code", "says"),
    [
        ("done", 0, 0, "done, 100 steps"),
        ("asked", 0, 0, "the same command continues"),
        ("elsewhere", 0, 75, "asked to stop"),
        ("crash", 0, 1, "ended before the last step"),
        ("done", 2, 2, ""),
    ],
)
def test_the_exit_code_says_whether_to_start_again(script, tmp_path, train, check, code, says):
    run = tmp_path / "run"
    (run / "DONE").write_text("of an earlier run")
    (run / "STOP").touch()
    process = script(
        "train.sh", *ARGUMENTS, f"run_dir={run}", TRAIN=train, CHECK=str(check), RUN=str(run),
        programs={"python": PYTHON, "torchrun": TORCHRUN},
    )  # fmt: skip
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert says in output
    assert (tmp_path / "notes").exists() == (check == 0)


def test_a_machine_that_is_taken_away_saves_first(script, tmp_path):
    run = tmp_path / "run"
    process = script(
        "train.sh", *ARGUMENTS, f"run_dir={run}", TRAIN="wait", CHECK="0", RUN=str(run),
        PET_NPROC_PER_NODE="8", programs={"python": PYTHON, "torchrun": TORCHRUN},
    )  # fmt: skip
    while not (run / "training").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, (run / "saved").exists()) == (75, True), output
    ranks, *words = (tmp_path / "notes").read_text().split()
    assert ranks == "8"
    assert words[-5:] == [*ARGUMENTS, f"run_dir={run}"]


def test_a_run_without_a_folder_is_a_sentence(script):
    process = script("train.sh", *ARGUMENTS)
    assert process.communicate()[0].startswith("No run_dir=DIR is given")
    assert process.returncode == 2


def test_the_images_have_what_a_run_needs_and_no_root():
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    taken = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored and all((REPOSITORY / name).exists() for name in taken)
    files = re.search(r"^%files\n(.*?)^$", APPTAINER, re.M | re.S)[1]
    assert {tuple(line.split()) for line in files.splitlines()} == {
        (name, f"/opt/mapet_ds/{name}") for name in taken
    }
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M) for word in line.split()]
    assert all(word == "." or word.partition("/")[0] in taken for word in copied)
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.M)[-1] == "1000"
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.M)
    assert re.findall(r"^From: (\S+)$", APPTAINER, re.M) == [base]
    for name, default in re.findall(r"^ARG (CUDA|TORCH_INDEX)=(\S+)$", DOCKERFILE, re.M):
        assert f"    {name}={default}\n" in APPTAINER
        assert default in (CONTAINERS / "install.sh").read_text()


def loads(arguments):
    """The recipe that a command of the trainer has; its engine's JSON loads, too."""
    words = [part for word in arguments for part in word.split("=", 1 if word.startswith("--") else 0)]
    settings = [word for word in words if re.match(r"[a-z_.]+=", word)]
    load_deepspeed_config(words[words.index("--deepspeed_config") + 1])
    return load_config(words[words.index("--config") + 1], settings)


def test_the_job_of_kubernetes():
    trainer, pod = TRAIN_JOB["spec"]["trainer"], RUNTIME["spec"]["template"]["spec"]
    assert TRAIN_JOB["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert TRAIN_JOB["spec"]["runtimeRef"]["name"] == RUNTIME["metadata"]["name"]
    assert trainer["command"] == ["bash", "containers/train.sh"]
    config = loads(trainer["args"])
    ranks = trainer["numNodes"] * trainer["numProcPerNode"]
    assert config.train.world_size == ranks
    assert config.train.global_batch_size % (ranks * config.train.micro_batch_size) == 0
    for resources in trainer["resourcesPerNode"].values():
        assert resources["nvidia.com/gpu"] == str(trainer["numProcPerNode"])

    # A mistake ends the job, anything else starts all pods anew, and they have time to save.
    (replicated,) = pod["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert pod["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert job["backoffLimit"] == 0
    template = job["template"]["spec"]
    wait = int(re.search(r"--shutdown-timeout (\d+)", (CONTAINERS / "train.sh").read_text())[1])
    assert template["terminationGracePeriodSeconds"] > wait
    assert template["securityContext"]["runAsUser"] == 1000
    (container,) = template["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in template["volumes"]}
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for path in (config.data.train, config.tokenizer.path, config.run_dir):
        assert str(path).startswith(tuple(mounts))


def test_the_task_of_skypilot(tmp_path):
    (command,) = [
        line for line in SKYPILOT["run"].replace("\\\n", " ").splitlines() if "containers/train.sh" in line
    ]
    config = loads(shlex.split(command)[2:])
    for path in (config.data.train, config.tokenizer.path, config.run_dir):
        assert str(path).startswith(tuple(SKYPILOT["file_mounts"]))
    assert SKYPILOT["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    exports = "\n".join(line for line in SKYPILOT["run"].splitlines() if "export" in line)
    given = {
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-euc", f"{exports}\nenv --null"], env={**os.environ, **given},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {line for line in done.stdout.split("\0") if line.startswith("PET_")} == {
        "PET_MASTER_ADDR=10.0.0.1", "PET_MASTER_PORT=29500", "PET_NNODES=2", "PET_NODE_RANK=1",
        "PET_NPROC_PER_NODE=8",
    }  # fmt: skip
