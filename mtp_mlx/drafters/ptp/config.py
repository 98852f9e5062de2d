"""Shape of a PTP adapter (arXiv 2512.21323), and the sampling that it was trained for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mtp_mlx.drafters.ptp.uniform_embedding import UNIFORM_EMBEDDINGS, UniformEmbeddingName
from mtp_mlx.errors import MTPError

Variant = Literal["o", "c"]


@dataclass(frozen=True)
class TeacherSampling:
    """The teacher's sampling, whose CDF the training uniforms come from; fields as in `SamplingConfig`.

    With another sampling the decoded text is still right, but fewer drafts are accepted.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class PTPConfig:
    """Shape of a PTP adapter.

    Attributes:
        variant: "o" (one-hot) or "c" (categorical), see `mtp_mlx.drafters.ptp.weights`.
        embedding: embedding of the uniforms, see `mtp_mlx.drafters.ptp.uniform_embedding`.
        knots: number of vectors of the embedding "linear-interpolation".
        slots: most drafts after one position.
        rank, alpha: of the gated LoRA; the update is scaled by alpha / rank.
        target_modules: last part of the names of the layers with LoRA; empty for every linear layer.
        independent: ablation: slots without uniforms, which cannot know each other's tokens.
        draft_vocab_size: size of the draft vocabulary; 0 for the full vocabulary.
        teacher: the sampling of the text it was trained on.

    Raises:
        MTPError: if a value is out of range.
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
                raise MTPError(f"adapter config: `{name}` must be at least 1; got {getattr(self, name)}")
        for name, known in (("variant", get_args(Variant)), ("embedding", UNIFORM_EMBEDDINGS)):
            if getattr(self, name) not in known:
                raise MTPError(
                    f"adapter config: `{name}` is {getattr(self, name)!r}, but must be one of {', '.join(known)}"
                )

    @property
    def lead(self) -> int:
        """Slots at the start of every group that draft nothing."""
        return 1 if self.variant == "o" else 0
