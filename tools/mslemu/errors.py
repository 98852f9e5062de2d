"""The error that the emulator raises about a kernel."""

from __future__ import annotations


class KernelError(RuntimeError):
    """The kernel does not compile or broke one of Metal's rules, or no compiler was found."""
