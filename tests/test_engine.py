"""States gathered from one engine continue in another, at any ZeRO stage, precision and number of ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder import FusedAdamBuilder
from forked import ENVIRONMENT, TORCHRUN, start
from safetensors.torch import load_file
from test_objectives import tiny_config

from mapet_ds.config.running import OptimConfig
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import ConfigError
from mapet_ds.training.engine import build_adamw, check_engine_config

HERE = Path(__file__).parent
STAGES = (1, 2, 3)
CASES = [f"zero{stage}{precision}" for stage in STAGES for precision in ("", "_bf16")]


def torchrun(ranks, *arguments, accelerator="cpu"):
    """A test program under torchrun, as a user's cluster would start ours, on this type of device."""
    command = [sys.executable, *TORCHRUN, f"--nproc_per_node={ranks}", *map(str, arguments)]
    if accelerator == "cpu":
        done = start(*command)
    else:
        environment = {**ENVIRONMENT, "PYTHONPATH": f"{REPOSITORY}:{HERE}", "DS_ACCELERATOR": accelerator}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    torchrun(2, HERE / "engine_worker.py", folder, ",".join([*CASES, "zero1@zero2", "zero3@zero2"]), 1)
    torchrun(1, HERE / "engine_worker.py", folder, ",".join(f"zero{stage}" for stage in STAGES), 2)
    losses = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return folder, losses


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_equal_at_the_same_ranks(results, case):
    folder, losses = results
    run = losses[f"{case}.2"]
    assert run["straight"] == run["first"] + run["rest"]
    assert len(set(run["straight"])) == 6, "the losses must move for this to mean anything"
    straight, resumed = (load_file(folder / f"{case}.{end}.safetensors") for end in ("end", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_is_not_finite_changes_nothing(results, case):
    _, losses = results
    assert losses[f"{case}.2"]["changed"] == []


def test_the_gradient_norm_is_deepspeeds(results):
    _, losses = results
    norms = {case: losses[f"{case}.2"]["norms"] for case in CASES}
    assert {case for case in CASES if norms[case]} == {"zero1", "zero2", "zero2_bf16"}
    assert all(ours == theirs > 0 for pairs in norms.values() for ours, theirs in pairs)


BROKEN = """Error building extension 'fused_adam': [1/2] nvcc -c multi_tensor_adam.cu
FAILED: multi_tensor_adam.cuda.o
multi_tensor_adam.cu:8:10: fatal error: cusparse.h: No such file or directory
compilation terminated.
ninja: build stopped: subcommand failed."""


def test_without_a_working_toolkit_adamw_is_torchs_or_a_sentence(alone, monkeypatch, capsys):
    def load(self, verbose):
        raise RuntimeError(BROKEN)

    def adamw(which):
        config = tiny_config(optim=OptimConfig(adamw=which))
        return build_adamw([{"params": [torch.nn.Parameter(torch.ones(2))]}], config, torch.device("cuda"))

    monkeypatch.setattr(FusedAdamBuilder, "load", load)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert type(adamw("auto")) is torch.optim.AdamW
    printed = capsys.readouterr().out
    assert "8:10: fatal error: cusparse.h: No such file or directory). It needs" in printed
    assert printed.endswith("none of them. This run takes torch's fused AdamW.\n")
    with pytest.raises(ConfigError, match=r"cusparse.h.*optim.adamw=torch"):
        adamw("deepspeed")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"can't be compiled on .* \(no nvcc on PATH\)"):
        adamw("deepspeed")
    assert type(adamw("torch")) is torch.optim.AdamW and capsys.readouterr().out == ""


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_continue_on_one(results, stage):
    _, losses = results
    assert losses[f"zero{stage}.1"]["rest"] == pytest.approx(
        losses[f"zero{stage}.2"]["straight"][3:], rel=1e-5
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_another_stage_continues_zero2(results, stage):
    _, losses = results
    assert losses[f"zero{stage}@zero2.2"]["rest"] == pytest.approx(
        losses["zero2.2"]["straight"][3:], rel=1e-6
    )


@pytest.mark.parametrize("case", CASES)
def test_a_state_read_before_the_first_step_is_the_initial_one(results, case):
    folder, _ = results
    tensors = load_file(folder / f"{case}.start.safetensors")
    assert all((tensors[name] == 0).all() for name in tensors if name.startswith("m."))
    assert tensors["w.mask_token"].abs().max() > 0


def test_unknown_zero_key_is_a_sentence():
    with pytest.raises(ConfigError, match="reduce_bucket_sise"):
        check_engine_config({"zero_optimization": {"stage": 2, "reduce_bucket_sise": 3}}, torch.device("cpu"))


def test_bf16_on_a_cpu_is_refused_unless_it_is_asked_for(monkeypatch):
    gpu = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(ConfigError, match="sees no GPU on .*zero2_cpu.json.*DS_ACCELERATOR=cpu"):
        check_engine_config(gpu, torch.device("cpu"))
    check_engine_config(gpu, torch.device("cuda"))
    check_engine_config({"zero_optimization": {"stage": 2}}, torch.device("cpu"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_engine_config(gpu, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: NCCL, FusedAdam and bf16 kernels")
def test_gpu_engines_agree_with_the_cpu(results):
    """On one GPU from the two CPU ranks' states: fp32 over NCCL, FusedAdam, and bf16 within its precision."""
    folder, losses = results
    cases = ["zero2_cuda@zero2", "zero2_cuda_bf16@zero2"]
    cases += ["zero2_cuda_fused@zero2"] if shutil.which("nvcc") and shutil.which("ninja") else []
    torchrun(1, HERE / "engine_worker.py", folder, ",".join(cases), 1, accelerator="cuda")
    expected = losses["zero2.2"]["straight"][3:]
    for case in cases:
        found = json.loads((folder / f"{case}.1.json").read_text())["rest"]
        assert found == pytest.approx(expected, rel=2e-2 if "bf16" in case else 1e-4), case
