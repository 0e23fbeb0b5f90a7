"""The frozen image tower, from images to dense patch features before any pooling.

The tower is built without storage (meta device), spread over ranks if asked, and only then filled from the
weights, tensor by tensor: a rank reads from a safetensors file no more than it keeps. The tower is no part of
the student's module, so it is never cast with it and never in its checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mapet_ds.config.sections import TeacherConfig
from mapet_ds.config.towers import teacher_model_config
from mapet_ds.errors import ConfigError
from mapet_ds.launch import once_per_node, ranks_per_host
from mapet_ds.targets.target import teacher_dtype
from mapet_ds.targets.towers import (
    build_tower,
    final_norm,
    is_resnet,
    quick_gelu,
    tower_weights,
    weights_file,
)
from mapet_ds.weights import Tensors, mismatches, shapes, shapes_only


class Teacher(nn.Module):
    """A frozen image tower whose forward gives dense features; always in eval mode, never with a gradient.

    Attributes: identity (name, sha256 of architecture and weights, layer counted from 0, features, img_size),
    grid (patches along one side), embed_dim (C), dtype.

    Raises:
        ConfigError: no such layer, or features that this tower does not have.
    """

    visual: Any  # open_clip's towers share no type
    embed_dim: int

    def __init__(self, visual: nn.Module, config: TeacherConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.visual = visual.requires_grad_(False)
        self.dtype = dtype
        self.identity: dict[str, str | int] = {}
        self.train(False)
        probe = next(visual.parameters()).new_empty(1, 3, config.img_size, config.img_size, dtype=dtype)
        layers = [features.shape for features in self._intermediates(probe, None)]
        if not -len(layers) <= config.layer < len(layers):
            raise ConfigError(
                f"teacher.layer = {config.layer}, but {config.name} has {len(layers)} layers: "
                f"choose {-len(layers)} .. -1."
            )
        self.layer, self.features = config.layer % len(layers), config.features
        needed = {"normed": final_norm(visual), "projected": getattr(visual, "proj", None)}
        if needed.get(self.features, visual) is None:
            part = "final norm of patches" if self.features == "normed" else "proj"
            raise ConfigError(f"teacher.features = {self.features}, but {config.name} has no {part}.")
        self.img_size = config.img_size
        _, self.embed_dim, self.grid, _ = layers[self.layer]
        if self.features == "projected":
            self.embed_dim = self.visual.proj.shape[1]

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: BatchNorm statistics and targets must not change with the student's mode."""
        return super().train(False)

    @torch.no_grad()
    def _intermediates(self, images: Tensor, indices: list[int] | None) -> list[Tensor]:
        early = not is_resnet(self.visual)  # there it means the opposite (open_clip 3.3)
        options = {"indices": indices, "intermediates_only": True, "stop_early": early}
        return self.visual.forward_intermediates(images, **options)["image_intermediates"]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, T, T] normalised images -> [B, L, C] features in `dtype`, patches in raster order.

        Does not make the host wait. A sharded teacher is a collective: every rank must call it equally often.
        """
        # All convolutions keep this layout. On a CPU, it makes bf16 1.5 to 2.6 times as fast (docs/log.md).
        images = images.to(self.dtype, memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):
            features = self._intermediates(images, [self.layer])[0].flatten(2).transpose(1, 2)
            if self.features != "tokens":
                features = final_norm(self.visual)(features)
            return features @ self.visual.proj if self.features == "projected" else features

    def check_grid(self, grid: int) -> None:
        """Refuses a teacher whose patches are not the student's, which are `grid` along a side.

        Raises:
            ConfigError: naming both grids.
        """
        if self.grid != grid:
            raise ConfigError(
                f"The teacher's features are {self.grid} x {self.grid}, the student's patches {grid} x "
                f"{grid}: each patch needs one target. Set teacher.img_size="
                f"{self.img_size // self.grid * grid}, or change the student's size."
            )

    @property
    def local_bytes(self) -> int:
        """Bytes of weights that this rank keeps between forwards."""
        tensors = (*self.parameters(), *self.buffers())
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        return sum(tensor.numel() * tensor.element_size() for tensor in local)


def build_teacher(config: TeacherConfig, device: torch.device, compiled: bool = False) -> Teacher:
    """The teacher on `device`, its weights spread over ranks as teacher.shard asks. Every rank must call it.

    compiled: torch.compile compiles each of its blocks at its first call.

    PyTorch's fused attention for inference is turned off in the whole process: it changes bf16 features by
    0.7 %, and targets would depend on the gradient mode. Each rank reads a file other than safetensors whole.

    Raises:
        ConfigError: unknown model, tag, file or layer; weights that do not fit exactly; failed download.
    """
    torch.backends.mha.set_fastpath_enabled(False)

    # Build the tower without storage.
    model, dtype = teacher_model_config(config.name), teacher_dtype(config, device)
    model["quick_gelu"] = quick_gelu(config, model)
    build = partial(build_tower, model, config.img_size)
    with torch.device(device if shapes_only() else "meta"):
        visual = build(dtype)
    teacher = Teacher(visual, config, dtype)
    if shapes_only():
        teacher.visual.attnpool = None
        return teacher

    # Find its weights, which must fit exactly.
    if config.weights == "random" and not config.name.startswith("local-dir:"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            weights = {f"visual.{name}": tensor for name, tensor in build(torch.float32).state_dict().items()}
        source = "random weights"
    else:
        source = weights_file(config)
        weights = tower_weights(Path(source), teacher, config)
    _check_strictly(teacher, weights, source, config)
    teacher.identity = {
        "name": "local-dir" if config.name.startswith("local-dir:") else config.name,  # a folder may move
        "sha256": _fingerprint(teacher, weights, model),
        "layer": teacher.layer,
        "features": config.features,
        "img_size": config.img_size,
    }
    if is_resnet(visual):
        teacher.visual.attnpool = None  # 13 % of RN50x64, never run

    # Spread the tower over ranks, fill what this rank keeps, compile its blocks.
    _shard(teacher, config, device)
    _fill(teacher, weights, build, device)
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # the default is 8, and a ResNet's blocks have eight shapes
        # Casts round as in eager mode, else 1 in 100 of a ViT's ids in bf16 change. The compiled forward lies
        # beneath the hooks that gather a block's weights.
        for block in tower_blocks(teacher.visual):
            options: Any = {"emulate_precision_casts": True}
            block.forward = torch.compile(block.forward, dynamic=False, options=options)
    return teacher


def _check_strictly(teacher: Teacher, weights: Tensors, source: str, config: TeacherConfig) -> None:
    wanted = shapes(teacher.state_dict())
    given = {name: shape for name, shape in shapes(weights).items() if name.startswith("visual.")}
    if not given:
        raise ConfigError(
            f"{source} holds no image tower: no tensor is named visual.*; give a whole open_clip checkpoint."
        )
    if wrong := mismatches(wanted, given):
        raise ConfigError(
            f"{source} does not fit teacher.name = {config.name} at {config.img_size} px: {len(wrong)} "
            f"tensors differ, e.g. {'; '.join(wrong[:3])}. Name the model these weights were trained as."
        )


def _fingerprint(teacher: Teacher, weights: Tensors, model: dict[str, Any]) -> str:
    """sha256 of architecture, activation and weights, equal for every kind of file that holds them.

    The first rank of each node reads the file through, one tensor at a time.
    """
    cfg = model["vision_cfg"].items()
    vision = {key: value for key, value in cfg if value is not None and key != "image_size"}

    def digest() -> str:
        sha = hashlib.sha256(json.dumps([vision, model["quick_gelu"]], sort_keys=True).encode())
        for name in sorted(teacher.state_dict()):
            sha.update(name.encode())
            sha.update(weights[name][...].float().contiguous().numpy().data)
        return sha.hexdigest()

    mine, all_nodes = once_per_node(digest)
    if len(set(all_nodes)) > 1:
        raise ConfigError("The nodes read different teacher weights: give all of them the same file or tag.")
    return mine


def tower_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of a tower's outermost lists: its transformer blocks, residual blocks or stages."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from child.children()
        else:
            yield from tower_blocks(child)


def _shard(teacher: Teacher, config: TeacherConfig, device: torch.device) -> None:
    if config.shard == "none" or not dist.is_initialized():
        return
    world = dist.get_world_size()
    ranks = ranks_per_host() if config.shard == "node" else world
    if world % ranks:
        raise ConfigError(
            f"teacher.shard = node needs equally many ranks on every node, but {world} ranks are not a "
            f"multiple of {ranks}: set teacher.shard=world or none."
        )
    if ranks == 1:
        return
    # A group of its own never queues behind the student's collectives.
    group, _ = dist.new_subgroups(group_size=ranks)
    assert group is not None
    mesh = DeviceMesh.from_group(group, device.type)
    for block in tower_blocks(teacher.visual):
        if list(block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(teacher, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def _fill(
    teacher: Teacher, weights: Tensors, build: Callable[[torch.dtype], nn.Module], device: torch.device
) -> None:
    """Gives the tensors that this rank keeps storage on the device, and fills them from the weights."""
    teacher.to_empty(device=device)
    stored = teacher.state_dict()
    for name, tensor in stored.items():
        if isinstance(tensor, DTensor):
            mesh, local = tensor.device_mesh, tensor.to_local()
            first = mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size())
            if len(local):
                local.copy_(weights[name][first : first + len(local)])
        else:
            tensor.copy_(weights[name][...])

    # No file holds the tables that are computed at construction, e.g. rotary angles.
    derived = [name for name, _ in teacher.visual.named_buffers() if f"visual.{name}" not in stored]
    if derived:
        whole = dict(build(teacher.dtype).named_buffers())
        for name in derived:
            teacher.visual.get_buffer(name).copy_(whole[name])
