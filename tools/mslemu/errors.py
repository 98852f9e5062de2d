"""The one error the emulator raises about a kernel."""

from __future__ import annotations


class KernelError(RuntimeError):
    """The kernel does not compile, broke one of Metal's rules when run, or no compiler for it was found."""
