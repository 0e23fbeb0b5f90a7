"""The weights of others: read without executing anything, compared by name and shape, folded.

Files are PyTorch's checkpoints or safetensors. The dictionaries and prefixes that training programs put
around the tensors are taken off.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mapet_ds.errors import ConfigError
from mapet_ds.launch import once_per_node

Tensors = dict[str, Any]
"""Name -> tensor, or a lazy slice of a safetensors file. Both are read by indexing."""
UNREADABLE = (
    safetensors.SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, OSError,
    RuntimeError, EOFError, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip
"""The errors of PyTorch's and timm's readers at a file that is damaged or of another kind: nearly any."""
NESTS = ("state_dict", "model", "module", "student")
AVERAGES = ("state_dict_ema", "model_ema", "teacher")
PREFIXES = ("module.", "_orig_mod.", "encoder.")
HEAD_DIM = 64
"""Width of a head in the published ViTs (12 heads of 768), the one size that no tensor's shape gives."""
TABLE = "relative_position_bias_table"
SHARED_TABLE = f"rel_pos_bias.{TABLE}"
"""BEiT's relative positions, in pre-training one table for all blocks."""
LAYER_SCALE = re.compile(r"(?P<block>.+)\.(?:ls|gamma_)(?P<branch>[12])(?:\.gamma)?")


def read_tensors(path: Path, source: str, *, ema: bool | None = False, slices: bool = False) -> Tensors:
    """Reads the tensors of a file by name. Nothing in the file is ever executed.

    source: the user's name of the file, for the sentences, e.g. "tokenizer.path = FILE".
    ema: True takes the moving average beside the weights; None takes it where there is one.
    slices: a safetensors file gives lazy slices, so that a rank reads no more than it keeps.

    Raises:
        ConfigError: the file is missing, can't be read without executing it, or has no tensors by name.
    """
    if not path.is_file():
        raise ConfigError(f"{source} is not a file: name a checkpoint of PyTorch's or a safetensors file.")
    held = _read(path, source, slices)
    if ema and not (isinstance(held, dict) and any(name in held for name in AVERAGES)):
        raise ConfigError(f"{source} holds no moving average ({' or '.join(AVERAGES)}); leave --ema out.")

    # Take off the dictionaries around the tensors.
    nests = NESTS if ema is False else AVERAGES + NESTS
    while isinstance(held, dict) and (inner := [n for n in nests if isinstance(held.get(n), dict)]):
        held = held[inner[0]]
    if not isinstance(held, dict) or not held or not all(map(_is_named_tensor, held.items())):
        raise ConfigError(_no_tensors(held, source))

    # Take off the prefixes that all names have.
    while common := [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in held)]:
        held = {name.removeprefix(common[0]): tensor for name, tensor in held.items()}
    return held


def _read(path: Path, source: str, slices: bool) -> Any:
    """The content of a file, read by safetensors or by PyTorch's reader of tensors alone."""
    try:
        if path.suffix == ".safetensors":
            if not slices:
                return load_file(path)
            handle = safetensors.safe_open(path, "pt")
            return {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118, it is no dictionary
        members = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith("/constants.pkl") for name in members):
            raise ConfigError(
                f"{source} is a TorchScript archive, which is a program (OpenAI's originals are such). "
                "Convert it once to safetensors. For a teacher: Name the tag instead, teacher.weights=openai."
            )
        # Training programs keep their options beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        # Only the start of PyTorch's message: the rest advises to read the file all the same.
        program = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {program[1]}" if program else str(error).partition(". ")[0].partition("\n")[0]
        raise ConfigError(
            f"{source} can't be read as plain tensors by name: {reason}. An archive must be unpacked first; "
            "a file that holds more than tensors, numbers and text is not read, because that could run a "
            "program: save its tensors alone, as safetensors."
        ) from error


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, tensor = item
    return isinstance(name, str) and (isinstance(tensor, Tensor) or hasattr(tensor, "get_shape"))


def _no_tensors(held: Any, source: str) -> str:
    if not isinstance(held, dict):
        content, average = f"a {type(held).__name__}", ""
    else:
        content = ", ".join(map(str, list(held)[:6])) or "nothing"
        average = "; --ema takes its moving average" if set(AVERAGES) & held.keys() else ""
    return f"{source} holds no tensors by name, also not under {', '.join(NESTS)}, but {content}{average}."


def timm_weights(path: Path, model: nn.Module, source: str) -> dict[str, Tensor]:
    """Reads tensors by timm's names, and resamples positions and patch embedding to the model's.

    BEiT's relative positions come as the model has them: one table for all blocks, or one in each.

    A moving average is taken where the file has one, as timm does; DINO's and iBOT's is their teacher, whose
    backbone is taken without the head that projects its features.

    Raises:
        ConfigError: the file can't be read, or its tensors can't be resampled.
    """
    state = read_tensors(path, source, ema=None)
    inner = {name.removeprefix("backbone."): state[name] for name in state if name.startswith("backbone.")}
    state = fit_positions(inner or state, SHARED_TABLE in dict(model.named_parameters()))
    convert = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    try:
        return convert(state, model) if convert else state
    except UNREADABLE as error:
        reason = f"{type(error).__name__} {error}"
        raise ConfigError(f"{source}: timm can't fit its tensors to the model: {reason}.") from error


def timm_tag_file(tag: str, asked: str) -> Path:
    """The weights of a timm tag, NAME.TAG, downloaded by the first rank of each node while the others wait.

    asked: the user's words for it, for the sentences, e.g. "model.init_from = timm:NAME.TAG".

    Raises:
        ConfigError: there are no such weights, or they can't be downloaded.
    """

    def download() -> str:
        try:
            repository: Any = timm.get_pretrained_cfg(tag, allow_unregistered=False)
            return hf_hub_download(repository.hf_hub_id, "model.safetensors")
        except (RuntimeError, HFValidationError) as error:
            raise ConfigError(f"{asked}: timm has no such weights on Hugging Face's hub: {error}") from error
        except OSError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{asked} can't be downloaded: {reason} Fetch it where there is a network (it is kept in "
                "HF_HOME), or name a local file or folder."
            ) from error

    return Path(once_per_node(download)[0])


def shapes_only() -> bool:
    """Whether tensors made now have shapes but no values: costs are being counted, and no file is read."""
    return isinstance(torch.empty(0), FakeTensor)


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by its name."""
    return {name: tuple(t.shape if isinstance(t, Tensor) else t.get_shape()) for name, t in tensors.items()}


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256 of names and fp32 values, equal for every kind of file that holds these tensors."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].float().contiguous().numpy().data)
    return sha.hexdigest()


def mismatches(wanted: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]) -> list[str]:
    """Lists, sorted, what keeps tensors of the shapes `given` from loading strictly into `wanted`."""
    wrong = [f"{name} is missing" for name in wanted.keys() - given.keys()]
    wrong += [f"{name} is not in the model" for name in given.keys() - wanted.keys()]
    differing = [name for name in wanted.keys() & given.keys() if given[name] != wanted[name]]
    wrong += [f"{name} is {given[name]}, the model's {wanted[name]}" for name in differing]
    return sorted(wrong)


def fit_positions(state: dict[str, Tensor], shared: bool) -> dict[str, Tensor]:
    """The same function with BEiT's relative positions in one table for all blocks, or in one for each.

    Tables of blocks that differ stay: a model with one table can't compute what they do.
    """
    blocks = {match[0] for name in state if (match := re.match(r"blocks\.\d+\.attn", name))}
    own = [name for name in state if name.endswith(f".attn.{TABLE}")]
    if shared and own and all(torch.equal(state[own[0]], state[name]) for name in own):
        return {name: state[name] for name in state if name not in own} | {SHARED_TABLE: state[own[0]]}
    if not shared and not own and SHARED_TABLE in state:
        tables = {f"{block}.{TABLE}": state[SHARED_TABLE] for block in blocks}
        return {name: state[name] for name in state if name != SHARED_TABLE} | tables
    return state


def fold_layer_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiplies each LayerScale's gamma, of timm's ViT or BEiT, into the linear layer before it.

    The model computes the same function without its LayerScales.
    """
    scales = {name: match for name in state if (match := LAYER_SCALE.fullmatch(name))}
    folded = {name: tensor for name, tensor in state.items() if name not in scales}
    for name, match in scales.items():
        layer = f"{match['block']}.{'attn.proj' if match['branch'] == '1' else 'mlp.fc2'}"
        folded[f"{layer}.weight"] = folded[f"{layer}.weight"] * state[name][:, None]
        if f"{layer}.bias" in folded:
            folded[f"{layer}.bias"] = folded[f"{layer}.bias"] * state[name]
    return folded
