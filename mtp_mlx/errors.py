"""The error a user can mend: one clear sentence, no traceback."""


class MTPError(Exception):
    """Something the user can mend. The message says what is wrong, where, and how to mend it."""
