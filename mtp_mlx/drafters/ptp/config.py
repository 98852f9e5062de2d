"""Shape of a PTP adapter (arXiv 2512.21323), and the sampling that it was taught with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mtp_mlx.drafters.ptp.uniform_embedding import UNIFORM_EMBEDDINGS, UniformEmbeddingName
from mtp_mlx.errors import MTPError

Variant = Literal["o", "c"]


@dataclass(frozen=True)
class TeacherSampling:
    """The sampling whose CDF the uniforms of training belonged to; see `SamplingConfig`.

    Uniforms are conditional on it: decoding with another sampling writes the right text but accepts fewer drafts.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class PTPConfig:
    """Shape of a PTP adapter.

    Attributes:
        variant: "o" (one-hot) or "c" (categorical), see the module.
        embedding: of uniforms, see `uniform_embedding`.
        knots: vectors of the embedding "linear-interpolation".
        slots: most drafts behind one position.
        rank, alpha: of the gated LoRA; the update is scaled by alpha / rank.
        target_modules: last part of a layer's name; empty = every linear of a layer.
        independent: slots carry nothing and know nothing of each other's tokens; the control of comparisons.
        draft_vocab_size: 0 = drafts come from the whole vocabulary.
        teacher: sampling of the text it was trained on.

    Raises MTPError for a value out of range.
    """

    variant: Variant = "o"
    embedding: UniformEmbeddingName = "bits"
    knots: int = 3
    slots: int = 8
    rank: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ()
    independent: bool = False
    draft_vocab_size: int = 0
    teacher: TeacherSampling = TeacherSampling()

    def __post_init__(self) -> None:
        for name in ("slots", "rank", "knots"):
            if getattr(self, name) < 1:
                raise MTPError(f"adapter config: {name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("variant", get_args(Variant)), ("embedding", UNIFORM_EMBEDDINGS)):
            if getattr(self, name) not in known:
                raise MTPError(
                    f"adapter config: {name} is {getattr(self, name)!r}, but must be one of {', '.join(known)}"
                )

    @property
    def lead(self) -> int:
        """Slots at the start of a group that draft nothing."""
        return 1 if self.variant == "o" else 0
