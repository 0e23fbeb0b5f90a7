"""The reader of recipes: a YAML file and `a.b=value` overrides become settings, mistakes become sentences."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from mapet_ds.config.knobs import Knob, knobs_of
from mapet_ds.config.own import own_objective
from mapet_ds.config.sections import Config
from mapet_ds.config.shipped import RECIPES, STUDIES, SUITES, shipped_file, shipped_names
from mapet_ds.errors import ConfigError

Settings = TypeVar("Settings")
KINDS = {RECIPES: "recipe", STUDIES: "study", SUITES: "suite"}
"""What a file is called, by the folder of the shipped ones."""


class RecipeLoader(yaml.SafeLoader):
    """Reads YAML 1.2's numbers and refuses double keys.

    PyYAML takes the last of two keys, and follows YAML 1.1: 010 is 8, 1:30 is 90, 1e-3 and 2024-01-31 are
    text and a date.
    """

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            problem = f"the key {twice[0]} is there twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value, 16 if "x" in node.value else 10)


NUMBERS = {
    "int": r"[-+]?(\d[\d_]*|0x[\da-fA-F]+)",
    "float": r"[-+]?(\.\d+|\d[\d_]*(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for kind, pattern in NUMBERS.items():
    tag = f"tag:yaml.org,2002:{kind}"
    RecipeLoader.add_implicit_resolver(tag, re.compile(f"^({pattern})$"), list("-+.0123456789"))
RecipeLoader.add_constructor("tag:yaml.org,2002:int", RecipeLoader.construct_yaml_int)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=RecipeLoader)
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"{source} is not valid YAML: {where}.") from error


def _read_recipe(path: Path, folder: Path) -> dict[str, Any]:
    names = shipped_names(folder)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        close = difflib.get_close_matches(path.stem, names, n=1)
        cure = f"Did you mean {close[0]}?" if close else f"Shipped ones: {', '.join(names)}."
        raise ConfigError(f"The {KINDS[folder]} {path} can't be read: {error}. {cure}") from error
    recipe = _parse_yaml(text, f"The {KINDS[folder]} {path}")
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        kind = type(recipe).__name__
        raise ConfigError(f"The {KINDS[folder]} {path} must be a mapping of keys to values, not {kind}.")
    return recipe


def _put(values: dict[str, Any], leaf: str, value: Any) -> None:
    """Sets one value; a mapping adds its keys to those that are there."""
    if isinstance(value, dict) and isinstance(values.get(leaf), dict):
        for key, inner in value.items():
            _put(values[leaf], key, inner)
    else:
        values[leaf] = value


def _value(text: str, override: str, types: frozenset[Any]) -> Any:
    """The value of an override by the types of its knob: where text may stand, it stands for itself."""
    marks = {"[": {list, tuple}, "{": {dict}, '"': {str}, "'": {str}}
    is_yaml = str not in types or text == "null" or marks.get(text[:1], set()) & types
    if not text or not is_yaml:
        return text
    if " #" in text and not set(text) & {'"', "'"}:
        raise ConfigError(f"'{override}': what follows a # would be lost; put quotes around a text with one.")
    return _parse_yaml(text, f"The value of '{override}'")


def _apply_override(values: dict[str, Any], override: str, knobs: dict[str, Knob]) -> str:
    """Sets the value of one override; gives the name of its knob."""
    key, equals, text = override.partition("=")
    if not equals or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f"'{override}' is not of the form a.b=value, e.g. optim.lr=1e-3.")
    *parents, leaf = key.split(".")
    for parent in parents:
        if not isinstance(values.setdefault(parent, {}), dict):
            raise ConfigError(f"'{override}': {parent} is a single value and has no keys of its own.")
        values = values[parent]
    _put(values, leaf, _value(text, override, knobs[key].types if key in knobs else frozenset()))
    return key


def _at_home(value: Any) -> Any:
    """The same with paths in place of a leading ~, which a shell leaves as it is behind a dotted name."""
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_at_home(inner) for inner in value]
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ConfigError(f"{value} names no user's home folder: write the path in full.")
    return path


def _sentence(error: Any, recipe: str, overridden: set[str], known: list[str], prefix: str) -> str:
    """The sentence for pydantic's record of an error: the knob, the value, its source and what to do."""
    key = prefix + ".".join(str(part) for part in error["loc"])
    of_command = any(f"{key}.".startswith(f"{k}.") or k.startswith(f"{key}.") for k in overridden)
    value = json.dumps(error["input"], default=str)
    source = f"(from {'the command line' if of_command else recipe})"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        close = [name for name in known if name.endswith(f".{key}")]
        close = close or difflib.get_close_matches(key, known, n=1)
        hint = (
            f"; did you mean {' or '.join(close)}?"
            if close
            else ". pretrain.py --knobs, finetune.py --knobs and segment.py --knobs list them."
        )
        return f"{key} = {value} {source} is not a knob{hint}"
    if error["type"] == "missing":
        return f"{key.rpartition('.')[0]} = {value} {source} has too few values."
    if isinstance(error["input"], list) and key.endswith(("img_size", "patch_size")):
        return f"{key} = {value} {source}: views and patches are square; give one number, the side in pixels."
    message = error["msg"].replace("a valid array", "a list, e.g. [1, 2]")
    message = message.replace("an object", "a mapping of keys to values")
    return f"{key} = {value} {source}: {message[0].lower()}{message[1:]}."


def _own_settings(values: dict[str, Any], overrides: Sequence[str]) -> Any:
    """The class of the settings of an objective of one's own; None where the package has the objective."""
    named = [override.partition("=")[2] for override in overrides if override.startswith("objective=")]
    objective = named[-1] if named else values.get("objective")
    return own_objective(objective).settings if isinstance(objective, str) and ":" in objective else None


def load_config(
    recipe: str | Path, overrides: Sequence[str] = (), cls: type[Settings] = Config, folder: Path = RECIPES
) -> Settings:
    """Reads a recipe with `a.b=value` overrides on top. The values are not yet checked against each other.

    recipe: a file, or the name of a shipped one of `folder`. cls: the settings that it gives: Config,
        FinetuneConfig, SegmentationConfig, StudyConfig of a study or SuiteConfig of a suite.

    Raises:
        ConfigError: the file can't be read or is no YAML, a key is unknown, a value has a wrong type or
            range.
    """
    recipe = shipped_file(recipe, folder)
    values, knobs = _read_recipe(recipe, folder), knobs_of(cls)
    own = _own_settings(values, overrides) if cls is Config else None
    if own:
        knobs |= knobs_of(own, "own.")
    overridden = {_apply_override(values, override, knobs) for override in overrides}
    try:
        values = json.loads(json.dumps(_at_home(values)))
    except (TypeError, ValueError) as error:
        message = f"The {KINDS[folder]} {recipe} holds a value that is no number, string or list: {error}."
        raise ConfigError(message) from error

    def checked(section: Any, values: Any, prefix: str = "") -> Any:
        try:
            return pydantic.TypeAdapter(section).validate_json(json.dumps(values))
        except pydantic.ValidationError as errors:
            known = [*knobs]
            sentences = [
                _sentence(error, str(recipe), overridden, known, prefix) for error in errors.errors()
            ]
            raise ConfigError("\n".join(sentences)) from errors

    config = checked(cls, values)
    if own:
        section = dataclasses.asdict(checked(own, config.own, "own."))
        config = dataclasses.replace(config, own=json.loads(json.dumps(section)))
    return config
