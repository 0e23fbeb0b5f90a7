"""The errors that end a program with a sentence for the person at the terminal and exit code 2.

`BadImage` (data/formats.py) is none of them: one unreadable image costs only itself.
"""

from __future__ import annotations


class UserError(Exception):
    """The message says what is wrong, the value, where it comes from and what to do.

    said: another rank ends for the same reason and says so.
    """

    said = False


class ConfigError(UserError):
    """A setting, a file or the launch must be corrected."""


class DataError(UserError):
    """The data set can't be used, or its storage fails."""


class RunError(UserError):
    """The run itself can't go on: gradients that are not finite, a loss that jumps, a full disk."""


class ResumeError(UserError):
    """This run can't continue from a checkpoint."""


class ExportError(UserError):
    """A checkpoint can't become a timm model."""
