"""The frozen open_clip image tower, from images to dense patch features before any pooling.

The tower is built without storage (meta device), spread over ranks if asked, and only then filled from the
weights, tensor by tensor: a rank reads from a safetensors file no more than it keeps. The tower is no part of
the student's module, so it is never cast with it and never in its checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
import torch.distributed as dist
from open_clip.convert import convert_state_dict
from open_clip.model import _build_vision_tower, resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import LayerNormFp32
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mapet_ds.config.knobs import Triple
from mapet_ds.config.sections import TeacherConfig
from mapet_ds.config.towers import teacher_model_config
from mapet_ds.data.batch import View
from mapet_ds.errors import ConfigError
from mapet_ds.launch import once_per_node, ranks_per_host
from mapet_ds.targets.target import teacher_dtype
from mapet_ds.weights import Tensors, mismatches, read_tensors, shapes, shapes_only

log = logging.getLogger(__name__)


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
        needed = {"normed": "ln_post", "projected": "proj"}.get(self.features)
        if needed and getattr(visual, needed, None) is None:
            raise ConfigError(f"teacher.features = {self.features}, but {config.name} has no {needed}.")
        _, self.embed_dim, self.grid, _ = layers[self.layer]
        if self.features == "projected":
            self.embed_dim = self.visual.proj.shape[1]

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: BatchNorm statistics and targets must not change with the student's mode."""
        return super().train(False)

    @torch.no_grad()
    def _intermediates(self, images: Tensor, indices: list[int] | None) -> list[Tensor]:
        early = not isinstance(self.visual, ModifiedResNet)  # there it means the opposite (open_clip 3.3)
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
                features = self.visual.ln_post(features)
            return features @ self.visual.proj if self.features == "projected" else features

    def check_grid(self, grid: int) -> None:
        """Refuses a teacher whose patches are not the student's, which are `grid` along a side.

        Raises:
            ConfigError: naming both grids.
        """
        if self.grid != grid:
            raise ConfigError(
                f"The teacher's features are {self.grid} x {self.grid}, the student's patches {grid} x "
                f"{grid}: each patch needs one target. Change teacher.img_size or the student's size."
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
    model["quick_gelu"] = _quick_gelu(config, model)
    build = partial(_build_tower, model, config.img_size)
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
        weights = read_tensors(Path(source), f"The teacher's weights {source}", slices=True)
        weights = _fit_sizes(convert_state_dict(cast(Any, teacher), weights), teacher)
    _check_strictly(teacher, weights, source, config)
    teacher.identity = {
        "name": config.name.partition(":")[0],  # a folder may move
        "sha256": _fingerprint(teacher, weights, model),
        "layer": teacher.layer,
        "features": config.features,
        "img_size": config.img_size,
    }
    if isinstance(visual, ModifiedResNet):
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


def teacher_mean_std(config: TeacherConfig) -> tuple[Triple, Triple]:
    """Mean and standard deviation per channel that the teacher's images are normalised with.

    The folder's preprocess_cfg or the tag gives them. A file takes those of all tags of its model, where
    these agree, else OpenAI's.
    """
    if config.name.startswith("local-dir:"):
        teacher_model_config(config.name)
        folder = Path(config.name.removeprefix("local-dir:"))
        cfgs = [json.loads((folder / "open_clip_config.json").read_text()).get("preprocess_cfg", {})]
    elif tag := open_clip.get_pretrained_cfg(config.name, config.weights):
        cfgs = [tag]
    else:
        tags = open_clip.list_pretrained_tags_by_model(config.name)
        cfgs = [open_clip.get_pretrained_cfg(config.name, tag) for tag in tags]
    default = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    pairs = {(tuple({**default, **cfg}["mean"]), tuple({**default, **cfg}["std"])) for cfg in cfgs}
    return pairs.pop() if len(pairs) == 1 else (default["mean"], default["std"])


def teacher_view(config: TeacherConfig) -> View:
    """The view of a crop that the teacher sees."""
    return View(config.img_size, *teacher_mean_std(config))


def _quick_gelu(config: TeacherConfig, model: dict[str, Any]) -> bool:
    """Whether the weights were trained with QuickGELU, by the model or the tag; a file does not record it."""
    named = bool(model.get("quick_gelu"))
    tag = open_clip.get_pretrained_cfg(config.name, config.weights)
    twin = f"{config.name}-quickgelu"
    known = named or tag or config.weights == "random"
    if not known and int(os.environ.get("RANK", "0")) == 0 and twin in open_clip.list_models():
        log.warning(
            f"teacher.weights = {config.weights} is a file and can't tell its activation; {config.name} "
            "means GELU. If the weights were trained with QuickGELU (OpenAI, MetaCLIP, DFN), set "
            f"teacher.name={twin}."
        )
    return named or bool(tag.get("quick_gelu"))


def _build_tower(model: dict[str, Any], img_size: int, dtype: torch.dtype) -> nn.Module:
    """open_clip's image tower alone, on the current default device, its norms in fp32 whatever `dtype` is."""
    vision: Any = dict(model["vision_cfg"], timm_model_pretrained=False, patch_dropout=0.0)
    # A ResNet's trunk takes any size; its pooling, which does not, is unused here.
    if vision.get("patch_size") and not vision.get("timm_model_name"):
        vision["image_size"] = img_size
    visual: Any = _build_vision_tower(model["embed_dim"], vision, model["quick_gelu"], cast_dtype=dtype)
    if vision.get("timm_model_name"):
        visual.set_input_size(img_size)
    for module in visual.modules():
        if not isinstance(module, (LayerNormFp32, nn.modules.batchnorm._BatchNorm)):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    return visual


def weights_file(config: TeacherConfig) -> str:
    """Path of the weights. The first rank of each node downloads those of a tag, while the others wait."""
    if config.name.startswith("local-dir:"):
        path = Path(config.name.removeprefix("local-dir:")) / "open_clip_model.safetensors"
        if not path.is_file():
            raise ConfigError(f"teacher.name = {config.name}: there is no {path}.")
        return str(path)
    tag = open_clip.get_pretrained_cfg(config.name, config.weights)
    if not tag:
        if not Path(config.weights).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(config.name)) or "none"
            raise ConfigError(
                f"teacher.weights = {config.weights!r} is neither a file nor a tag of {config.name} (tags: "
                f"{tags}); `random` must be asked for by name."
            )
        return config.weights

    def download() -> str:
        try:
            return open_clip.download_pretrained(tag)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"The weights {config.weights} of {config.name} can't be downloaded: {error} Fetch them "
                "where there is a network (open_clip keeps them in HF_HOME or ~/.cache/clip), or set "
                "teacher.weights to a local file."
            ) from error

    return once_per_node(download)[0]


def _fit_sizes(weights: Tensors, teacher: Teacher) -> Tensors:
    """The weights, with positions resampled to the teacher's grid as open_clip's force_image_size does."""
    if (name := "visual.positional_embedding") in weights:
        weights[name] = weights[name][...].float()
        resize_pos_embed(weights, teacher)
    trunk: Any = getattr(teacher.visual, "trunk", None)
    if (name := "visual.trunk.pos_embed") in weights:
        table = weights[name][...].float()
        if table.ndim == 3 and table.shape != trunk.pos_embed.shape:
            prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
            table = resample_abs_pos_embed(table, trunk.patch_embed.grid_size, num_prefix_tokens=prefix)
        weights[name] = table
    return weights


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
