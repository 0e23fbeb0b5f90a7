"""Runs the project's programs in processes that have imported torch and DeepSpeed already.

A rank takes seven seconds of a core to import them, and the tests start hundreds. Here one process imports
them once, and is forked for each rank: the program itself, its command line, environment, files and exit
code are the user's. What is to be shown of a launcher or of a start itself must start it for real.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch._dynamo

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
GRACE = 10
"""Seconds from SIGTERM to SIGKILL for the ranks that are left when one has failed."""
_servers: list[subprocess.Popen] = []
"""The one of this process, once it is needed."""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(*command: object, timeout: float = 400) -> subprocess.CompletedProcess:
    """What subprocess.run gives of `python FILE ..`, with torchrun between or `env NAME=VALUE ..` before.

    Any other command is started as it stands.

    Raises:
        TimeoutExpired: it did not end in `timeout` seconds, and was killed.
    """
    words, environment, ranks = [str(word) for word in command], dict(ENVIRONMENT), 0
    rest = words[words[0] == "env" :]
    while "=" in rest[0]:
        environment.update([rest.pop(0).split("=", 1)])
    if rest[1:4] == TORCHRUN:
        ranks = int(rest.pop(4).removeprefix("--nproc_per_node="))
        del rest[1:4]
    if rest[0] != sys.executable or not rest[1].endswith(".py"):
        return subprocess.run(
            words, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
        )
    if not _servers:
        _servers.append(
            subprocess.Popen(
                [sys.executable, __file__],
                cwd=REPOSITORY,
                env=ENVIRONMENT,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        atexit.register(_end, _servers[0])
    (server,) = _servers
    with tempfile.TemporaryDirectory() as folder:
        job = {"command": rest[1:], "environment": environment, "ranks": ranks}
        job |= {"timeout": timeout, "folder": folder}
        assert server.stdin and server.stdout
        print(json.dumps(job), file=server.stdin, flush=True)
        code = json.loads(server.stdout.readline())
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    if code is None:
        raise subprocess.TimeoutExpired(words, timeout, out, err)
    return subprocess.CompletedProcess(words, code, out, err)


def _end(server: subprocess.Popen) -> None:
    assert server.stdin
    server.stdin.close()
    server.wait()


def serve() -> None:
    """Answers each job with its exit code, or with null where it took too long."""
    import faiss  # noqa: F401

    import mapet_ds.task  # noqa: F401
    from mapet_ds.run import Run  # noqa: F401

    for line in sys.stdin:
        job, ranks = json.loads(line), {}
        port = str(free_port())
        for rank in range(job["ranks"] or 1):
            child = os.fork()
            if child == 0:
                become(job, rank, port)
                runpy.run_path(sys.argv[0], run_name="__main__")
                return
            ranks[child] = None
        print(json.dumps(outcome(ranks, time.monotonic() + job["timeout"])), flush=True)


def become(job: dict, rank: int, port: str) -> None:
    """Takes the place of a fresh process of this rank."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(Path(job["folder"], name), flags, 0o644), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(job["environment"])
    if job["ranks"]:  # torchrun's
        local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"]}
        local |= {"LOCAL_WORLD_SIZE": job["ranks"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in local.items()})
    torch._dynamo.config.disable = job["environment"].get("TORCH_COMPILE_DISABLE") == "1"  # read at import
    sys.argv = job["command"]
    sys.path[:1] = [str(Path(sys.argv[0]).resolve().parent), *os.environ["PYTHONPATH"].split(os.pathsep)]


def outcome(ranks: dict[int, int | None], deadline: float) -> int | None:
    """Waits for all ranks. Where one fails the others are ended, as torchrun ends them."""
    late, alone = False, len(ranks) == 1
    while left := [rank for rank, code in ranks.items() if code is None]:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in ranks:
            ranks[child] = os.waitstatus_to_exitcode(status)
            if ranks[child]:
                for other in set(left) - {child}:
                    os.kill(other, signal.SIGTERM)
                deadline = min(deadline, time.monotonic() + GRACE)
        elif time.monotonic() > deadline:
            late = late or not any(ranks.values())
            for other in left:
                os.kill(other, signal.SIGKILL)
            deadline += GRACE
        else:
            time.sleep(0.02)
    codes = list(ranks.values())
    return None if late else codes[0] if alone else int(any(codes))


if __name__ == "__main__":
    serve()
