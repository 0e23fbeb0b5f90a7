"""The process group, the hostfile and stop requests, in real processes under the real launchers."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from forked import ENVIRONMENT, free_port, start
from line import command

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import ConfigError
from mapet_ds.launch import agree_on_device, claim, init_distributed, say_what_triton_lacks, take_device
from mapet_ds.launchers import check_hostfile

HOLD = """
import sys, time
from pathlib import Path
from mapet_ds.launch import claim
lock = claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.parametrize(
    "words",
    [
        ["deepspeed", "--hostfile", "{}", "mapet_ds/pretrain.py"],
        ["/opt/venv/bin/python", "/opt/venv/bin/deepspeed", "--hostfile={}", "mapet_ds/pretrain.py"],
        ["deepspeed", "-H", "{}", "mapet_ds/pretrain.py"],
        ["ds", "-H", "{}", "mapet_ds/pretrain.py"],
    ],
)
def test_a_missing_hostfile_is_refused_and_a_present_one_is_not(tmp_path, words):
    hostfile = tmp_path / "my hosts"
    lines = [["bash", "job.sh"], [word.format(hostfile) for word in words]]
    with pytest.raises(ConfigError, match=re.escape(f"{hostfile} does not exist")):
        check_hostfile(lines)
    hostfile.write_text("localhost slots=1\n")
    check_hostfile(lines)


def test_a_hostfile_option_without_a_name_is_refused():
    with pytest.raises(ConfigError, match="no name"):
        check_hostfile([["deepspeed", "--hostfile"]])


@pytest.mark.parametrize(
    "words",
    [
        ["mpirun", "-H", "n1,n2", "python", "mapet_ds/pretrain.py"],
        ["torchrun", "--nproc_per_node=2", "mapet_ds/pretrain.py"],
        ["deepspeed", "--num_gpus", "2", "mapet_ds/pretrain.py"],
    ],
)
def test_other_command_lines_name_no_hostfile(words):
    check_hostfile([words])


def test_a_missing_hostfile_ends_the_real_command_with_a_sentence(tmp_path):
    """DeepSpeed alone would warn and train on this host."""
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "train").mkdir()
    model = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8}
    recipe.write_text(yaml.safe_dump({
        "run_dir": str(tmp_path / "run"), "model": model, "data": {"train": str(tmp_path / "train")},
        "teacher": {"name": "RN50", "img_size": 128}, "tokenizer": {"path": "nowhere"},
        "train": {"global_batch_size": 8, "micro_batch_size": 8},
    }))  # fmt: skip
    done = start(DEEPSPEED, "--hostfile", "/nowhere/hosts", *command(recipe, 1)[1:])
    assert done.returncode != 0
    assert "The hostfile /nowhere/hosts does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


GPUS = """
import os
from mapet_ds.launchers import ignored_gpus
print("RANK SAYS", ignored_gpus(os.environ["CUDA_VISIBLE_DEVICES"]))
"""


@pytest.mark.parametrize(
    ("gpu", "options", "says"),
    [
        ("3", ["--num_gpus", "1"], "CUDA_VISIBLE_DEVICES = 3, .* the GPUs 0. .*--include localhost:3"),
        ("0", [], "None"),
    ],
)
def test_gpus_that_deepspeed_ignores_are_named(tmp_path, gpu, options, says):
    (tmp_path / "gpus.py").write_text(GPUS)
    words = [DEEPSPEED, "--master_port", str(free_port()), *options, "--no_local_rank", tmp_path / "gpus.py"]
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": gpu}
    done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=100)
    assert re.search(f"RANK SAYS {says}", done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_named(monkeypatch, missing):
    complete = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    for name, value in complete.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE = 2, but {missing} is not set"):
        init_distributed()


def agree(*kinds):
    """The sentence that each rank raises, by its type of device, in threads that share a store."""
    store, sentences = dist.HashStore(), {}

    def rank(number, kind):
        try:
            agree_on_device(store, number, len(kinds), torch.device(kind))
        except ConfigError as error:
            sentences[number] = error

    threads = [threading.Thread(target=rank, args=place) for place in enumerate(kinds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return sentences


def test_a_host_without_a_gpu_is_named_by_one_rank_and_ends_all():
    assert agree("cuda", "cuda") == agree("cpu", "cpu", "cpu") == agree("cpu") == {}
    sentences = agree("cuda", "cpu", "cuda")
    assert sorted(sentences) == [0, 1, 2]
    assert re.search(f"sees no GPU on {socket.gethostname()}: look at nvidia-smi", str(sentences[1]))
    assert [sentences[i].printed_elsewhere for i in range(3)] == [False, True, True]


def test_a_rank_takes_the_gpu_of_its_number_without_cudnns_attention(monkeypatch):
    taken, switch = [], torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr("mapet_ds.launch.use_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    try:
        assert take_device(rank=9, local_rank=1) == torch.device("cuda", 1) and taken == [1]
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(switch)
    with pytest.raises(ConfigError, match="2 GPUs and rank 9 is its number 2"):
        take_device(rank=9, local_rank=2)


def test_a_host_that_can_not_compile_kernels_is_named(alone, monkeypatch, tmp_path, capsys):
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    say_what_triton_lacks(alone)
    assert capsys.readouterr().err == ""
    (tmp_path / "Python.h").unlink()
    monkeypatch.delenv("CC")
    say_what_triton_lacks(alone)
    expected = f"{socket.gethostname()} has no C compiler (gcc) and no Python.h (python3-dev), which Triton"
    assert expected in capsys.readouterr().err


@pytest.fixture
def step_on(tmp_path):
    """Starts launch_worker.py beside a STOP from before; gives the process once all have passed step 5."""
    started = []

    def start_ranks(launcher: list[str], ranks: int) -> subprocess.Popen:
        (tmp_path / "STOP").touch()
        environment = {name: value for name, value in ENVIRONMENT.items() if name not in LAUNCHER_VARIABLES}
        words = [*launcher, str(REPOSITORY / "tests/launch_worker.py"), str(tmp_path)]
        process = subprocess.Popen(words, env={**environment, "CUDA_VISIBLE_DEVICES": ""})
        started.append(process)
        wait_for(lambda: process.poll() is None and all(pid(tmp_path, rank) for rank in range(ranks)))
        assert not (tmp_path / "STOP").exists()
        return process

    yield start_ranks
    for number in (*(process.pid for process in started), *(pid(tmp_path, rank) for rank in range(2))):
        if number:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    for process in started:
        process.wait()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def pid(folder: Path, rank: int) -> int:
    path = folder / f"pid{rank}"
    return int(path.read_text() or 0) if path.exists() else 0


def ends(folder: Path, ranks: int) -> list[list[int]]:
    """Of each rank: local rank, world size, sum of ones over ranks, step of the stop; [] while it goes on."""
    paths = [folder / f"end{rank}" for rank in range(ranks)]
    return [[int(word) for word in path.read_text().split()] if path.exists() else [] for path in paths]


def test_a_plain_process_is_one_rank(tmp_path, step_on):
    process = step_on([sys.executable], 1)
    process.terminate()
    assert process.wait(timeout=60) == 0
    ((local_rank, world_size, total, _),) = ends(tmp_path, 1)
    assert (local_rank, world_size, total) == (0, 1, 1)


@pytest.mark.parametrize("ask", ["USR1 to the last rank", "STOP"])
def test_what_one_rank_is_asked_all_agree_on(tmp_path, step_on, ask):
    process = step_on(TORCHRUN, 2)
    if ask == "STOP":
        (tmp_path / "STOP").touch()
    else:
        os.kill(pid(tmp_path, 1), signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    first, last = ends(tmp_path, 2)
    assert (first[:3], last[:3]) == ([0, 2, 2], [1, 2, 2])
    assert first[3] == last[3] < 600


def test_ranks_whose_launcher_was_killed_stop_by_themselves(tmp_path, step_on):
    process = step_on([DEEPSPEED, "--num_gpus", "2", "--master_port", str(free_port())], 2)
    process.kill()
    wait_for(lambda: all(len(end) == 4 for end in ends(tmp_path, 2)))
    first, last = ends(tmp_path, 2)
    assert first[3] == last[3] < 600


def hold(folder, seconds):
    words = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    process = subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while (line := process.stdout.readline()) != "held\n":
        assert line, "it ended before it held the lock"
    return process


def test_a_folder_that_another_run_uses_is_waited_for_and_then_refused(tmp_path, capsys):
    with hold(tmp_path, 1000) as other:
        with pytest.raises(
            ConfigError, match=rf"in use by process {other.pid} on .*: end that run \(touch .*STOP"
        ):
            claim(tmp_path, 0)
        other.kill()
    claim(tmp_path, 0).close()
    with hold(tmp_path, 2):
        claim(tmp_path, 60).close()
    assert "its end is waited for" in capsys.readouterr().err


TELL = """
import torch.distributed as dist
from mapet_ds.errors import DataError
from mapet_ds.launch import init_distributed

ranks = init_distributed()
done = []

def refuse():
    raise DataError("nothing there")

assert ranks.gather(ranks.rank * 10) == [0, 10]
assert ranks.from_first(lambda: done.append(ranks.rank) or "from rank 0") == "from rank 0"
assert done == [0] * (ranks.rank == 0)
assert ranks.first_then_all(lambda: ranks.rank) == ranks.rank
try:
    ranks.from_first(refuse)
except DataError as error:
    said = f"rank {ranks.rank}: {error}, said by another: {error.printed_elsewhere}\\n"
    print(said, end="", flush=True)  # in one write: both ranks have the same pipe
dist.barrier()
dist.destroy_process_group()
"""


def test_ranks_tell_each_other_and_none_is_left_waiting(tmp_path):
    (tmp_path / "tell.py").write_text(TELL)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*TORCHRUN, tmp_path / "tell.py"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert lines == [
        "rank 0: nothing there, said by another: False",
        "rank 1: nothing there, said by another: True",
    ]
