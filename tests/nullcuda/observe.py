"""Runs programs of the project on the null device, and notes what a test may want to know of each rank.

    python -m nullcuda.observe

takes a job as one JSON line on standard input, and gives its exit codes as one line. torch, DeepSpeed and the
package are imported once; each rank of each job is forked from here, before CUDA is touched.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import faiss
import torch
import torch.utils.checkpoint

# DeepSpeed counts GPUs when it is imported, after which torch would refuse CUDA in a forked process.
count, torch._C._cuda_getDeviceCount = torch._C._cuda_getDeviceCount, lambda: 1
import mapet_ds.task  # noqa: E402, F401
from mapet_ds.run import Run  # noqa: E402

torch._C._cuda_getDeviceCount = count
faiss.get_num_gpus = lambda: 0  # its GPU code reads on the host what its kernels write

STEP = 3
"""The step that is looked at. Those before it compile blocks, and show DeepSpeed in which order to gather."""


def job(words: dict, rank: int) -> int:
    """A rank's part of a job: gives its exit code, and writes what it noted to FOLDER/rank_N.json."""
    folder, ranks = Path(words["folder"]), words["ranks"]
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"rank_{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    log = folder / f"rank_{rank}.log"
    os.environ |= {"NULLCUDA_DEVICE": words["gpu"], "NULLCUDA_LOG": str(log)}
    if ranks > 1:
        local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        local |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": words["port"]}
        os.environ |= {name: str(value) for name, value in local.items()}
    if words["sanitize"]:
        # Its import alone loses the exceptions that end a recomputation early (torch 2.14).
        importlib.import_module("torch.cuda._sanitizer").enable_cuda_sanitizer()
        torch.utils.checkpoint._enable_checkpoint_early_stop = False
    faulthandler.enable()  # where the host touches device memory

    # The program, and what became of it.
    notes, code = Notes(), 0
    notes.watch(Run)
    sys.argv = words["command"]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as Python does for a script
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    notes.mark("end")
    facts = notes.facts | launches(Path(f"{log}.{os.getpid()}"))
    (folder / f"rank_{rank}.json").write_text(json.dumps(facts))
    return code


class Notes:
    """What a rank did in step STEP of its run."""

    def __init__(self) -> None:
        self.facts: dict = {}
        self.library = ctypes.CDLL(None)

    def mark(self, text: str) -> None:
        self.library.nullcuda_mark(text.encode())

    def watch(self, run: type) -> None:
        step = run.train_step

        def train_step(self_: Run) -> None:
            if self_.step != STEP:
                return step(self_)
            self.mark("step")
            with self.waits(), self.shapes(), self.memory():
                step(self_)
            self.mark("after")

        run.train_step = train_step

    @contextmanager
    def waits(self):
        """Counts the calls that make the host wait for the GPU, by where they were made."""
        self.facts["waits"] = waits = Counter()

        def note(message, category, filename, lineno, file=None, line=None) -> None:
            if "synchroniz" in str(message):
                waits[place(traceback.extract_stack()[:-1])] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # which warns that it warns
            warnings.showwarning = note
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @contextmanager
    def memory(self):
        """Notes the bytes that the allocator reserved at most, and those that were in use at most.

        The latter is summed over streams: no stream uses what another one has let go of.
        """
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.memory._record_memory_history(context=None, stacks="python")
        held = Counter()
        for segment in torch.cuda.memory_snapshot():
            held[segment["stream"]] += segment["active_size"]
        yield
        peaks = Counter(held)
        for event in torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]:
            sign = {"alloc": 1, "free_completed": -1}.get(event["action"], 0)
            held[event["stream"]] += sign * event["size"]
            peaks[event["stream"]] = max(peaks[event["stream"]], held[event["stream"]])
        torch.cuda.memory._record_memory_history(enabled=None)
        self.facts |= {"in_use": peaks.total(), "reserved": torch.cuda.max_memory_reserved()}

    @contextmanager
    def shapes(self):
        """Notes the shapes of queries and keys of each attention."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            yield
        kernels = Counter(
            (event.name.removeprefix("aten::_"), str(event.input_shapes[0]), str(event.input_shapes[1]))
            for event in profile.events()
            if event.name.startswith("aten::_scaled_dot_product") and "backward" not in event.name
        )
        self.facts["attention"] = [[*kernel, count] for kernel, count in sorted(kernels.items())]


def place(stack: traceback.StackSummary) -> str:
    """Library, function, file and line of the innermost call outside of torch, and who called it."""
    calls = [
        f"{call.filename.rpartition('site-packages/')[2]}:{call.lineno} {call.name}"
        for call in stack[::-1]
        if not any(part in call.filename for part in ("/torch/", "nullcuda", "/warnings.py"))
    ]
    return " < ".join(calls[:4])


def launches(log: Path) -> dict:
    """How many kernels and products the step launched, and how many of them Triton compiled."""
    names, inside = [], False
    for line in log.open(errors="replace"):
        kind, _, rest = line.rstrip().partition(" ")
        if kind == "mark":
            inside = rest == "step"
        elif inside and kind in ("kernel", "gemm"):
            names.append(rest)
    return {"launches": len(names), "triton": sum(name.startswith("triton_") for name in names)}


def serve() -> None:
    for line in sys.stdin:
        words = json.loads(line)
        children = []
        for rank in range(words["ranks"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = job(words, rank)
                except BaseException:
                    traceback.print_exc()
                finally:  # the destructors of what was imported are not this process's to run
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        print(json.dumps(outcomes(children)), flush=True)


def outcomes(children: list[int]) -> list[int]:
    """The exit codes of all ranks. Where one fails, the others would wait for it: they are ended."""
    codes = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


if __name__ == "__main__":
    serve()
