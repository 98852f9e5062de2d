"""Settings that hold for all tests: a loaded machine is no fault of the code."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Examples may be slow to draw or to run where somebody else has the processor; what they prove does not change.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
