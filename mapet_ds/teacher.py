"""The frozen open_clip image tower: images in, dense patch features out, before any pooling.

The tower is built without storage (meta device), spread over ranks if asked, and only then filled from the weights, tensor
by tensor, so that a rank reads from a safetensors file no more than it keeps. It lives outside the student's module: never
cast with it, never in its checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import safetensors
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

from mapet_ds.checks import teacher_model_config
from mapet_ds.config import ConfigError, TeacherConfig
from mapet_ds.knobs import Triple
from mapet_ds.launch import CONTROL_TIMEOUT, ranks_per_host, shapes_only

log = logging.getLogger(__name__)

Weights = dict[str, Any]
"""Name in the file -> tensor, or a lazy slice of a safetensors file: both read by indexing."""


class Teacher(nn.Module):
    """A frozen image tower whose forward gives dense features; always in eval mode, never with a gradient.

    Attributes: identity (name, sha256 of architecture and weights, layer counted from 0, features, img_size), grid (patches
    along one side), embed_dim (C), dtype.
    """

    def __init__(self, visual: nn.Module, config: TeacherConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.visual = visual.requires_grad_(False)
        self.dtype = dtype
        self.identity: dict[str, str | int] = {}
        self.train(False)
        probe = next(visual.parameters()).new_empty(1, 3, config.img_size, config.img_size, dtype=dtype)
        shapes = [features.shape for features in self._intermediates(probe, None)]
        if not -len(shapes) <= config.layer < len(shapes):
            raise ConfigError(
                f"teacher.layer = {config.layer}, but {config.name} has {len(shapes)} layers: choose {-len(shapes)} .. -1."
            )
        self.layer, self.features = config.layer % len(shapes), config.features
        needed = {"normed": "ln_post", "projected": "proj"}.get(self.features)
        if needed and getattr(visual, needed, None) is None:
            raise ConfigError(f"teacher.features = {self.features}, but {config.name} has no {needed}.")
        _, self.embed_dim, self.grid, _ = shapes[self.layer]
        if self.features == "projected":
            self.embed_dim = visual.proj.shape[1]

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: BatchNorm statistics and targets must not move with the student's mode."""
        return super().train(False)

    @torch.no_grad()
    def _intermediates(self, images: Tensor, indices: list[int] | None) -> list[Tensor]:
        output = self.visual.forward_intermediates(
            images,
            indices=indices,
            intermediates_only=True,
            stop_early=not isinstance(self.visual, ModifiedResNet),  # means the opposite there (open_clip 3.3)
        )
        return output["image_intermediates"]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, T, T] normalised images -> [B, L, C] features in `dtype`, patches row by row from the top left.

        Does not make the host wait. A sharded teacher is a collective: every rank must call it equally often.
        """
        # Convolutions keep this layout throughout; on a CPU, bf16 is 1.5 to 2.6 times as fast in it (docs/log.md).
        images = images.to(self.dtype, memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):
            features = self._intermediates(images, [self.layer])[0].flatten(2).transpose(1, 2)
            if self.features != "tokens":
                features = self.visual.ln_post(features)
            return features @ self.visual.proj if self.features == "projected" else features

    def check_grid(self, grid: int) -> None:
        """Refuse a teacher whose patches are not the student's, `grid` along a side.

        Raises:
            ConfigError: naming both grids.
        """
        if self.grid != grid:
            raise ConfigError(
                f"The teacher's features are {self.grid} x {self.grid}, the student's patches {grid} x {grid}: each "
                "patch needs one target. Change teacher.img_size or the student's size."
            )

    @property
    def local_bytes(self) -> int:
        """Bytes of weights that this rank keeps between forwards."""
        tensors = [t.to_local() if isinstance(t, DTensor) else t for t in (*self.parameters(), *self.buffers())]
        return sum(t.numel() * t.element_size() for t in tensors)


def build_teacher(config: TeacherConfig, device: torch.device, compiled: bool = False) -> Teacher:
    """The teacher on `device`, its weights spread over ranks as teacher.shard says; compiled: its blocks by torch.compile, each
    at its first call. Every rank must call it.

    Turns off PyTorch's fused attention path for inference (process-wide): it changes bf16 features by 0.7 %, so that targets
    would depend on the gradient mode. A file other than safetensors is read whole by each rank before it is spread.

    Raises:
        ConfigError: unknown model, tag, file or layer; weights that do not fit the model exactly; failed download.
    """
    torch.backends.mha.set_fastpath_enabled(False)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    model = teacher_model_config(config.name)
    model["quick_gelu"] = _quick_gelu(config, model)
    build, dtype = partial(_build_tower, model, config.img_size), torch.bfloat16 if bf16 else torch.float32
    with torch.device(device if shapes_only() else "meta"):
        visual = build(dtype)
    teacher = Teacher(visual, config, dtype)
    if shapes_only():
        visual.attnpool = None
        return teacher
    if config.weights == "random" and not config.name.startswith("local-dir:"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            weights = {f"visual.{name}": tensor for name, tensor in build(torch.float32).state_dict().items()}
        source = "random weights"
    else:
        source = _weights_file(config)
        weights = _fit_sizes(convert_state_dict(teacher, _read_weights(Path(source))), teacher)
    _check_strictly(teacher, weights, source, config)
    teacher.identity = {
        "name": config.name.partition(":")[0],  # a folder may move
        "sha256": _fingerprint(teacher, weights, model),
        "layer": teacher.layer,
        "features": config.features,
        "img_size": config.img_size,
    }
    if isinstance(visual, ModifiedResNet):
        visual.attnpool = None  # 13 % of RN50x64, never run
    _shard(teacher, config, device)
    _fill(teacher, weights, build, device)
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # the default is 8, and a ResNet's blocks have eight shapes
        rounding = {"emulate_precision_casts": True}  # as in eager mode: else a ViT's ids in bf16 change, 1 in 100
        for block in _blocks(teacher.visual):  # beneath the hooks that gather its weights
            block.forward = torch.compile(block.forward, dynamic=False, options=rounding)
    return teacher


def teacher_mean_std(config: TeacherConfig) -> tuple[Triple, Triple]:
    """Mean and standard deviation per channel that the teacher's images are normalised with.

    From the folder's preprocess_cfg, or the tag; for a file, what all tags of this model agree on; else OpenAI's.
    """
    if config.name.startswith("local-dir:"):
        teacher_model_config(config.name)
        folder = Path(config.name.removeprefix("local-dir:"))
        found = [json.loads((folder / "open_clip_config.json").read_text()).get("preprocess_cfg", {})]
    elif tag := open_clip.get_pretrained_cfg(config.name, config.weights):
        found = [tag]
    else:
        tags = open_clip.list_pretrained_tags_by_model(config.name)
        found = [open_clip.get_pretrained_cfg(config.name, tag) for tag in tags]
    default = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    pairs = {(tuple({**default, **cfg}["mean"]), tuple({**default, **cfg}["std"])) for cfg in found}
    return pairs.pop() if len(pairs) == 1 else (default["mean"], default["std"])


def _quick_gelu(config: TeacherConfig, model: dict[str, Any]) -> bool:
    """Whether the weights were trained with QuickGELU: the model's or the tag's word; a file can't tell."""
    named = bool(model.get("quick_gelu"))
    tag = open_clip.get_pretrained_cfg(config.name, config.weights)
    twin = f"{config.name}-quickgelu"
    asked = named or tag or config.weights == "random" or int(os.environ.get("RANK", "0")) > 0
    if not asked and twin in open_clip.list_models():
        log.warning(
            f"teacher.weights = {config.weights} is a file and can't tell its activation; {config.name} means GELU. If the "
            f"weights were trained with QuickGELU (OpenAI, MetaCLIP, DFN), set teacher.name={twin}."
        )
    return named or bool(tag.get("quick_gelu"))


def _build_tower(model: dict[str, Any], img_size: int, dtype: torch.dtype) -> nn.Module:
    """open_clip's image tower alone, on the current default device, norms in fp32 whatever `dtype` is."""
    vision = dict(model["vision_cfg"], timm_model_pretrained=False, patch_dropout=0.0)
    if vision.get("patch_size") and not vision.get("timm_model_name"):
        vision["image_size"] = img_size  # a ResNet's trunk takes any size; only its pooling, unused here, does not
    visual = _build_vision_tower(model["embed_dim"], vision, model["quick_gelu"], cast_dtype=dtype)
    if vision.get("timm_model_name"):
        visual.set_input_size(img_size)
    for module in visual.modules():
        if not isinstance(module, (LayerNormFp32, nn.modules.batchnorm._BatchNorm)):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    return visual


def once_per_node(work: Callable[[], str]) -> tuple[str, list[str]]:
    """What `work` gives on the first rank of this node, and of every node. Every rank must call it.

    Raises:
        ConfigError: on every rank, where it was raised on one, so that none is left waiting.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    outcome: tuple[str | None, str | None] = (None, None)
    if local_rank == 0:
        try:
            outcome = (work(), None)
        except ConfigError as error:
            outcome = (None, str(error))
    outcomes = [outcome]
    if dist.is_initialized():
        outcomes = [outcome] * dist.get_world_size()
        patient = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)  # a download may take longer than a step
        dist.all_gather_object(outcomes, outcome, group=patient)
    if failed := [error for _, error in outcomes if error]:
        raise ConfigError(failed[0])
    mine = outcomes[dist.get_rank() - local_rank][0] if dist.is_initialized() else outcome[0]
    return mine, [result for result, _ in outcomes if result is not None]


def _weights_file(config: TeacherConfig) -> str:
    """Path of the weights; a tag's are downloaded by the first rank of each node while the others wait."""
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
                f"teacher.weights = {config.weights!r} is neither a file nor a tag of {config.name} (tags: {tags}); "
                "`random` must be asked for by name."
            )
        return config.weights

    def download() -> str:
        try:
            return open_clip.download_pretrained(tag)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"The weights {config.weights} of {config.name} can't be downloaded: {error} Fetch them where there is a "
                "network (open_clip keeps them in HF_HOME or ~/.cache/clip), or set teacher.weights to a local file."
            ) from error

    return once_per_node(download)[0]


def _read_weights(path: Path) -> Weights:
    """Every tensor of the file by name, without a `module.` prefix; nothing in a file is ever executed."""
    try:
        if path.suffix == ".safetensors":
            handle = safetensors.safe_open(path, "pt")
            tensors = {name: handle.get_slice(name) for name in handle.keys()}
        else:
            if zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist()):
                raise ConfigError(
                    f"The teacher's weights {path} are a TorchScript archive, which is a program (OpenAI's originals "
                    "are such). Name the tag instead, teacher.weights=openai, or convert them once to safetensors."
                )
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors.get("state_dict", tensors)
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    except (safetensors.SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"The teacher's weights {path} can't be read as plain tensors by name: {reason} Give a safetensors file or an "
            "open_clip checkpoint."
        ) from error


def _fit_sizes(weights: Weights, teacher: Teacher) -> Weights:
    """Position tables resampled to the teacher's grid, as open_clip's force_image_size does."""
    if (name := "visual.positional_embedding") in weights:
        weights[name] = weights[name][...].float()
        resize_pos_embed(weights, teacher)
    trunk = getattr(teacher.visual, "trunk", None)
    if (name := "visual.trunk.pos_embed") in weights:
        weights[name] = weights[name][...].float()
        if weights[name].ndim == 3 and weights[name].shape != trunk.pos_embed.shape:
            prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
            weights[name] = resample_abs_pos_embed(weights[name], trunk.patch_embed.grid_size, num_prefix_tokens=prefix)
    return weights


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())


def mismatches(wanted: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with tensors of these shapes by name, in words, sorted; empty where they fit a model strictly."""
    wrong = [f"{name} is missing" for name in wanted.keys() - given.keys()]
    wrong += [f"{name} is not in the model" for name in given.keys() - wanted.keys()]
    both = wanted.keys() & given.keys()
    return sorted(wrong + [f"{name} is {given[name]}, the model's {wanted[name]}" for name in both if given[name] != wanted[name]])


def _check_strictly(teacher: Teacher, weights: Weights, source: str, config: TeacherConfig) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in teacher.state_dict().items()}
    given = {name: _shape(tensor) for name, tensor in weights.items() if name.startswith("visual.")}
    if not given:
        raise ConfigError(f"{source} holds no image tower: no tensor is named visual.*; give a whole open_clip checkpoint.")
    wrong = mismatches(wanted, given)
    if wrong:
        raise ConfigError(
            f"{source} does not fit teacher.name = {config.name} at {config.img_size} px: {len(wrong)} tensors differ, e.g. "
            f"{'; '.join(wrong[:3])}. Name the model these weights were trained as."
        )


def _fingerprint(teacher: Teacher, weights: Weights, model: dict[str, Any]) -> str:
    """sha256 of architecture, activation and weights, the same for every kind of file that holds them.

    The first rank of each node reads the file through, one tensor at a time.
    """

    def digest() -> str:
        vision = {key: value for key, value in model["vision_cfg"].items() if value is not None and key != "image_size"}
        sha = hashlib.sha256(json.dumps([vision, model["quick_gelu"]], sort_keys=True).encode())
        for name in sorted(teacher.state_dict()):
            sha.update(name.encode())
            sha.update(weights[name][...].float().contiguous().numpy().data)
        return sha.hexdigest()

    mine, all_nodes = once_per_node(digest)
    if len(set(all_nodes)) > 1:
        raise ConfigError("The nodes read different teacher weights: give all of them the same file or tag.")
    return mine


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a tower: members of its outermost lists (transformer blocks, residual blocks, stages)."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from child.children()
        else:
            yield from _blocks(child)


def _shard(teacher: Teacher, config: TeacherConfig, device: torch.device) -> None:
    if config.shard == "none" or not dist.is_initialized():
        return
    ranks = dist.get_world_size()
    if config.shard == "node":
        ranks = ranks_per_host()
    if dist.get_world_size() % ranks:
        raise ConfigError(
            f"teacher.shard = node needs equally many ranks on every node, but {dist.get_world_size()} ranks are not a "
            f"multiple of {ranks}: set teacher.shard=world or none."
        )
    if ranks == 1:
        return
    group, _ = dist.new_subgroups(group_size=ranks)  # its own, so that it never queues behind the student's collectives
    mesh = DeviceMesh.from_group(group, device.type)
    for block in _blocks(teacher.visual):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(teacher, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def _fill(teacher: Teacher, weights: Weights, build: Callable[[torch.dtype], nn.Module], device: torch.device) -> None:
    """Storage on the device for what this rank keeps, and the values for it."""
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
    derived = [name for name, _ in teacher.visual.named_buffers() if f"visual.{name}" not in stored]
    if derived:  # tables computed at construction, e.g. rotary angles: no file holds them
        whole = dict(build(teacher.dtype).named_buffers())
        for name in derived:
            teacher.visual.get_buffer(name).copy_(whole[name])
