"""A CUDA device that runs nothing, for tests of the GPU path on any machine. README.md says what it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nullcuda.build import CannotBuild, build

__all__ = ["CannotBuild", "NullDevice"]

Facts = Mapping[str, Any]
"""What nullcuda/observe.py noted of a rank."""


class NullDevice:
    """Runs programs of the repository on null GPUs.

    Raises:
        CannotBuild: what the device is built with is missing.
    """

    def __init__(self, cache: Path, repository: Path) -> None:
        tests = str(Path(__file__).parent.parent)
        environment = {**os.environ, **build(cache), "OMP_NUM_THREADS": "1"}
        environment |= {"NULLCUDA_DEVICES": "2", "PYTHONPATH": os.pathsep.join((str(repository), tests))}
        for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
            environment.pop(name, None)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "nullcuda.observe"], cwd=repository, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self, folder: Path, *command: object, gpu: str = "h100", ranks: int = 1, port: int = 0,
        sanitize: bool = False,
    ) -> list[Facts]:  # fmt: skip
        """Runs a program to its end, on so many ranks; gives what each did in the step that is looked at.

        Its output stays in `folder`. gpu: h100, h200, a100-80 or a100-40. sanitize: torch's CUDA sanitizer
        looks on, and ends the program where streams are not ordered.
        """
        folder.mkdir(parents=True, exist_ok=True)
        words = {"folder": str(folder), "command": [str(word) for word in command], "gpu": gpu}
        words |= {"ranks": ranks, "port": port, "sanitize": sanitize}
        assert self._server.stdin and self._server.stdout
        print(json.dumps(words), file=self._server.stdin, flush=True)
        codes = json.loads(self._server.stdout.readline())
        for rank, code in enumerate(codes):
            printed = "".join((folder / f"rank_{rank}.{name}").read_text() for name in ("out", "err"))
            assert code == 0, f"{words['command'][0]}, rank {rank}, ended with {code}: {printed[-8000:]}"
        return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(ranks)]

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait()
