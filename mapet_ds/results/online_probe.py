"""The probes of tools/evaluate.py during a run, on the ViT that an export would take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm.data
import torch
import torch.distributed as dist
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.data.index import Index, Selection, open_index
from mapet_ds.data.labelled import check_apart, check_classes
from mapet_ds.data.range_cache import RangeCache
from mapet_ds.errors import DataError
from mapet_ds.launch import Ranks
from mapet_ds.results.collapse import collapse_figures
from mapet_ds.results.export import evaluation_data
from mapet_ds.results.features import FEATURES, Labels, Vectors, chosen, labelled_features, unit_length
from mapet_ds.results.probe import K, knn, linear_sgd
from mapet_ds.training.watchdog import PROBING
from mapet_ds.vit import build_vit

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""The rates of the linear probe. Higher ones amplify rounding, which the ranks change (docs/log.md)."""


class OnlineProbe:
    """k-NN and linear accuracy on evaluate.train and evaluate.val. Every rank must build one and call it.

    Each rank copies the weights into a ViT of its own, in fp32, for as long as the evaluation lasts. So the
    engine, its hooks and its modes are not touched, and under ZeRO-3 no forward waits for another rank's.

    Raises:
        DataError: labels that can't be learnt, or too few images.
    """

    def __init__(self, config: Config, trained_on: Index, folder: Path, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks

        def index(name: str, root: str) -> Index:
            if root == config.data.train:
                return trained_on
            cache, ranges = folder / f"index_evaluate_{name}", RangeCache.of(config.data)
            return ranks.first_then_all(lambda: open_index(root, cache, ranks.rank == 0, ranges))

        assert config.evaluate.train and config.evaluate.val
        train, val = index("train", config.evaluate.train), index("val", config.evaluate.val)
        check_classes(train, val, section="evaluate.")
        check_apart(train, val, "evaluate.", ranks)
        self.train, self.val = (Selection(each, config.evaluate.max_images) for each in (train, val))
        if len(self.train) < (least := max(2 * K, len(self.train.classes))):
            raise DataError(
                f"{len(self.train)} images of evaluate.train = {config.evaluate.train} are too few for {K} "
                f"neighbours and {len(self.train.classes)} classes: name a folder with at least {least}, and "
                "as many in evaluate.max_images."
            )

    def __call__(
        self, weights: Iterable[tuple[str, Tensor]], doing: Callable[[str], None]
    ) -> dict[str, float]:
        """Figures of the objective's feature on rank 0; nothing on the others, which wait.

        knn_accuracy_percent and linear_accuracy_percent; effective_rank and feature_cosine of evaluate.val;
        and knn_accuracy_percent_NAME of the other features, mean, token and both, from the same forward.

        weights: an objective's by name. All are taken, and those of its `vit` are used.
        doing: called with a phrase for what goes on.
        No random generator is moved. The host waits for the GPU.

        Raises:
            DataError: more than data.max_bad_share of the images are unreadable.
        """
        with torch.random.fork_rng(devices=[]):
            vit = build_vit(self.config.model).to(self.ranks.device)
            own = {f"vit.{name}": parameter.detach() for name, parameter in vit.named_parameters()}
            for name, weight in weights:
                if name in own:
                    own[name].copy_(weight)
            train, train_labels = self._features(vit, self.train, doing)
            val, val_labels = self._features(vit, self.val, doing)

        doing(PROBING if self.ranks.rank == 0 else "waiting for rank 0 to judge features")
        figures = {}
        if self.ranks.rank == 0:
            own = self.config.method.feature
            for feature in FEATURES:
                name = "knn_accuracy_percent" if feature == own else f"knn_accuracy_percent_{feature}"
                directions, val_directions = (
                    unit_length(chosen(each, feature, [0])) for each in (train, val)
                )
                figures[name] = knn(
                    directions, train_labels, val_directions, val_labels, on_gpus=False  # training fills them
                )  # fmt: skip
            figures |= collapse_figures(chosen(val, own, [0]))
            probe = linear_sgd(
                chosen(train, own, [0]), train_labels, chosen(val, own, [0]), val_labels, LEARNING_RATES,
                batch_norm=True, seed=self.config.seed, device=self.ranks.device,
            )  # fmt: skip
            figures["linear_accuracy_percent"] = probe.accuracy
        dist.barrier(self.ranks.control)
        doing("going on after an evaluation")
        return figures

    def _features(
        self, vit: torch.nn.Module, images: Selection, doing: Callable[[str], None]
    ) -> tuple[Vectors, Labels]:
        transform: Any = timm.data.create_transform(**evaluation_data(self.config))
        kinds = FEATURES["both"]
        return labelled_features(self.config, vit, images, transform, self.ranks, doing, kinds=kinds)
