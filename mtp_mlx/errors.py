"""The error a user can mend: one clear sentence, no traceback."""


class MTPError(Exception):
    """Something the user can mend. The message says what is wrong, where, and how to mend it."""


class ModelNotFound(MTPError):
    """No model under this name, folder or hub id."""


class ConversionError(MTPError):
    """A checkpoint cannot be read, or holds something the converter does not support."""
