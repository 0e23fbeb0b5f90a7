"""The attentive probe of tools/evaluate.py."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from evaluations.figures import described, whose, write_figures
from evaluations.images import Sets, labelled_sets
from evaluations.judges import tried
from evaluations.models import asked_of, build_model

from mapet_ds.errors import ConfigError

if TYPE_CHECKING:
    from mapet_ds.launch import Ranks

# torch and what needs it are imported once the words are parsed: --help and a mistake answer at once.


def evaluate_attentive(arguments: argparse.Namespace) -> None:
    """Prints the accuracy of an attentive probe, and writes it to --out. It runs in one process.

    Raises:
        ConfigError: it was started as several ranks.
    """
    import torch.distributed as dist

    from mapet_ds.launch import init_distributed
    from mapet_ds.results.probe import device_of

    device = device_of(arguments.device)
    model = build_model(arguments)
    arguments.features, arguments.feature, arguments.last = None, ["mean"], None
    arguments.layer = None if arguments.layer is None else [arguments.layer]
    layers = asked_of(arguments, model).layers
    ranks = init_distributed()._replace(device=device)
    try:
        if ranks.world_size > 1:
            raise ConfigError(
                f"attentive runs in one process, not in {ranks.world_size}: leave torchrun out."
            )
        with labelled_sets(arguments, ranks) as sets:
            sentence, figures = attend(arguments, model, sets, layers[0] if layers else None, ranks)
    finally:
        dist.destroy_process_group()
    figures |= whose(arguments)
    about = described(arguments, figures)
    print(json.dumps(figures) if arguments.json else f"{sentence} ({about})")
    write_figures(arguments.out, figures)


def attend(
    arguments: argparse.Namespace, model: Any, sets: Sets, layer: int | None, ranks: Ranks
) -> tuple[str, dict[str, Any]]:
    """The attentive probe of one block, None for the last: a sentence, and the figures."""
    from timm.data import create_transform, resolve_model_data_config

    from mapet_ds.results.attentive import EPOCHS, LEARNING_RATES, Tokens, attentive, token_shape

    shape = token_shape(model.to(ranks.device), layer)
    transform: Any = create_transform(**resolve_model_data_config(model))
    train, val = (
        Tokens(sets.config, model, images, transform, ranks, layer) for images in (sets.train, sets.val)
    )
    gigabytes = (len(train) + len(val)) * shape.numel() * 4 / 1e9
    if kept := gigabytes <= arguments.memory_gb:
        val.keep()
        train.keep()
    rates, epochs = arguments.learning_rates or LEARNING_RATES, arguments.epochs or EPOCHS
    probe = attentive(train, val, shape[-1], rates, epochs, arguments.seed)
    val.report()
    train.report()

    counts = {"train_images": len(train) - len(train.bad), "val_images": len(val) - len(val.bad)}
    sentence, figures = tried("Attentive", probe)
    figures = {"attentive_accuracy_percent": probe.accuracy} | figures | counts
    figures |= {"train_unreadable": len(train.bad), "val_unreadable": len(val.bad), "epochs": epochs}
    figures |= {"seed": arguments.seed, "batch_size": arguments.batch_size, "layer": layer, "kept": kept}
    return sentence, figures | {"classes": len(train.images.classes)}
