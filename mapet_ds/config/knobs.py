"""What a knob may be: a strictly typed, bounded value of a frozen dataclass, with its meaning in the string below it."""

from __future__ import annotations

import dataclasses
import json
import textwrap
import types
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pydantic
from pydantic import ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Triple = tuple[float, float, float]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def knobs(cls: type) -> type:
    """Class decorator: a frozen, strictly typed dataclass that refuses unknown keys."""
    return pydantic.dataclasses.dataclass(cls, frozen=True, config=STRICT)


class Knob(NamedTuple):
    """One setting of a recipe."""

    kind: str
    """Type and bounds in words."""
    default: Any
    text: str
    """Meaning, unit and source."""


def knobs_of(settings: type, prefix: str = "") -> dict[str, Knob]:
    """Every knob of nested sections by its dotted name."""
    found: dict[str, Knob] = {}
    for name, field in settings.__pydantic_fields__.items():
        if dataclasses.is_dataclass(field.annotation):
            found |= knobs_of(field.annotation, f"{prefix}{name}.")
            continue
        # pydantic reads the string below a field in the class that defines it, not in those that inherit it.
        owners = [each.__pydantic_fields__ for each in settings.__mro__ if dataclasses.is_dataclass(each)]
        texts = [fields[name].description for fields in owners if name in fields and fields[name].description]
        default = field.get_default(call_default_factory=True)
        found[prefix + name] = Knob(
            _type(field.annotation, field.metadata), default, " ".join("".join(texts[:1]).split())
        )
    return found


def known_keys(settings: type) -> list[str]:
    """All knobs as dotted names."""
    return list(knobs_of(settings))


def describe(settings: type, section: str = "") -> str:
    """Every knob of a section, or all, with type, default and meaning; empty where there is none of that name."""
    paragraphs = []
    for name, knob in knobs_of(settings).items():
        if f"{name}.".startswith(f"{section}." if section else ""):
            paragraphs.append(f"{name} = {json.dumps(knob.default)}   ({knob.kind})")
            paragraphs.append(textwrap.indent(textwrap.fill(knob.text, 96), "    "))
    return "\n".join(paragraphs)


def _type(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """A knob's type and bounds in words."""
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
    bounds = [
        f"{sign} {getattr(each, key)}"
        for each in _bounds(metadata)
        for key, sign in BOUNDS.items()
        if getattr(each, key, None) is not None
    ]
    if get_origin(annotation) is Literal:
        words = " | ".join(map(str, get_args(annotation)))
    elif get_origin(annotation) in (Union, types.UnionType):
        words = " or ".join(_type(each) for each in get_args(annotation))
    elif get_origin(annotation) is tuple:
        each = get_args(annotation)
        words = f"{len(each)} of: {_type(each[0])}"
    else:
        words = WORDS.get(annotation, "mapping of names to values")
    return " ".join([words, ", ".join(bounds)]).strip()


def _bounds(metadata: Any) -> list[Any]:
    """The single constraints in an annotation's metadata: pydantic nests them in a Field inside unions."""
    return [one for each in metadata for one in getattr(each, "metadata", None) or [each]]
