"""What a setting names as package.module:name: an objective, a tokenizer or a tracker of one's own."""

from __future__ import annotations

import dataclasses
import os
import pkgutil
import sys
from typing import Any

from mapet_ds.config.objectives import ObjectiveConfig
from mapet_ds.errors import ConfigError

NEEDED = ("draw", "forward", "patch_predictions", "build_target")


def resolve(knob: str, name: str) -> Any:
    """What package.module:name names: installed, on PYTHONPATH, or in the current folder, in this order.

    The module is imported, and so is all that it imports.

    Raises:
        ConfigError: there is no such module, or nothing of that name in it.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{knob} = {name} can't be resolved: {error}. Its module must be installed, on PYTHONPATH or in "
            f"the current folder, {folder}."
        ) from error


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def own_objective(name: str) -> Any:
    """The class of an objective that package.module:Class names.

    Raises:
        ConfigError: there is no such class, or it lacks what an objective must have.
    """
    found, needs = resolve("objective", name), "mapet_ds.objectives.objective.Objective"
    if not isinstance(found, type):
        raise ConfigError(
            f"objective = {name} is a {type(found).__name__}, not a class: derive one of {needs}."
        )
    abstract = getattr(found, "__abstractmethods__", ())
    lacks = [each for each in NEEDED if each in abstract or not callable(getattr(found, each, None))]
    settings = getattr(found, "settings", None)
    if not (isinstance(settings, type) and issubclass(settings, ObjectiveConfig)):
        lacks.append("settings")
    elif not dataclasses.is_dataclass(settings):
        raise ConfigError(
            f"objective = {name}: put @knobs (mapet_ds.config.knobs) above {settings.__name__}."
        )
    elif bare := [each.name for each in dataclasses.fields(settings) if _required(each)]:
        raise ConfigError(f"objective = {name}: {settings.__name__}.{bare[0]} needs a default.")
    if lacks:
        raise ConfigError(
            f"objective = {name} lacks {', '.join(lacks)}. It must be a subclass of {needs} with the "
            "methods draw and forward, and two attributes of the class: settings, a subclass of "
            "ObjectiveConfig under @knobs, and build_target, called as build_target(config, device). "
            "docs/extending.md shows one."
        )
    return found
