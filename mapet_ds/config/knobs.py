"""What a knob may be: a dataclass of strictly typed, bounded values. Imports neither torch nor the recipes' sections."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Triple = tuple[float, float, float]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def knobs(cls: type) -> type:
    """Class decorator: a frozen, strictly typed dataclass that refuses unknown keys."""
    return pydantic.dataclasses.dataclass(cls, frozen=True, config=STRICT)
