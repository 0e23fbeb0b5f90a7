"""Tiny CLIPs on disk, of each kind of image tower, and twins made by open_clip's own code."""

import json

import open_clip
import torch
from safetensors.torch import save_file

from mapet_ds.targets import teacher

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1}
VISION = {
    "vit": {"image_size": 64, "patch_size": 16, "width": 64, "head_width": 32, "layers": 3},
    "resnet": {"image_size": 128, "layers": [1, 1, 1, 1], "width": 8},
    "timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "none"},
    "relpos": {
        "image_size": 160,
        "timm_model_name": "test_vit_relpos",
        "timm_pool": "avg",
        "timm_proj": "none",
    },
}
SIZE = {kind: vision["image_size"] for kind, vision in VISION.items()} | {"trunk": 160}


def model_config(kind):
    """As in open_clip_config.json."""
    vision = dict(VISION[kind])
    return {
        "embed_dim": 64,
        "vision_cfg": vision,
        "text_cfg": dict(TEXT),
        "custom_text": "timm_model_name" in vision,
    }


def write_tower(folder, kind, seed=0):
    """A folder that open_clip loads as local-dir:, weights and statistics far from their initial values."""
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps(
            {
                "model_cfg": model_config(kind),
                "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
            }
        )
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        state = model.state_dict()
        for name, tensor in state.items():
            if tensor.is_floating_point():
                tensor += (
                    0.2 * torch.rand_like(tensor) if "running_var" in name else 0.1 * torch.randn_like(tensor)
                )
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def whole_model(folder, **options):
    """The same CLIP as open_clip builds and loads it."""
    return open_clip.create_model(f"local-dir:{folder}", **options).eval()


def know_tiny_models(setattr):
    """Let a teacher be named vit, resnet, ... as if open_clip shipped these models."""
    shipped = teacher.teacher_model_config
    setattr(
        teacher, "teacher_model_config", lambda name: model_config(name) if name in VISION else shipped(name)
    )
