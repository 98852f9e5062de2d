"""On a Mac that is there to run the kernels, a skipped kernel test fails, unless only emulation can run it."""

from __future__ import annotations

import os

import mlx.core as mx
import pytest

from tests.metal_kernels.emulated import EMULATION_ONLY

REQUIRED = "MTP_MLX_REQUIRE_METAL"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """With MTP_MLX_REQUIRE_METAL=1, turns a skip into a failure that names its reason."""
    report = (yield).get_result()
    if os.environ.get(REQUIRED) and report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if reason.removeprefix("Skipped: ") in EMULATION_ONLY:
            return
        report.outcome, report.longrepr = "failed", f"{REQUIRED} is set, but this test was skipped: {reason}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """With MTP_MLX_REQUIRE_METAL=1, ends the session where there is no Metal."""
    if os.environ.get(REQUIRED) and not mx.metal.is_available():
        pytest.exit(f"{REQUIRED} is set, and Metal is not available here", returncode=3)
