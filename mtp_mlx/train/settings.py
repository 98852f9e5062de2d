"""Every setting of `mtp-mlx train`: the YAML file, the options and the API are this dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mtp_mlx.config import setting
from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.model.mask_adapter import MaskAdapterConfig


# Settings that only some methods read; every other one is read by all.
READ_BY: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        (
            "objective",
            "slots",
            "rank",
            "alpha",
            "target_modules",
            "sampler_width",
            "max_blocks",
            "chunk_blocks",
        ),
        frozenset({"mask-tokens"}),
    ),
    **dict.fromkeys(("lcm_weight", "sampler_rate", "grad_checkpoint"), frozenset({"mask-tokens"})),
}


def is_read(name: str, method: str) -> bool:
    """Whether training `method` reads the setting `name`."""
    return name not in READ_BY or method in READ_BY[name]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a training run. Units are in the help texts."""

    model: str = setting("smollm2-135m", help="base model: smollm2-135m, a folder or a hub id", flag="-m")
    data: Path = setting(help="JSONL file, or folder with train.jsonl and valid.jsonl", flag="-d")
    out: Path = setting(help="adapter folder to write; its checkpoint lives beside it", flag="-o")
    method: Literal["mask-tokens"] = setting("mask-tokens", help="what is trained")
    objective: Literal["self-distill", "apple"] = setting("self-distill", help="what slots learn")

    slots: int = setting(4, help="mask slots k, each with its own embedding", minimum=1, maximum=32)
    rank: int = setting(12, help="rank of the gated LoRA", minimum=1)
    alpha: float = setting(24.0, help="LoRA scale: the update is multiplied by alpha / rank")
    target_modules: tuple[str, ...] = setting((), help="layer names that get LoRA; none = every linear")
    sampler_width: int = setting(1024, help="hidden size of the sampler head", minimum=1)
    draft_vocab: int = setting(8192, help="ids that may be drafted, by count; 0 = all", minimum=0)

    steps: int = setting(1000, help="optimizer steps", minimum=1)
    batch_size: int = setting(2, help="sequences per micro-batch", minimum=1)
    micro_batches: int = setting(2, help="micro-batches per step; run side by side on a CPU", minimum=1)
    max_length: int = setting(1024, help="longest sequence in tokens; longer ones are cut", minimum=8)
    block_share: float = setting(1.0, help="share of positions that carry a block", minimum=0.0, maximum=1.0)
    max_blocks: int = setting(0, help="most blocks per sequence, 0 = no limit", minimum=0)
    chunk_blocks: int = setting(16, help="blocks that share a copy of the prefix", minimum=1)
    depth_decay: float = setting(1.0, help="weight of slot j is this to the power j - 1", minimum=0.0)
    lcm_weight: float = setting(1.0, help="weight of latent matching (objective apple)", minimum=0.0)
    cut_at_tokens: int = setting(0, help="answers of this length were cut, not ended; 0 = none", minimum=0)

    learning_rate: float = setting(1e-3, help="peak learning rate", minimum=0.0)
    sampler_rate: float = setting(0.3, help="sampler head's rate as a share of the rate", minimum=0.0)
    start_from: Path | None = setting(None, help="adapter folder whose weights to start from")
    warmup: int = setting(50, help="steps of linear warm-up", minimum=0)
    schedule: Literal["constant", "cosine", "linear"] = setting("cosine", help="after the warm-up")
    final_rate: float = setting(
        0.05, help="last learning rate as a share of the peak", minimum=0.0, maximum=1.0
    )
    weight_decay: float = setting(0.0, help="AdamW weight decay", minimum=0.0)
    clip: float = setting(1.0, help="largest gradient norm, 0 = no clipping", minimum=0.0)
    grad_checkpoint: bool = setting(False, help="recompute layers in the backward pass to save memory")
    loss_rows: int = setting(2048, help="rows whose logits exist at once", minimum=1)

    held_out: int = setting(32, help="held-out rows that acceptance is measured on", minimum=0)
    measure_every: int = setting(100, help="steps between measurements, 0 = only at the end", minimum=0)
    save_every: int = setting(50, help="steps between checkpoints", minimum=1)
    seed: int = setting(0, help="seed of initial weights, data order, blocks", minimum=0)

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other; all of them in one sentence."""
        problems = []
        if self.warmup > self.steps:
            problems.append(f"warmup ({self.warmup}) is longer than the run (steps {self.steps})")
        if self.block_share == 0:
            problems.append("block_share 0 leaves no block to train on")
        if self.learning_rate == 0:
            problems.append("learning_rate 0 learns nothing")
        if self.max_length < self.slots + 2:
            problems.append(
                f"max_length {self.max_length} holds no block of {self.slots} slots; {self.slots + 2} does"
            )
        if problems:
            raise MTPError(f"these settings do not go together: {'; '.join(problems)}")

    def adapter_shape(self) -> MaskAdapterConfig:
        """Shape of the adapter these settings train."""
        from mtp_mlx.model.mask_adapter import MaskAdapterConfig  # needs mlx, which --help does not load

        return MaskAdapterConfig(
            slots=self.slots,
            rank=self.rank,
            alpha=self.alpha,
            target_modules=self.target_modules,
            sampler_width=self.sampler_width,
            draft_vocab_size=self.draft_vocab,
        )
