"""Builds the null CUDA device with gcc, in seconds. README.md says what it is."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
SITE = Path(torch.__file__).parent.parent
PRELOADED = ("runtime", "libraries", "nccl")
LIBRARIES = ("c10_cuda", "torch_cpu", "torch_cuda", "torch_cuda_linalg", "torch_python")
"""Libraries of torch that call CUDA's."""
RUNTIME = re.compile(r"(__)?(cuda|cublas|cudnn|cusolver|cusparse|cufft|nccl)\w+")


class CannotBuild(Exception):
    """Says what is missing."""


@functools.cache
def headers() -> Path:
    """A folder with the headers of torch's CUDA.

    Raises:
        CannotBuild: there is no such folder, or torch is built without CUDA.
    """
    if torch.version.cuda is None:
        raise CannotBuild(f"torch {torch.__version__} is built without CUDA")
    major = torch.version.cuda.split(".")[0]
    for folder in (SITE / "triton/backends/nvidia/include", Path("/usr/local/cuda/include")):
        header = folder / "cuda_runtime_api.h"
        if header.exists() and re.search(rf"define CUDART_VERSION +{major}0\d\d\b", header.read_text()):
            return folder
    raise CannotBuild(f"there are no headers of CUDA {major}, which Triton brings along")


def build(cache: Path) -> dict[str, str]:
    """Builds it once into a folder below `cache`; gives the environment in which a process meets it.

    Raises:
        CannotBuild: gcc, nm, torch's CUDA build or its headers are missing.
    """
    if missing := [tool for tool in ("gcc", "nm") if not shutil.which(tool)]:
        raise CannotBuild(f"{' and '.join(missing)} is not on PATH")
    include = headers()
    key = hashlib.sha256(torch.__version__.encode())
    for path in sorted(SOURCES.glob("*.[ch]")) + [Path(__file__)]:
        key.update(path.read_bytes())
    folder = cache / f"nullcuda-{key.hexdigest()[:16]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        begun = Path(tempfile.mkdtemp(dir=cache))
        _compile(begun, include)
        with contextlib.suppress(OSError):  # another process was faster
            begun.rename(folder)
        shutil.rmtree(begun, ignore_errors=True)
    return {
        "LD_PRELOAD": str(folder / "libnullcuda.so"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }


def _compile(folder: Path, include: Path) -> None:
    flags = ["-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unused", "-Wno-deprecated-declarations"]
    for name in (*PRELOADED, "driver"):
        _run("gcc", *flags, f"-I{include}", "-c", SOURCES / f"{name}.c", "-o", folder / f"{name}.o")

    # The runtime and its libraries, as torch's libraries call them.
    objects = [folder / f"{name}.o" for name in PRELOADED]
    called = _symbols("--undefined-only", *(SITE / f"torch/lib/lib{name}.so" for name in LIBRARIES))
    _link(folder / "libnullcuda.so", objects, {name for name in called if RUNTIME.fullmatch(name)})

    # The driver, as Triton's sources and torch's loader of compiled kernels call it.
    called = _symbols("--undefined-only", SITE / "torch/lib/libcaffe2_nvrtc.so")
    called |= set(re.findall(r"\bcu[A-Z]\w+(?=\()", (SITE / "triton/backends/nvidia/driver.c").read_text()))
    driver = {name for name in called if re.fullmatch(r"cu[A-Z]\w+", name)}
    _link(folder / "libcuda.so.1", [folder / "driver.o"], driver)


def _link(library: Path, objects: list[Path], called: set[str]) -> None:
    """Links a library. What is called and not answered for succeeds and is noted."""
    missing = sorted(called - _symbols("--defined-only", *objects))
    lines = ["int nullcuda_stub(const char *name);"]
    lines += [f'int {name}(void) {{ return nullcuda_stub("{name}"); }}' for name in missing]
    stubs = library.with_suffix(".stubs.c")
    stubs.write_text("\n".join(lines))
    _run("gcc", "-O1", "-fPIC", "-shared", "-o", library, *objects, stubs, "-ldl", "-lrt")


def _symbols(kind: str, *paths: Path) -> set[str]:
    lines = _run("nm", "--dynamic" if kind == "--undefined-only" else "--extern-only", kind, *paths)
    return {line.split()[-1].partition("@")[0] for line in lines.splitlines() if line.strip()}


def _run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"{command[0]} failed: {done.stderr}")
    return done.stdout
