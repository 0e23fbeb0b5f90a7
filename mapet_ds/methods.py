"""Each pre-training method: the objective that predicts, and the target that is predicted.

Methods are known by name, or lie outside the package (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mapet_ds.config.own import own_objective
from mapet_ds.config.sections import Config
from mapet_ds.objectives.beit import BEiT
from mapet_ds.objectives.cae import CAE
from mapet_ds.objectives.conmim import ConMIM
from mapet_ds.objectives.mae import MAE
from mapet_ds.objectives.mapet import MaPeT
from mapet_ds.objectives.mvp import MVP
from mapet_ds.objectives.objective import Objective, seed_weights
from mapet_ds.objectives.saim import SAIM
from mapet_ds.targets.features import Pixels, TeacherFeatures, pixels_or_features
from mapet_ds.targets.momentum import MomentumTeacher
from mapet_ds.targets.target import Target
from mapet_ds.targets.token_ids import token_ids

METHODS: dict[str, tuple[type[Objective], Callable[[Config, torch.device], Target]]] = {
    # name: (objective, target)
    "mapet": (MaPeT, token_ids),
    "beit": (BEiT, token_ids),
    "mvp": (MVP, TeacherFeatures),
    "saim": (SAIM, pixels_or_features),
    "conmim": (ConMIM, MomentumTeacher),
    "mae": (MAE, partial(Pixels, blur=False)),
    "cae": (CAE, token_ids),
}


def _method(config: Config) -> tuple[Any, Any]:
    """The objective and the target of a run."""
    config.check_objective()
    if config.section == "own":
        objective = own_objective(config.objective)
        return objective, objective.build_target
    return METHODS[config.objective]


def build_objective(config: Config, target_dim: int) -> Objective:
    """The configured objective on the CPU, initialised from the run's seed: equal on every rank.

    target_dim: the number of token ids, or the width of the vector that the target gives for each patch.
    """
    seed_weights(config.seed)
    return _method(config)[0](config, target_dim)


def build_target(config: Config, device: torch.device) -> Target:
    """The target of the configured objective, on `device`. Every rank must call it."""
    return _method(config)[1](config, device)
