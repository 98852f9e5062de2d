"""Options for loading and training MTP heads. Needs no mlx."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mtp_mlx.config import setting
from mtp_mlx.train.settings import Trains, TrainSettings

DEFAULT_HEADS = 4
DEFAULT_LAYERS = 1
DEFAULT_TAPS = "last"
DEFAULT_SHARED = False


@dataclass(frozen=True)
class HeadsLoading:
    """How loaded heads are run.

    Attributes:
        loop: drafts per step, reusing the heads in order if there are fewer; None for one draft per head.
    """

    loop: int | None = setting(
        None, help="Draft this many tokens a step, reusing MTP heads in order", minimum=1, maximum=16
    )


@dataclass(frozen=True, kw_only=True)
class HeadsSettings(TrainSettings):
    """Settings of MTP heads: plain MTP, MTP-D and looped extension (arXiv 2603.23911), one head for all depths.

    Heads of `start_from` keep their own `layers`, and their `taps`, `shared`, number and draft vocabulary unless
    others are given: `taps` may add states, and `shared` goes on with the first head alone.
    """

    method: ClassVar[str] = "mtp-heads"

    heads: int | None = setting(
        None, help=f"Number of heads, each of one draft (default: {DEFAULT_HEADS})", minimum=1, maximum=16
    )
    shared: bool | None = setting(
        None, help="One head makes all drafts, each on its own state (default: off)"
    )
    layers: int | None = setting(
        None, help=f"Decoder layers of a head (default: {DEFAULT_LAYERS})", minimum=1, maximum=16
    )
    taps: str | None = setting(
        None, help=f"States that heads read, such as low,middle,last (default: {DEFAULT_TAPS})"
    )
    extend: str | None = setting(
        None, help="Extend the heads of --start-from: to 2x as many, or to this number"
    )
    ce_weight: float = setting(1.0, help="Weight of the cross-entropy with the text", minimum=0.0)
    kl_weight: float = setting(1.0, help="Weight of the self-distillation; 0 = plain MTP", minimum=0.0)
    top_share: float = setting(
        0.08,
        help="Fraction of the draft vocabulary that is distilled, the teacher's most likely ids",
        minimum=0.0,
        maximum=1.0,
    )
    block_rate: float = setting(
        1.0, help="Learning rate of the copied layers, as a fraction of the rate", minimum=0.0
    )
    temperature: float = setting(1.0, help="Distillation temperature", minimum=0.01)
    block_share: float | None = setting(
        None, help="Fraction of positions that are trained (default: all)", minimum=0.0, maximum=1.0
    )
    depth_decay: float = setting(1.0, help="Loss weight of head k: this to the power k - 1", minimum=0.0)
    learn_from: Literal["responses", "all"] = setting(
        "responses", help="Learn from responses only, or from prompts too"
    )
    learn_prompts: bool = setting(False, help="Old name of --learn-from all")
    store: Literal["bf16", "8bit", "auto"] | None = setting(
        None, help="Weights on disk: bf16, 8bit, auto (8bit if it costs nothing)"
    )
    quantize_out: Literal[8] | None = setting(
        None, help="Quantise the weights on disk to this many bits; the same as --store 8bit"
    )
    hidden_cache: Path | None = setting(None, help="Folder to cache the base model's hidden states in")

    def __post_init__(self) -> None:
        """See `TrainSettings`."""
        super().__post_init__()
        if self.quantize_out is not None:
            object.__setattr__(self, "store", "8bit")

    def default_draft_vocab(self) -> int | None:
        """See `TrainSettings`: heads that exist keep theirs."""
        return super().default_draft_vocab() if self.start_from is None else None

    def new_drafts(self) -> int:
        """Drafts per step of new heads."""
        return DEFAULT_HEADS if self.heads is None else self.heads

    def too_short_for(self, drafts: int) -> str | None:
        """The clause that says that no row is long enough for so many drafts, or None if rows may be."""
        if self.max_length >= drafts + 2:
            return None
        return (
            f"`max_length` {self.max_length} is too short for {drafts} heads, which take {drafts + 2} tokens"
        )

    def problems(self) -> list[str]:
        """See `TrainSettings`; the length that heads of `start_from` need is known once their folder is read."""
        problems = super().problems()
        too_short = self.too_short_for(self.new_drafts()) if self.start_from is None else None
        if too_short is not None:
            problems.append(too_short)
        if self.block_share == 0:
            problems.append("`block_share` 0 leaves no position to train on")
        if not self.ce_weight and not self.kl_weight:
            problems.append("`ce_weight` and `kl_weight` are both 0, which leaves no loss")
        if self.kl_weight and not self.top_share:
            problems.append("`top_share` 0 leaves nothing to distil")
        if self.quantize_out is not None and self.store not in (None, "8bit"):
            problems.append(
                f"`quantize_out` {self.quantize_out} is `store` 8bit, and `store` is {self.store}"
            )
        if self.extend is not None and self.shared:
            problems.append(
                "`extend` copies one head after another, and `shared` heads are one: `loop` drafts more"
            )
        if self.extend is not None and self.start_from is None:
            problems.append("`extend` needs trained heads: name their folder with `start_from`")
        if self.extend is not None and self.heads is not None:
            problems.append("`extend` says how many heads there will be: leave `heads` out")
        return problems


LOADING = HeadsLoading
TRAINS = {
    "mtp-heads": Trains(
        HeadsSettings,
        "method:TrainHeads",
        help="MTP heads on the frozen model, distilled from its own head (arXiv 2603.23911)",
        examples=(
            "mtp-mlx train mtp-heads --data answers.jsonl --out heads --hidden-cache states",
            "mtp-mlx train mtp-heads --data answers.jsonl --out heads --shared --layers 2 --taps low,middle,last",
            "mtp-mlx train mtp-heads --data answers.jsonl --out heads8 --start-from heads --extend 2x",
        ),
    ),
}
