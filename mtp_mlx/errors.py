"""Errors that the user can fix: one clear sentence, without a traceback."""


class MTPError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and how to fix it."""


class ModelNotFound(MTPError):
    """There is no model with this name, folder or hub id."""


class ConversionError(MTPError):
    """A checkpoint cannot be read, or contains something that the converter does not support."""


def needs_extra(what: str, package: str, extra: str) -> MTPError:
    """The error of a part of this package that needs another one, which an extra brings.

    Args:
        what: the part, as the subject of a sentence.
        package: that is missing.
        extra: of pyproject.toml.
    """
    return MTPError(
        f"{what} {package}: install mtp-mlx with its extra `{extra}` (in a checkout: pip install '.[{extra}]')"
    )
