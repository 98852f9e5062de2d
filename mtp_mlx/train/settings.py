"""Every setting of `mtp-mlx train`: the YAML file, the options and the API are this dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mtp_mlx.config import setting
from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.drafters.masks.weights import MaskAdapterConfig


# Settings that only some methods read; every other one is read by all.
DEFAULT_WARMUP = 50
READ_BY: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        ("slots", "rank", "alpha", "target_modules", "chunk_blocks"),
        frozenset({"mask-tokens", "conf-adapt", "ptp"}),
    ),
    **dict.fromkeys(("max_blocks", "grad_checkpoint"), frozenset({"mask-tokens", "ptp"})),
    **dict.fromkeys(("block_share", "depth_decay"), frozenset({"mask-tokens", "mtp-heads", "ptp"})),
    **dict.fromkeys(("objective", "sampler_width", "lcm_weight", "sampler_rate"), frozenset({"mask-tokens"})),
    **dict.fromkeys(("tuning", "supervision", "region_rows"), frozenset({"conf-adapt"})),
    **dict.fromkeys(
        (
            "variant",
            "u_embedding",
            "u_beta",
            "uniforms",
            "independent",
            "ptp_loss",
            "greedy_share",
            "teacher_temperature",
            "teacher_top_k",
            "teacher_top_p",
            "teacher_min_p",
        ),
        frozenset({"ptp"}),
    ),
    **dict.fromkeys(
        (
            "heads",
            "extend",
            "ce_weight",
            "kl_weight",
            "top_share",
            "temperature",
            "learn_prompts",
            "hidden_cache",
        ),
        frozenset({"mtp-heads"}),
    ),
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
    method: Literal["mask-tokens", "mtp-heads", "conf-adapt", "ptp"] = setting(
        "mask-tokens", help="what is trained"
    )
    objective: Literal["self-distill", "apple"] = setting("self-distill", help="what slots learn")

    slots: int = setting(4, help="mask slots k of a block", minimum=1, maximum=32)
    rank: int = setting(12, help="rank of the LoRA", minimum=1)
    alpha: float = setting(24.0, help="LoRA scale: the update is multiplied by alpha / rank")
    target_modules: tuple[str, ...] = setting((), help="layer names that get LoRA; none = every linear")
    sampler_width: int = setting(1024, help="hidden size of the sampler head", minimum=1)
    draft_vocab: int = setting(8192, help="ids that may be drafted, by count; 0 = all", minimum=0)

    tuning: Literal["gated-lora", "lora", "full"] = setting("gated-lora", help="what conf-adapt trains")
    supervision: Literal["hard-teacher", "soft-teacher", "ground-truth"] = setting(
        "hard-teacher", help="what conf-adapt compares predictions with"
    )
    region_rows: int = setting(32, help="rows of a conf-adapt region, real tokens and masks", minimum=3)
    variant: Literal["o", "c"] = setting("o", help="O-PTP drafts one token, C-PTP a distribution (ptp)")
    u_embedding: Literal["bits", "linear-interpolation", "sawtooth", "ieee-bits"] = setting(
        "bits", help="how slots carry uniforms (ptp)"
    )
    u_beta: float = setting(
        0.3, help="uniforms lie Beta(b, b) inside their interval; 1 = evenly (ptp)", minimum=0.01
    )
    uniforms: Literal["teacher", "own"] = setting(
        "teacher", help="whose intervals uniforms lie in; own: inverse-autoregressive (ptp, variant c)"
    )
    independent: bool = setting(False, help="slots carry nothing: the control of comparisons (ptp)")
    ptp_loss: Literal["ce", "kl", "reverse-kl"] = setting(
        "ce", help="loss; kl and reverse-kl: variant c (ptp)"
    )
    greedy_share: float = setting(
        0.0, help="share of blocks trained for temperature 0 (ptp)", minimum=0.0, maximum=1.0
    )
    teacher_temperature: float = setting(
        1.0, help="the text was sampled at this temperature (ptp)", minimum=0.0
    )
    teacher_top_k: int = setting(0, help="the text was sampled with this top-k, 0 = all (ptp)", minimum=0)
    teacher_top_p: float = setting(
        1.0, help="the text was sampled with this top-p (ptp)", minimum=0.0, maximum=1.0
    )
    teacher_min_p: float = setting(
        0.0, help="the text was sampled with this min-p (ptp)", minimum=0.0, maximum=1.0
    )

    heads: int = setting(4, help="MTP heads, one draft each", minimum=1, maximum=16)
    extend: str | None = setting(None, help="grow the heads of --start-from: to 2x as many, or to a number")
    ce_weight: float = setting(1.0, help="weight of cross-entropy with the text (heads)", minimum=0.0)
    kl_weight: float = setting(1.0, help="weight of distillation; 0 is plain MTP (heads)", minimum=0.0)
    top_share: float = setting(
        0.08, help="share of the teacher's columns that is distilled (heads)", minimum=0.0, maximum=1.0
    )
    temperature: float = setting(1.0, help="of the distilled distributions (heads)", minimum=0.01)
    learn_prompts: bool = setting(False, help="learn from the tokens of prompts too (heads)")
    hidden_cache: Path | None = setting(None, help="folder that keeps the base's hidden states (heads)")

    steps: int = setting(1000, help="optimizer steps", minimum=1)
    batch_size: int = setting(2, help="sequences per micro-batch", minimum=1)
    micro_batches: int = setting(2, help="micro-batches per step; run side by side on a CPU", minimum=1)
    max_length: int = setting(1024, help="longest sequence in tokens; longer ones are cut", minimum=8)
    block_share: float = setting(1.0, help="share of positions that are supervised", minimum=0.0, maximum=1.0)
    max_blocks: int = setting(0, help="most blocks per sequence, 0 = no limit", minimum=0)
    chunk_blocks: int = setting(16, help="blocks that share a copy of the prefix", minimum=1)
    depth_decay: float = setting(1.0, help="weight of slot or head j: this to the power j - 1", minimum=0.0)
    lcm_weight: float = setting(1.0, help="weight of latent matching (objective apple)", minimum=0.0)
    cut_at_tokens: int = setting(0, help="answers of this length were cut, not ended; 0 = none", minimum=0)

    learning_rate: float = setting(1e-3, help="peak learning rate", minimum=0.0)
    sampler_rate: float = setting(0.3, help="sampler head's rate as a share of the rate", minimum=0.0)
    start_from: Path | None = setting(None, help="adapter folder whose weights to start from")
    warmup: int | None = setting(
        None, help="steps of linear warm-up; 50 unless given, or half of a shorter run", minimum=0
    )
    schedule: Literal["constant", "cosine", "linear"] = setting("cosine", help="after the warm-up")
    final_rate: float = setting(
        0.05, help="last learning rate as a share of the peak", minimum=0.0, maximum=1.0
    )
    weight_decay: float = setting(0.0, help="AdamW weight decay", minimum=0.0)
    clip: float = setting(1.0, help="largest gradient norm, 0 = no clipping", minimum=0.0)
    grad_checkpoint: bool = setting(False, help="recompute layers in the backward pass to save memory")
    loss_rows: int = setting(2048, help="rows whose logits exist at once", minimum=1)

    held_out: int | None = setting(
        None,
        help="held-out rows that acceptance is measured on; 32, or a tenth of the rows if that is less, without",
        minimum=0,
    )
    measure_every: int = setting(100, help="steps between measurements, 0 = only at the end", minimum=0)
    save_every: int = setting(50, help="steps between checkpoints", minimum=1)
    seed: int = setting(0, help="seed of initial weights, data order, blocks", minimum=0)

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other; all of them in one sentence."""
        if self.warmup is None:
            object.__setattr__(self, "warmup", min(DEFAULT_WARMUP, self.steps // 2))
        problems = self._unread()
        if self.warmup is not None and self.warmup > self.steps:
            problems.append(f"warmup ({self.warmup}) is longer than the run (steps {self.steps})")
        if self.block_share == 0:
            problems.append("block_share 0 leaves no block to train on")
        if self.learning_rate == 0:
            problems.append("learning_rate 0 learns nothing")
        drafts, word = (self.slots, "slots") if is_read("slots", self.method) else (self.heads, "heads")
        if self.max_length < drafts + 2:
            problems.append(
                f"max_length {self.max_length} holds no block of {drafts} {word}; {drafts + 2} does"
            )
        if self.method == "mtp-heads":
            problems += self._of_heads()
        if self.method == "conf-adapt":
            problems += self._of_regions()
        if self.variant == "o" and self.ptp_loss != "ce":
            problems.append(f"ptp_loss {self.ptp_loss} compares distributions, which variant o has none of")
        if self.uniforms == "own":
            problems += self._of_own_uniforms()
        if problems:
            raise MTPError(f"these settings do not go together: {'; '.join(problems)}")

    def _unread(self) -> list[str]:
        """Settings that were given and that the method does not read."""
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        return [
            f"{name} ({getattr(self, name)}) is a setting of {' and '.join(sorted(readers))}, "
            f"not of {self.method}"
            for name, readers in READ_BY.items()
            if self.method not in readers and getattr(self, name) != fields[name]
        ]

    def _of_heads(self) -> list[str]:
        """What is wrong with the settings of heads."""
        problems = []
        if not self.ce_weight and not self.kl_weight:
            problems.append("ce_weight and kl_weight are both 0, which leaves no loss")
        if self.kl_weight and not self.top_share:
            problems.append("top_share 0 leaves nothing to distil")
        if self.extend is not None and self.start_from is None:
            problems.append("extend grows trained heads: name their folder with --start-from")
        if self.extend is not None and self.heads != 4:
            problems.append("extend says how many heads there will be: leave heads out")
        return problems

    def _of_own_uniforms(self) -> list[str]:
        """What is wrong with the settings of inverse-autoregressive training."""
        problems = []
        if self.variant == "o":
            problems.append("uniforms own need a distribution per slot, which variant o has none of")
        if self.ptp_loss != "ce":
            problems.append(
                f"uniforms own do without a teacher, and ptp_loss {self.ptp_loss} compares with one"
            )
        if self.u_beta != 0.3:
            problems.append("uniforms own lie evenly in their intervals: leave u_beta out")
        if self.independent:
            problems.append("independent slots carry no uniforms: leave uniforms out")
        return problems

    def _of_regions(self) -> list[str]:
        """What is wrong with the settings of conf-adapt."""
        problems = []
        if self.region_rows < self.slots + 2:
            problems.append(
                f"region_rows {self.region_rows} has no room for {self.slots} masks behind two tokens; "
                f"{self.slots + 2} does"
            )
        if self.tuning != "gated-lora" and self.draft_vocab:
            problems.append(
                f"tuning {self.tuning} trains the model's own predictions, which have the whole vocabulary: give "
                "--draft-vocab 0"
            )
        return problems

    def adapter_shape(self) -> MaskAdapterConfig:
        """Shape of the adapter these settings train."""
        from mtp_mlx.drafters.masks.weights import MaskAdapterConfig  # needs mlx, which --help does not load

        return MaskAdapterConfig(
            slots=self.slots,
            rank=self.rank,
            alpha=self.alpha,
            target_modules=self.target_modules,
            sampler_width=self.sampler_width,
            draft_vocab_size=self.draft_vocab,
        )
