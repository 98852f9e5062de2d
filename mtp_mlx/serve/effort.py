"""How much a request wants the model to think: on or off, and the variable of templates that know efforts."""

from __future__ import annotations

from typing import Any

from mtp_mlx.chat_template import Thinking, template_variables
from mtp_mlx.serve.prompts import Prompts
from mtp_mlx.serve.request import RequestError

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
NO_EFFORT = EFFORTS[:2]  # turn thinking off; the others turn it on
VARIABLE = "reasoning_effort"


def thinking_by(effort: Any, name: str) -> Thinking:
    """Thinking as an effort asks for it.

    Args:
        effort: one of EFFORTS.
        name: of the field that it is in, for errors.

    Raises:
        RequestError: if it is none of them.
    """
    if effort not in EFFORTS:
        raise RequestError(f"{name} must be one of {', '.join(EFFORTS)}", field=name)
    return "off" if effort in NO_EFFORT else "on"


def effort_option(effort: str, prompts: Prompts) -> dict[str, Any]:
    """The template's variable for the effort, if it reads one."""
    return {VARIABLE: effort} if VARIABLE in template_variables(prompts.tokenizer) else {}
