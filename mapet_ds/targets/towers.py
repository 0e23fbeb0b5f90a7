"""Image towers of open_clip and timm by name, and the published weights and colours that belong to them.

teacher.name names open_clip's model, a folder, or timm:NAME. teacher.weights names a tag of that model or a
file.
"""

from __future__ import annotations

import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, cast

import open_clip
import timm
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import _build_vision_tower, resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import LayerNormFp32
from timm.layers import resample_abs_pos_embed
from torch import nn

from mapet_ds.config.knobs import Triple
from mapet_ds.config.sections import TIMM, TeacherConfig
from mapet_ds.config.towers import teacher_model_config
from mapet_ds.data.batch import View
from mapet_ds.errors import ConfigError
from mapet_ds.launch import once_per_node
from mapet_ds.weights import Tensors, read_tensors, timm_tag_file, timm_weights

log = logging.getLogger(__name__)


def _tags(name: str) -> dict[str, dict[str, Any]]:
    """The tags of a model's published weights, each with what is known of it, e.g. mean and std."""
    if name.startswith(TIMM):
        tagged = timm.list_pretrained(f"{name.removeprefix(TIMM)}.*")
        return {each.partition(".")[2]: vars(timm.get_pretrained_cfg(each)) for each in tagged}
    tags = open_clip.list_pretrained_tags_by_model(name)
    return {tag: open_clip.get_pretrained_cfg(name, tag) for tag in tags}


def weights_tag(config: TeacherConfig) -> dict[str, Any]:
    """What is known of the tag that teacher.weights names; nothing where it names none."""
    if config.name.startswith(TIMM):
        return _tags(config.name).get(config.weights, {})
    return open_clip.get_pretrained_cfg(config.name, config.weights)


def teacher_mean_std(config: TeacherConfig) -> tuple[Triple, Triple]:
    """Mean and standard deviation per channel that the teacher's images are normalised with.

    The folder's preprocess_cfg or the tag gives them. A file takes those of all tags of its model, where
    these agree, else OpenAI's, or those of the tag that timm takes where none is named.
    """
    if config.name.startswith("local-dir:"):
        teacher_model_config(config.name)
        folder = Path(config.name.removeprefix("local-dir:"))
        cfgs = [json.loads((folder / "open_clip_config.json").read_text()).get("preprocess_cfg", {})]
    elif tag := weights_tag(config):
        cfgs = [tag]
    else:
        cfgs = list(_tags(config.name).values())
    default: dict[str, Any] = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    if own := config.name.startswith(TIMM) and timm.get_pretrained_cfg(config.name.removeprefix(TIMM)):
        default = {"mean": own.mean, "std": own.std}
    pairs = {(tuple({**default, **cfg}["mean"]), tuple({**default, **cfg}["std"])) for cfg in cfgs}
    if len(pairs) == 1:
        return pairs.pop()
    _warn_of_colours(config.name, config.weights)
    return default["mean"], default["std"]


@cache
def _warn_of_colours(name: str, weights: str) -> None:
    """Says once that a file can't tell the mean and the deviation that its tower has learnt with."""
    if weights != "random" and int(os.environ.get("RANK", "0")) == 0:
        whose = "timm's defaults" if name.startswith(TIMM) else "OpenAI's"
        log.warning(
            f"teacher.weights = {weights} is a file and can't tell its mean and std; {name}'s tags differ, "
            f"and {whose} are taken. For a file with others, such as LAION's, name the tag, or a folder with "
            "its open_clip_config.json and preprocess_cfg: teacher.name=local-dir:FOLDER."
        )


def teacher_view(config: TeacherConfig) -> View:
    """The view of a crop that the teacher sees."""
    return View(config.img_size, *teacher_mean_std(config))


def quick_gelu(config: TeacherConfig, model: dict[str, Any]) -> bool:
    """Whether the weights were trained with QuickGELU, by the model or the tag; a file does not record it."""
    named = bool(model.get("quick_gelu"))
    tag = weights_tag(config)
    twin = f"{config.name}-quickgelu"
    known = named or tag or config.weights == "random"
    if not known and int(os.environ.get("RANK", "0")) == 0 and twin in open_clip.list_models():
        log.warning(
            f"teacher.weights = {config.weights} is a file and can't tell its activation; {config.name} "
            "means GELU. If the weights were trained with QuickGELU (OpenAI, MetaCLIP, DFN), set "
            f"teacher.name={twin}."
        )
    return named or bool(tag.get("quick_gelu"))


def build_tower(model: dict[str, Any], img_size: int, dtype: torch.dtype) -> nn.Module:
    """An image tower alone, on the current default device, its norms in fp32 whatever `dtype` is.

    model: what open_clip's JSON says of it, or as much of timm's model. Those keep timm's norms in `dtype`.

    Raises:
        ConfigError: timm has no such model, or it is no ViT.
    """
    vision: Any = dict(model["vision_cfg"], timm_model_pretrained=False, patch_dropout=0.0)
    alone = model.get("timm_alone", False)
    if alone and not timm.is_model(vision["timm_model_name"]):
        close = ", ".join(timm.list_models(f"*{vision['timm_model_name'][:12]}*")[:3]) or "none"
        raise ConfigError(
            f"teacher.name = {TIMM}{vision['timm_model_name']} is not a model of timm's; close: {close}."
        )
    # A ResNet's trunk takes any size; its pooling, which does not, is unused here.
    if vision.get("patch_size") and not vision.get("timm_model_name"):
        vision["image_size"] = img_size
    visual: Any = _build_vision_tower(model["embed_dim"], vision, model["quick_gelu"], cast_dtype=dtype)
    if alone:
        visual.head = nn.Sequential()  # open_clip's own projection, which no file of timm's has
        if not all(hasattr(visual.trunk, name) for name in ("blocks", "patch_embed", "set_input_size")):
            raise ConfigError(
                f"teacher.name = {TIMM}{vision['timm_model_name']} is a {type(visual.trunk).__name__}: only "
                "ViTs of timm's can be teachers by their own name."
            )
    if vision.get("timm_model_name"):
        visual.set_input_size(img_size)
    for module in visual.modules():
        if not isinstance(module, (LayerNormFp32, nn.modules.batchnorm._BatchNorm)):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    return visual


def is_resnet(visual: nn.Module) -> bool:
    """Whether a tower is open_clip's ModifiedResNet, whose pooling no dense feature needs."""
    return isinstance(visual, ModifiedResNet)


def final_norm(visual: Any) -> Any:
    """The LayerNorm of patches after the last block; None where a tower has none."""
    norm = getattr(visual, "ln_post", None) or getattr(getattr(visual, "trunk", None), "norm", None)
    return norm if isinstance(norm, nn.LayerNorm) else None


def weights_file(config: TeacherConfig) -> str:
    """Path of the weights. The first rank of each node downloads those of a tag, while the others wait."""
    if config.name.startswith("local-dir:"):
        path = Path(config.name.removeprefix("local-dir:")) / "open_clip_model.safetensors"
        if not path.is_file():
            raise ConfigError(f"teacher.name = {config.name}: there is no {path}.")
        return str(path)
    tag = weights_tag(config)
    if not tag:
        if not Path(config.weights).is_file():
            tags = ", ".join(_tags(config.name)) or "none"
            raise ConfigError(
                f"teacher.weights = {config.weights!r} is neither a file nor a tag of {config.name} (tags: "
                f"{tags}); `random` must be asked for by name."
            )
        return config.weights
    if config.name.startswith(TIMM):
        tagged = f"{config.name.removeprefix(TIMM)}.{config.weights}"
        return str(timm_tag_file(tagged, f"teacher.weights = {config.weights} of {config.name}"))

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


def tower_weights(path: Path, teacher: nn.Module, config: TeacherConfig) -> Tensors:
    """The tensors of a file by the names in `teacher`, whose `visual` is the tower; lazy slices if possible.

    Position tables are resampled to the tower's grid.

    Raises:
        ConfigError: the file can't be read as tensors by name.
    """
    source = f"The teacher's weights {path}"
    weights = read_tensors(path, source, slices=True)
    if config.name.startswith(TIMM):
        trunk: Any = teacher.visual
        weights = _timm_trunk(weights, path, trunk.trunk, source)
    else:
        weights = convert_state_dict(cast(Any, teacher), weights)
    return _fit_sizes(weights, teacher)


def _timm_trunk(weights: Tensors, path: Path, trunk: nn.Module, source: str) -> Tensors:
    """A timm model's own tensors without its classifier's, by the names that open_clip gives them."""

    def headless(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("head")}

    if headless(weights).keys() != trunk.state_dict().keys():
        weights = timm_weights(path, trunk, source)  # the names of the program that trained them
    return {f"visual.trunk.{name}": tensor for name, tensor in headless(weights).items()}


def _fit_sizes(weights: Tensors, teacher: Any) -> Tensors:
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
