"""The way of a run on a GPU, on a CUDA device that runs nothing (tests/nullcuda).

Each case is the user's own command. `make gpu_path` runs all of them, `make test` those that hold most.
"""

import getpass
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from images import photos, write
from line import free_port
from nullcuda import CannotBuild, NullDevice

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.planning.counting import student, target
from mapet_ds.planning.forecast import GPUS, USABLE, Cluster, Request, Speeds, memory

pytestmark = pytest.mark.gpu_path

WAITS = {
    "deepspeed mask_nan_or_inf_with_val_inplace",  # the gradient's norm
    "deepspeed is_invalid_grad_norm",
    "deepspeed has_overflow",
    "mapet_ds to",  # images that were decoded on the CPU, as all are here
}
"""Library and function of the calls that may make the host wait in a step."""


class Case(NamedTuple):
    recipe: str
    engine: str = "zero2"
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    gpu: str = "h100"

    def __str__(self) -> str:
        words = [
            self.recipe,
            self.engine,
            *self.overrides,
            *([f"{self.ranks} ranks"] if self.ranks > 1 else []),
        ]
        return " ".join(words)


@pytest.fixture(scope="module")
def device():
    cache = Path(tempfile.gettempdir()) / f"nullcuda-of-{getpass.getuser()}"
    try:
        device = NullDevice(cache, REPOSITORY)
    except CannotBuild as reason:
        pytest.skip(f"the null CUDA device can't be built: {reason}")
    yield device
    device.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write(tmp_path_factory.mktemp("images"), photos(16))


def settings(case, images):
    """The overrides of a case: the recipe's micro-batch and sizes, a step of one micro-step, four steps."""
    micro = load_config(REPOSITORY / f"mapet_ds/recipes/{case.recipe}.yaml", []).train.micro_batch_size
    return [
        f"data.train={images}", "data.device=cpu", "data.workers=0", "data.threads=1", "log.progress=false",
        f"train.global_batch_size={micro * case.ranks}", "train.stop_at_step=4", "train.max_skipped_steps=0",
        "optim.adamw=torch", *case.overrides,
    ]  # fmt: skip


CASES = [Case("saim_vitb16", overrides=("train.compile=false",))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step(device, images, tmp_path, case):
    overrides = settings(case, images)
    command = ["mapet_ds/pretrain.py", "--config", f"mapet_ds/recipes/{case.recipe}.yaml"]
    command += ["--deepspeed_config", f"ds_configs/{case.engine}.json", f"run_dir={tmp_path}/run", *overrides]
    observed = device.run(tmp_path, *command, ranks=case.ranks, gpu=case.gpu, port=free_port())
    for facts in observed:
        assert unlisted(facts["waits"]) == []
        assert attention_by_loops(facts) == []
        assert facts["attention"]


def unlisted(waits):
    """The host's waits that are not in WAITS, with file and line."""
    found = []
    for place in waits:
        path, function = place.split(" < ")[0].split(" ")
        library = "mapet_ds" if "mapet_ds/" in path else path.split("/")[0]
        if f"{library} {function}" not in WAITS:
            found.append(place)
    return found


def attention_by_loops(facts):
    """Attention that no fused kernel computes."""
    fused = ("flash", "efficient", "cudnn")
    return [call for call in facts["attention"] if not any(kernel in call[0] for kernel in fused)]
