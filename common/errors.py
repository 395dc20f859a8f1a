"""The one family of errors that a user is meant to read.

Each message says what happened, what was got, what was expected and what to do. None holds
a patient's name, an identifier, a path inside a patient's folder or a pixel value.
"""

from __future__ import annotations


class FedicomError(Exception):
    """Base of every error that Fedicom raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class ConfigError(FedicomError):
    """A recipe or a setting that cannot be run as written."""

    exit_code = 2


class DataError(FedicomError):
    """Images or labels that do not make a cohort."""


class PrivacyError(FedicomError):
    """A request that the privacy rules or the site's budget refuse."""


class ExchangeError(FedicomError):
    """A message that is not what the protocol allows."""


class QuorumError(FedicomError):
    """Too few usable replies in a round; the model was left as it was."""


class SecureAggregationError(FedicomError):
    """A secure sum that somebody's lie, an unequal list, a number out of range or too few sites have stopped."""


class TrainingError(FedicomError):
    """Local training gave no usable weights."""


class DivergedError(TrainingError):
    """Weights or predictions that are not finite; at a site this tells of the noise that was drawn, or of a patient."""


class StorageError(FedicomError):
    """Something that had to be kept could not be written or read back."""


class ExportError(FedicomError):
    """A model file that did not pass its checks and was not written."""


class ModelFileError(FedicomError):
    """A model file that cannot be used: unreadable, not written by Fedicom, or changed since."""
