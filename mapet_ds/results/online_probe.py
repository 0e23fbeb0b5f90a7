"""What the features of a run are worth while it goes on: the probes of tools/evaluate.py on the ViT that would be exported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import timm.data
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.data.index import Index, Selection, open_index
from mapet_ds.data.labelled import Bad, EvaluationBatches, check_classes, report_unreadable, served
from mapet_ds.errors import DataError
from mapet_ds.launch import Ranks
from mapet_ds.results.export import evaluation_data
from mapet_ds.results.probe import K, features, knn, linear_sgd, unit_length
from mapet_ds.training.watchdog import PROBING
from mapet_ds.vit import build_vit

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Of the linear probe. With higher ones SGD amplifies rounding, and the figure would depend on the ranks (docs/log.md)."""


class OnlineProbe:
    """k-NN and linear accuracy on evaluate.train and evaluate.val. Every rank must build one and call it.

    The weights go into a ViT of its own, in fp32 on each rank until the figures are there. So the engine, its hooks and its
    modes are not touched, and under ZeRO-3 no forward waits for another rank's.

    Raises:
        DataError: labels that can't be learnt, or too few images.
    """

    def __init__(self, config: Config, trained_on: Index, folder: Path, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        roots = {"train": config.evaluate.train, "val": config.evaluate.val}
        indices = [
            trained_on
            if root == config.data.train
            else ranks.first_then_all(
                lambda root=root, name=name: open_index(root, folder / f"index_evaluate_{name}")
            )
            for name, root in roots.items()
        ]
        check_classes(*indices, section="evaluate")
        self.train, self.val = (Selection(index, config.evaluate.max_images) for index in indices)
        if len(self.train) < (least := max(2 * K, len(self.train.classes))):
            raise DataError(
                f"{len(self.train)} images of evaluate.train = {config.evaluate.train} are too few for {K} neighbours and "
                f"{len(self.train.classes)} classes: name a folder with at least {least}, and as many in evaluate.max_images."
            )

    def __call__(
        self, weights: Iterable[tuple[str, Tensor]], doing: Callable[[str], None]
    ) -> dict[str, float]:
        """knn_accuracy_percent and linear_accuracy_percent, on rank 0; nothing on the others, which wait for it.

        weights: by the names of an objective, of which all are taken, and its `vit` used; doing: told what goes on. No random
        generator is moved.

        Raises:
            DataError: more than data.max_bad_share of the images are unreadable.
        """
        with torch.random.fork_rng(devices=[]):
            vit = build_vit(self.config.model).to(self.ranks.device)
            own = {f"vit.{name}": parameter.detach() for name, parameter in vit.named_parameters()}
            for name, weight in weights:
                if name in own:
                    own[name].copy_(weight)
            sets = [each for images in (self.train, self.val) for each in self._features(vit, images, doing)]
        doing(PROBING if self.ranks.rank == 0 else "waiting for rank 0 to judge features")
        figures = {}
        if self.ranks.rank == 0:
            train, train_labels, val, val_labels = sets
            figures["knn_accuracy_percent"] = knn(
                unit_length(train), train_labels, unit_length(val), val_labels, on_gpus=False  # they are full of training
            )  # fmt: skip
            found = linear_sgd(
                *sets, LEARNING_RATES, batch_norm=True, seed=self.config.seed, device=self.ranks.device
            )
            figures["linear_accuracy_percent"] = found.accuracy
        dist.barrier(self.ranks.control)
        doing("going on after an evaluation")
        return figures

    def _features(
        self, vit: torch.nn.Module, images: Selection, doing: Callable[[str], None]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features and labels of the readable images in their order, on rank 0; empty elsewhere."""
        ranks, bad = self.ranks, Bad()
        transform = timm.data.create_transform(**evaluation_data(self.config))
        dataset = EvaluationBatches(self.config, images, transform, ranks.rank, ranks.world_size)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for number, batch in enumerate(
                served(dataset, range(len(dataset)), self.config.data.workers, ranks)
            ):
                doing(f"evaluating batch {number} of {len(dataset)}")
                bad.extend(batch.bad)
                yield batch.images, batch.label

        shares = [torch.from_numpy(each) for each in features(vit, batches(), ranks.device)]
        report_unreadable(self.config, images, bad, ranks)
        whole = []
        for share in shares:
            parts = [torch.empty_like(share) for _ in range(ranks.world_size)] if ranks.rank == 0 else None
            dist.gather(share, parts, group=ranks.control)
            whole.append(
                torch.stack(parts, dim=1).flatten(0, 1) if parts else share[:0]
            )  # image i was rank i % world_size's
        found, labels = whole
        return found[labels >= 0].numpy(), labels[labels >= 0].numpy()
