"""An assistant as a `DraftSource`: its weights next to the target, and the same for every generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mtp_mlx.decode.drafter import DraftSource
from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.gemma4_assistant.config import DEFAULT_DRAFTS, MOST_DRAFTS, AssistantConfig
from mtp_mlx.drafters.gemma4_assistant.draft import AssistantDrafter
from mtp_mlx.drafters.gemma4_assistant.target import ReadTarget
from mtp_mlx.drafters.gemma4_assistant.weights import Assistant
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.cached_rows import is_readable


class Gemma4Assistant(DraftSource):
    """An assistant that drafts.

    Args:
        assistant: the weights.
        config: how they are built and run.
        target: what they read of the model that they draft for.
    """

    name = "assistant"
    title = "a Gemma 4 assistant"
    reads_caches: ClassVar[bool] = True

    def __init__(self, assistant: Assistant, config: AssistantConfig, target: ReadTarget) -> None:
        super().__init__()
        self.assistant = assistant
        self._config, self._target = config, target

    @property
    def config(self) -> AssistantConfig:
        """How the weights are built and run."""
        return self._config

    def look_from(self, position: str) -> None:
        """Makes drafts look back from another of `POSITIONS`."""
        self._config = replace(self._config, position=position)

    @property
    def drafts(self) -> int:
        """See `Speculator`."""
        return DEFAULT_DRAFTS

    @property
    def most_drafts(self) -> int:
        """See `DraftSource`: one assistant makes all drafts."""
        return MOST_DRAFTS

    def check_caches(self, caches: Sequence[Any]) -> None:
        """See `DraftSource`."""
        for index in self._target.layers.values():
            if not is_readable(caches[index]):
                raise MTPError(
                    f"a Gemma 4 assistant cannot read the {type(caches[index]).__name__} of layer {index}: leave the "
                    "`prompt_cache` or `max_kv_size` out, or load the model without `heads`"
                )

    def cost_key(self, columns: int) -> str:
        """See `DraftSource`."""
        tensors = cast("list[tuple[str, mx.array]]", tree_flatten(self.assistant.parameters()))
        size = sum(tensor.nbytes for _, tensor in tensors)
        return f"Gemma 4 assistant, {len(self._config.kinds)} layers, {size} bytes, {self.drafts} drafts"

    def open(
        self, attached: AttachedModel, picker: Picker, drafts: int, start: int, *, verified: bool = True
    ) -> AssistantDrafter:
        """See `DraftSource`."""
        return AssistantDrafter(attached, picker, self.assistant, self._target, self._config)
