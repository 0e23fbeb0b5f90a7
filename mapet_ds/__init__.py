"""Pre-training of Vision Transformers by masked and permuted prediction, on DeepSpeed and DALI.

The names below are the library: docs/library.md shows each, and a version keeps them. A name is imported when
it is first used, so that `import mapet_ds` brings neither torch nor DALI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mapet_ds.errors import UserError as UserError
    from mapet_ds.library import Codebook as Codebook
    from mapet_ds.library import build_objective as build_objective
    from mapet_ds.library import build_target as build_target
    from mapet_ds.library import fit_codebook as fit_codebook
    from mapet_ds.library import load_export as load_export
    from mapet_ds.library import load_recipe as load_recipe
    from mapet_ds.library import make_batch as make_batch
    from mapet_ds.library import open_loader as open_loader
    from mapet_ds.library import token_image as token_image
    from mapet_ds.library import view_image as view_image

__version__ = "0.1.0"
_LIBRARY = (
    "Codebook", "UserError", "build_objective", "build_target", "fit_codebook", "load_export", "load_recipe",
    "make_batch", "open_loader", "token_image", "view_image",
)  # fmt: skip
__all__ = ["__version__", *_LIBRARY]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _LIBRARY:
        raise AttributeError(f"module 'mapet_ds' has no attribute '{name}'; it has {', '.join(__all__)}.")
    return getattr(importlib.import_module("mapet_ds.library"), name)


def __dir__() -> list[str]:
    return [*globals(), *_LIBRARY]
