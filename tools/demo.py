"""Pre-train on a small rendered data set, from nothing to timm weights.

    python tools/demo.py runs/demo [objective]

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
from mapet_ds.config.shipped import PACKAGE, SHIPPED

MIN_GAIN = {"mapet": 15, "beit": 15, "mvp": 10, "saim": 10, "mae": 10, "cae": 10}
"""Points of k-NN accuracy below which something must be broken. ConMIM's teacher has hardly moved in so few
steps (docs/log.md)."""
SETTINGS = {"mae": ("train.epochs=48", "optim.lr=4e-3", "optim.betas=[0.9,0.95]", "mae.decoder_depth=1")}
"""What an objective needs beyond the recipe. MAE's loss stays where it is for some 600 short steps, and falls
only then (docs/log.md)."""
MIN_FALL = 0.05
"""Share of its first value by which a loss must have fallen."""
RECIPE = ("--config", "mapet_ds/recipes/demo_cpu.yaml")
ENGINE = ("--deepspeed_config", "ds_configs/zero2_cpu.json")


def run(title: str, *command: object) -> str:
    """Standard output of a command, shown as it comes; a failing one ends the demo with its exit code.

    A terminal's interrupt reaches the command, too, which may have something to save and to say. A second
    one ends the demo at once.
    """
    words = [str(word) for word in command]
    print(f"\n== {title}\n$ {shlex.join(words)}", flush=True)
    lines, interrupts = [], []

    def note(*_: object) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(True)

    before = signal.signal(signal.SIGINT, note)
    with subprocess.Popen(words, cwd=SHIPPED, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
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


def pretrain(objective: str, run_dir: Path, data: Path, codebook: Path) -> None:
    """Renders the data, trains the teacher, fits the codebook if there is one, and pre-trains."""
    python = sys.executable
    settings = [f"data.train={data}/train", f"teacher.name=local-dir:{data}/teacher"]
    settings += [f"tokenizer.path={codebook}", f"run_dir={run_dir}", f"objective={objective}"]
    settings += SETTINGS.get(objective, ())
    title = "Render labelled JPEGs and train a small CLIP on them: the teacher"
    run(title, python, "tools/make_demo.py", data)

    fit = [python, "tools/fit_codebook.py"]
    needed = subprocess.run([*fit, "--is_needed", *RECIPE, *settings], cwd=SHIPPED)
    if needed.returncode == 0:
        title = "Fit the k-CLIP codebook: k-means of the teacher's patch features"
        run(title, *fit, "--overwrite", *RECIPE, *settings)

    title = f"Pre-train the ViT with {objective} on two CPU ranks; the targets are computed on the fly"
    launcher = [Path(python).parent / "deepspeed", "--num_gpus", 2, "--master_port", free_port()]
    run(title, *launcher, os.path.relpath(PACKAGE / "pretrain.py", SHIPPED), *RECIPE, *ENGINE, *settings)
    if not (run_dir / "DONE").exists():
        sys.exit(f"The pre-training did not reach its end: {run_dir}/DONE is missing.")


def knn_accuracy(title: str, data: Path, model: Path, *options: str) -> float:
    """In percent, as tools/evaluate.py says it."""
    folders = ["--train", data / "train", "--val", data / "val"]
    command = [sys.executable, "tools/evaluate.py", "knn", "--json", "--model", model, *folders, *options]
    return json.loads(run(title, *command))["knn_accuracy_percent"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    where = "where the demo writes, e.g. runs/demo; run again, it continues"
    parser.add_argument("folder", type=Path, help=where)
    parser.add_argument("objective", nargs="?", default="mapet", choices=Config().objectives)
    arguments = parser.parse_args()
    folder, objective = arguments.folder.resolve(), arguments.objective
    began = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["DS_ACCELERATOR"] = "cpu"
    data, run_dir, model = folder / "data", folder / objective, folder / f"{objective}_timm"

    # From nothing to weights, and what they are worth.
    threads = os.environ["OMP_NUM_THREADS"]
    print(f"\nFor each command: export DS_ACCELERATOR=cpu OMP_NUM_THREADS={threads}")
    pretrain(objective, run_dir, data, folder / "codebook.safetensors")
    run("Export the ViT to timm, proven equal", sys.executable, "tools/export_timm.py", run_dir, model)
    before = knn_accuracy("k-NN accuracy of the untrained ViT", data, model, "--untrained")
    after = knn_accuracy("k-NN accuracy of the pre-trained ViT", data, model)

    # The summary, and whether it is as good as it must be.
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    gain = after - before
    print(f"\nloss              {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
    print(f"k-NN accuracy     {before:.1f} % untrained, {after:.1f} % pre-trained ({gain:+.1f} points)")
    print(f"timm weights      {model / 'model.safetensors'}")
    print(f"TensorBoard       {Path(sys.executable).parent / 'tensorboard'} --logdir {run_dir}/tensorboard")
    print(f"time              {time.monotonic() - began:.0f} s")
    if losses[-1] > (1 - MIN_FALL) * losses[0]:
        sys.exit("The loss should have fallen and did not: something is broken.")
    if gain < MIN_GAIN.get(objective, -100):
        points = f"{MIN_GAIN[objective]} points of k-NN accuracy"
        sys.exit(f"Pre-training should gain {points} and did not: something is broken.")


if __name__ == "__main__":
    main()
