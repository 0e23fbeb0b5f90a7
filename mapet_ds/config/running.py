"""The knobs of every run, whatever it learns: optimizer, length, batches, checkpoints, metrics."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Annotated, Any, Literal

from pydantic import Field

from mapet_ds.config.knobs import Natural, NonNegative, Positive, Share, knobs
from mapet_ds.draws import Place, first_slot


@knobs
class OptimConfig:
    """AdamW with linear warm-up and cosine decay per step. Learning rates are absolute."""

    lr: Annotated[float, Field(gt=0)] = 1.5e-3
    """Learning rate at the end of the warm-up, for the batch as it is: nothing scales it."""
    warmup_lr: NonNegative = 1e-6
    """Learning rate of the first step."""
    min_lr: NonNegative = 1e-5
    """Learning rate of the last step."""
    warmup_epochs: NonNegative = 10.0
    """Epochs of linear warm-up, fractions too."""
    weight_decay: NonNegative = 0.05
    """Decay of weights; biases, norms, LayerScale, positions and prefix tokens don't decay."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon, added to the root of the second moment."""
    clip_grad: NonNegative = 3.0
    """Largest norm of the whole gradient; 0 never clips."""
    adamw: Literal["auto", "deepspeed", "torch"] = "auto"
    """deepspeed: FusedAdam, compiled once per node; torch: torch's own (fused on a GPU), no compiler.
    auto: deepspeed on GPUs where it compiles, else torch."""

    def falling(self, done: float) -> float:
        """The share of lr - min_lr that is left when this share of the steps after the warm-up is done."""
        return 0.5 * (1 + math.cos(math.pi * done))


@knobs
class TrainConfig:
    """The length, the batches and the patience of a run."""

    epochs: Annotated[float, Field(gt=0)] = 300.0
    """Passes over the data set; the number of steps is rounded up."""
    global_batch_size: Positive = 2048
    """Images per update over all ranks."""
    micro_batch_size: Positive = 128
    """Images per forward on one rank; accumulation is global / (micro * ranks)."""
    world_size: Positive | None = None
    """Ranks this run must have; null takes what the launcher gives."""
    compile: bool = False
    """torch.compile the blocks of student and teacher: a minute or two at the start, and a C++ compiler."""
    grad_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""
    deterministic: bool = False
    """Deterministic GPU kernels, at a price in speed. On a CPU runs are deterministic anyway."""
    stop_at_step: Positive | None = None
    """Save and leave, in order, after this step; the schedule is unchanged."""
    max_skipped_steps: Natural = 10
    """Steps in a row with a non-finite gradient that are skipped before the run stops."""
    spike_factor: Annotated[float, Field(gt=1)] | None = 1.5
    """A log window with a mean loss above this many times the usual one is undone and passed over; null:
    never."""
    max_rollbacks: Natural = 3
    """Jumps of the loss that a run undoes before one stops it."""
    hang_seconds: Annotated[float, Field(gt=0, le=1e6)] = 600.0
    """A run without progress for so long names the rank that holds it up and ends; a start waits as long."""


@knobs
class CheckpointConfig:
    """The checkpoints of a run."""

    every_steps: Positive = 1000
    """Steps from one checkpoint to the next; the last step has one too."""
    keep: Positive = 2
    """Number of newest checkpoints that are kept."""


@knobs
class MetricsConfig:
    """The metrics of every run."""

    every_steps: Positive = 50
    """Steps from one line of metrics to the next. The mean loss between two lines is judged for a jump."""
    progress: bool = True
    """Show a progress bar."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers beside metrics.jsonl and TensorBoard: wandb, trackio, mlflow, or your own as
    package.module:factory (docs/cluster.md)."""


@knobs
class RunConfig:
    """The settings of every run, whatever it learns."""

    run_dir: str = ""
    """Folder of everything that a run writes. On a cluster: a path that all hosts share."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all randomness: initial weights, order, crops, colours, masks, stochastic depth."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest whole checkpoint in run_dir, else start; never: refuse a used
    run_dir."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: MetricsConfig = Field(default_factory=MetricsConfig)

    @property
    def idle_sections(self) -> set[str]:
        """The sections that change nothing in this run."""
        return set()

    def grad_accum_steps(self, world_size: int) -> int:
        """Number of forwards per update on each rank."""
        return self.train.global_batch_size // (self.train.micro_batch_size * world_size)

    def place(self, micro_step: int, rank: int, world_size: int) -> Place:
        """The place of a rank's micro-batch. micro_step counts from the start of the run, over all steps."""
        step, micro = divmod(micro_step, self.grad_accum_steps(world_size))
        return Place(step, first_slot(micro, rank, world_size, self.train.micro_batch_size))

    def defaults(self) -> dict[str, Any]:
        """The default of each knob, by its dotted name."""
        return flatten(type(self)().to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, as the run folder holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Merges nested dictionaries into one with dotted names."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def total_steps(config: RunConfig, num_samples: int) -> int:
    """Number of updates in the whole run: epochs * samples / global batch, rounded up."""
    return math.ceil(config.train.epochs * num_samples / config.train.global_batch_size)
