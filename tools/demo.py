"""Pre-train on a small rendered data set, from nothing to timm weights: `python tools/demo.py runs/demo [objective]`.

Runs the programs a user would run, one after another, and prints each command before it starts.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from mapet_ds.config.sections import Config

MIN_GAIN = {"mapet": 15, "beit": 15, "mvp": 10, "saim": 10}
"""Points of k-NN accuracy below which something must be broken. ConMIM's teacher has hardly moved in so few steps (docs/log.md)."""
MIN_FALL = 0.05
"""Share of its first value by which a loss must have fallen."""
REPOSITORY = Path(__file__).resolve().parent.parent


def run(says: str, *command: object) -> str:
    """Standard output of a command, shown as it comes; a failing one ends the demo with its exit code."""
    words = [str(word) for word in command]
    print(f"\n== {says}\n$ {shlex.join(words)}", flush=True)
    lines, interrupts = [], []

    def note(*_: object) -> None:
        """The terminal tells the command, too, which may have something to save and to say; a second one ends the demo at once."""
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(True)

    before = signal.signal(signal.SIGINT, note)
    with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    signal.signal(signal.SIGINT, before)
    if interrupts:
        sys.exit("Stopped: the same command continues the demo.")
    if process.returncode:
        sys.exit(process.returncode)
    return "".join(lines)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="where the demo writes, e.g. runs/demo; run again, it continues"
    )
    parser.add_argument("objective", nargs="?", default="mapet", choices=Config().objectives)
    arguments = parser.parse_args()
    folder, objective = arguments.folder.resolve(), arguments.objective
    began = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["DS_ACCELERATOR"] = "cpu"
    python, data, run_dir = sys.executable, folder / "data", folder / objective
    codebook, export = folder / "codebook.safetensors", folder / f"{objective}_timm"
    recipe = ["--config", "mapet_ds/recipes/demo_cpu.yaml"]
    paths = [
        f"data.train={data}/train", f"teacher.name=local-dir:{data}/teacher", f"tokenizer.path={codebook}", f"run_dir={run_dir}",
        f"objective={objective}",
    ]  # fmt: skip

    print(f"\nFor each command: export DS_ACCELERATOR=cpu OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
    run(
        "Render labelled JPEGs and train a small CLIP on them: the teacher",
        python,
        "tools/make_demo.py",
        data,
    )
    if (
        subprocess.run(
            [python, "tools/fit_codebook.py", "--is_needed", *recipe, *paths], cwd=REPOSITORY
        ).returncode
        == 0
    ):
        run("Fit the k-CLIP codebook: k-means of the teacher's patch features",
            python, "tools/fit_codebook.py", "--overwrite", *recipe, *paths)  # fmt: skip
    run(f"Pre-train the ViT with {objective} on two CPU ranks; the targets are computed on the fly",
        Path(python).parent / "deepspeed", "--num_gpus", 2, "--master_port", free_port(), "mapet_ds/pretrain.py", *recipe,
        "--deepspeed_config", "ds_configs/zero2_cpu.json", *paths)  # fmt: skip
    if not (run_dir / "DONE").exists():
        sys.exit(f"The pre-training did not reach its end: {run_dir}/DONE is missing.")
    run("Export the ViT to timm, proven equal", python, "tools/export_timm.py", run_dir, export)
    probe = [
        "tools/evaluate.py",
        "knn",
        "--json",
        "--model",
        export,
        "--train",
        data / "train",
        "--val",
        data / "val",
    ]
    before = json.loads(run("k-NN accuracy of the untrained ViT", python, *probe, "--untrained"))[
        "knn_accuracy_percent"
    ]
    after = json.loads(run("k-NN accuracy of the pre-trained ViT", python, *probe))["knn_accuracy_percent"]

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    print(f"\nloss              {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
    print(
        f"k-NN accuracy     {before:.1f} % untrained, {after:.1f} % pre-trained ({after - before:+.1f} points)"
    )
    print(f"timm weights      {export / 'model.safetensors'}")
    print(f"TensorBoard       {Path(python).parent / 'tensorboard'} --logdir {run_dir}/tensorboard")
    print(f"time              {time.monotonic() - began:.0f} s")
    if losses[-1] > (1 - MIN_FALL) * losses[0]:
        sys.exit("The loss should have fallen and did not: something is broken.")
    if after - before < MIN_GAIN.get(objective, -100):
        sys.exit(
            f"Pre-training should gain {MIN_GAIN[objective]} points of k-NN accuracy and did not: something is broken."
        )


if __name__ == "__main__":
    main()
