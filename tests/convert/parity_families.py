"""What the reference tables say of each family of MTP heads, in terms of the numpy oracle.

Sizes are those of `head_configs`: D 48, four heads of 16, two of keys and values, four layers in the trunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .head_configs import L
from .numpy_heads import LayerFunction, Names, Rules
from .numpy_layers import (
    GroupedQueries,
    Latent,
    Layer,
    SigmoidExperts,
    Single,
    SoftmaxExperts,
    StepExperts,
    squared_mlp,
)


@dataclass(frozen=True)
class Family:
    """One family for the oracle.

    Attributes:
        case: its name in `head_cases`. settings: added to that case's configuration.
        names, heads: of each head. trunk: of each layer; empty where the oracle has no such trunk.
        root: what the trunk's layer names begin with; norm, embed: names of its last norm and embedding.
        depths: of drafts that are compared.
        cache: "" where mlx-lm gives the trunk ordinary KV caches, else what cannot give rows back.
    """

    case: str
    names: list[Names]
    heads: list[list[LayerFunction]]
    rules: Rules
    trunk: list[LayerFunction] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    root: str = "model."
    norm: str = "norm"
    embed: str = "embed_tokens"
    depths: int = 3
    cache: str = ""


def nextn(n: int, **other: str) -> Names:
    """DeepSeek's names."""
    p = f"model.layers.{n}."
    names = Names(f"{p}eh_proj", f"{p}enorm", f"{p}hnorm", f"{p}shared_head.norm", (p,))
    return replace(names, **{key: p + value for key, value in other.items()})


def mimo_names(n: int, prefix: str) -> Names:
    """MiMo-7B's names, and those of the speculators layout."""
    p = f"{prefix}{n}."
    parts = [
        f"{p}{name}" for name in ("input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm")
    ]
    return Names(*parts, (p,))


def fc_names(embed: str = "model.embed_tokens") -> Names:
    """Qwen's names, which EXAONE uses too."""
    return Names(
        "mtp.fc",
        "mtp.pre_fc_norm_embedding",
        "mtp.pre_fc_norm_hidden",
        "mtp.norm",
        ("mtp.layers.0.",),
        embed_tokens=embed,
    )


LLAMA = Layer(GroupedQueries(4, 2, 16, 16))
MIMO = Layer(GroupedQueries(4, 2, 12, 12))
LATENT = Latent(4, 12, 10, 8, 14)
DEEPSEEK, DEEPSEEK_EXPERTS = Layer(LATENT), Layer(LATENT, SigmoidExperts(2))
_GLM = GroupedQueries(4, 2, 16, 8)
GLM, GLM_EXPERTS = Layer(_GLM), Layer(_GLM, SigmoidExperts(2))
ERNIE = Layer(GroupedQueries(4, 2, 16, 16, neighbours=True))

FAMILIES: dict[str, Family] = {
    "deepseek-v3": Family(
        "deepseek-v3",
        [nextn(L)],
        [[DEEPSEEK_EXPERTS]],
        Rules(recycled="raw", mask_first=True),
        [DEEPSEEK, *[DEEPSEEK_EXPERTS] * 3],
    ),
    "deepseek-v3 without low-rank queries": Family(
        "deepseek-v3 without low-rank queries",
        [nextn(L)],
        [[DEEPSEEK_EXPERTS]],
        Rules(recycled="raw", mask_first=True),
        [DEEPSEEK, *[DEEPSEEK_EXPERTS] * 3],
    ),
    "glm-4.5": Family(
        "glm-4.5",
        [nextn(L)],
        [[GLM_EXPERTS]],
        Rules(mask_first=True),
        [GLM, *[GLM_EXPERTS] * 3],
    ),
    "glm-4.5 dense": Family("glm-4.5 dense", [nextn(L)], [[GLM]], Rules(mask_first=True), [GLM] * L),
    "llama with own heads": Family(
        "llama with own heads",
        [nextn(L), nextn(L + 1)],
        [[LLAMA], [LLAMA]],
        Rules(recycled="raw", mask_first=True),
        [LLAMA] * L,
    ),
    "mimo-7b": Family(
        "mimo-7b",
        [mimo_names(0, "model.mtp_layers.")],
        [[MIMO]],
        Rules(hidden_first=True, mask_first=True),
        [MIMO] * L,
    ),
    "ernie-4.5": Family(
        "ernie-4.5",
        [
            Names(
                "model.mtp_linear_proj.0",
                "model.mtp_emb_norm.0",
                "model.mtp_hidden_norm.0",
                "",
                ("model.mtp_block.0.",),
            )
        ],
        [[ERNIE]],
        Rules(recycled="raw", mask_first=True),
        [ERNIE] * L,
        {"model_type": "ernie4_5"},
    ),
}
