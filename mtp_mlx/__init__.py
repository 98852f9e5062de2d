"""Several tokens per forward pass for dense mlx-lm models, with the same text.

Public names are imported on first use, so that `import mtp_mlx` does not load mlx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_mlx.api import GenerationResponse, chat_prompt, generate, load, stream_generate
    from mtp_mlx.decode.emission import Emission
    from mtp_mlx.decode.loop import mtp_generate_step
    from mtp_mlx.decode.pick import SamplingConfig
    from mtp_mlx.errors import MTPError
    from mtp_mlx.model.attach import attach
    from mtp_mlx.serve.batch_generate import batch_generate

_HOME = {
    "Emission": "mtp_mlx.decode.emission",
    "GenerationResponse": "mtp_mlx.api",
    "MTPError": "mtp_mlx.errors",
    "SamplingConfig": "mtp_mlx.decode.pick",
    "attach": "mtp_mlx.model.attach",
    "batch_generate": "mtp_mlx.serve.batch_generate",
    "chat_prompt": "mtp_mlx.api",
    "generate": "mtp_mlx.api",
    "load": "mtp_mlx.api",
    "mtp_generate_step": "mtp_mlx.decode.loop",
    "stream_generate": "mtp_mlx.api",
}

__all__ = [
    "Emission",
    "GenerationResponse",
    "MTPError",
    "SamplingConfig",
    "attach",
    "batch_generate",
    "chat_prompt",
    "generate",
    "load",
    "mtp_generate_step",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mtp_mlx' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
