"""The errors that end a program with exit code 2 and a sentence for the person at the terminal.

`BadImage` (data/formats.py) is not one of them: one unreadable image costs only itself.
"""

from __future__ import annotations


class UserError(Exception):
    """An error whose message names the mistake, the value, its source and what to do."""

    printed_elsewhere = False
    """Whether another rank prints the same message."""


class ConfigError(UserError):
    """A setting, a file or the launch must be corrected."""


class ShapeError(UserError):
    """Tensors that a program of one's own hands over don't fit together."""


class DataError(UserError):
    """The data set can't be used, or its storage fails."""


class RunError(UserError):
    """The run itself can't go on: gradients that are not finite, a loss that jumps, a full disk."""


class ResumeError(UserError):
    """This run can't continue from a checkpoint."""


class ExportError(UserError):
    """A checkpoint can't become a timm model."""
