"""Errors that the user can fix: one clear sentence, without a traceback."""


class MTPError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and how to fix it."""


class ModelNotFound(MTPError):
    """There is no model with this name, folder or hub id."""


class ConversionError(MTPError):
    """A checkpoint cannot be read, or contains something that the converter does not support."""
