"""Every error that accelkit raises on purpose.

A message says what failed, where (site, head, field), what was found and what was expected, and
what to do. Each class also inherits the builtin that a caller would expect and carries the exit
code of the command line.
"""

from __future__ import annotations


class AccelkitError(Exception):
    """Base of all deliberate errors. `exit_code` is what the command line returns."""

    exit_code = 1


class PlanError(AccelkitError, ValueError):
    """A plan that cannot be read or used."""

    exit_code = 4


class PlanVersionError(PlanError):
    """The plan was written by a newer accelkit."""


class PlanMismatchError(PlanError):
    """The plan belongs to another model."""


class PlanCorruptError(PlanError):
    """The plan's file or its side tensors are damaged or missing."""


class UnknownMethodError(PlanError, LookupError):
    """No method of this name in the methods folder or among the installed entry points."""

    exit_code = 2


class InvalidInputError(AccelkitError, ValueError):
    """An argument, option or data file that cannot be used."""

    exit_code = 2


class UnsupportedModelError(AccelkitError, TypeError):
    """A model whose attention cannot be reached."""

    exit_code = 5


class UnsupportedConfigurationError(AccelkitError, NotImplementedError):
    """A combination of options that accelkit does not run."""

    exit_code = 5


class ParallelNotSupportedError(UnsupportedConfigurationError):
    """A form of multi-device execution that is not supported."""


class KernelUnavailableError(AccelkitError, RuntimeError):
    """A backend was asked for by name and cannot serve the call."""

    exit_code = 5


class MissingExtraError(AccelkitError, ImportError):
    """An optional package is needed; the message names the extra to install."""

    exit_code = 5


class AlreadyPatchedError(AccelkitError, RuntimeError):
    """The model already carries another plan."""


class NothingPatchedError(AccelkitError, RuntimeError):
    """No site was matched, or nothing ran sparse."""

    exit_code = 6


class GateFailedError(AccelkitError, RuntimeError):
    """A speed or quality limit set by the user was missed."""

    exit_code = 3


class AccelkitWarning(UserWarning):
    """Base of the warnings below."""


class PlanTransferWarning(AccelkitWarning):
    """The plan was made for a model, or on calls, that differ in a way that need not matter."""


class DenseFallbackWarning(AccelkitWarning):
    """A call ran dense for a reason that the user may not expect; raised once per reason."""
