"""The decorator that makes a section of knobs, the types of their values, and a list of them in words."""

from __future__ import annotations

import dataclasses
import json
import textwrap
import types
from collections.abc import Iterator
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
)

import pydantic
from pydantic import ConfigDict, Field

T = TypeVar("T")
Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Triple = tuple[float, float, float]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def knobs(cls: type[T]) -> type[T]:
    """Class decorator: makes a frozen, strictly typed dataclass that refuses unknown keys."""
    section: Any = pydantic.dataclasses.dataclass(cls, frozen=True, config=STRICT)
    return section


class Knob(NamedTuple):
    """One setting of a recipe."""

    kind: str
    """Type and bounds in words."""
    default: Any
    text: str
    """Meaning, unit and source."""
    types: frozenset[Any]
    """The types that its values may have; the NoneType where it may be null."""


def knobs_of(section: Any, prefix: str = "") -> dict[str, Knob]:
    """Every knob of a section and of those inside it, by its dotted name."""
    by_name: dict[str, Knob] = {}
    for name, field in section.__pydantic_fields__.items():
        if dataclasses.is_dataclass(field.annotation):
            by_name |= knobs_of(field.annotation, f"{prefix}{name}.")
            continue
        # pydantic reads the string below a field in the class that defines it, not in those that inherit it.
        fields = [vars(each).get("__pydantic_fields__", {}).get(name) for each in section.__mro__]
        texts = [each.description for each in fields if each and each.description]
        text = " ".join("".join(texts[:1]).split())
        default = field.get_default(call_default_factory=True)
        kind = _kind(field.annotation, field.metadata)
        by_name[prefix + name] = Knob(
            kind, default, text, frozenset(_types(field.annotation, field.metadata))
        )
    return by_name


def known_keys(settings: type) -> list[str]:
    """Names all knobs, dotted."""
    return list(knobs_of(settings))


def describe(settings: type, section: str = "") -> str:
    """Lists the knobs of a section, or all, with type, default and meaning; empty for an unknown section."""
    paragraphs = []
    for name, knob in knobs_of(settings).items():
        if f"{name}.".startswith(f"{section}." if section else ""):
            paragraphs.append(f"{name} = {json.dumps(knob.default)}   ({knob.kind})")
            paragraphs.append(textwrap.indent(textwrap.fill(knob.text, 96), "    "))
    return "\n".join(paragraphs)


def _types(annotation: Any, metadata: Any = ()) -> Iterator[Any]:
    """Yields the types that a knob may be given; of a list or a mapping only which of the two it is."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _types(inner[0], inner[1:])
    elif origin in (Union, types.UnionType):
        yield from (each for option in inner for each in _types(option))
    elif origin is Literal:
        yield from map(type, inner)
    else:
        yield origin or annotation
    for validator in (each for each in metadata if isinstance(each, pydantic.BeforeValidator)):
        yield from _types(validator.json_schema_input_type)


def _kind(annotation: Any, metadata: Any = ()) -> str:
    """Type and bounds of a knob in words."""
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)

    # Inside unions pydantic nests the constraints in a Field.
    constraints = [one for each in metadata for one in getattr(each, "metadata", None) or [each]]
    values = [(sign, getattr(one, key, None)) for one in constraints for key, sign in BOUNDS.items()]
    bounds = ", ".join(f"{sign} {value}" for sign, value in values if value is not None)

    if get_origin(annotation) is Literal:
        words = " | ".join(map(str, get_args(annotation)))
    elif get_origin(annotation) in (Union, types.UnionType):
        words = " or ".join(_kind(each) for each in get_args(annotation))
    elif get_origin(annotation) is tuple and ... in get_args(annotation):
        words = f"list, each: {_kind(get_args(annotation)[0])}"
    elif get_origin(annotation) is tuple:
        each = get_args(annotation)
        words = f"{len(each)} values, each: {_kind(each[0])}"
    else:
        words = WORDS.get(annotation, "mapping of names to values")
    return f"{words} {bounds}".strip()
