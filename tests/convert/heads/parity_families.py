"""What docs/checkpoints.md says of each family of MTP heads, in terms of the numpy oracle.

Sizes are those of `head_configs`: D 48, four heads of 16, two of keys and values, four layers in the trunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tests.convert.heads.head_configs import L
from tests.convert.heads.numpy_heads import LayerFunction, Names, Rules
from tests.convert.heads.numpy_layers import (
    FusedQueries,
    GroupedQueries,
    Latent,
    Layer,
    SigmoidExperts,
    Single,
    SoftmaxExperts,
    StepExperts,
    squared_mlp,
)
from tests.convert.heads.numpy_mixers import GatedDelta, KimiExperts, LongcatLayer, Mamba2, Situ


@dataclass(frozen=True)
class Family:
    """One family for the oracle.

    Attributes:
        case: its name in `head_cases`. settings: added to that case's configuration.
        names, heads: of each head. trunk: of each layer.
        root: what the trunk's layer names begin with; norm, embed: names of its last norm and embedding.
        depths: of drafts that are compared.
        given: heads are compared over the states of mlx-lm's trunk, whose rounding they would enlarge past 1e-4.
    """

    case: str
    names: list[Names]
    heads: list[list[LayerFunction]]
    rules: Rules
    trunk: list[LayerFunction]
    settings: dict[str, Any] = field(default_factory=dict)
    root: str = "model."
    norm: str = "norm"
    embed: str = "embed_tokens"
    depths: int = 3
    given: bool = False


def nextn(n: int, embed: str = "model.embed_tokens", **other: str) -> Names:
    """DeepSeek's names."""
    p = f"model.layers.{n}."
    names = Names(f"{p}eh_proj", f"{p}enorm", f"{p}hnorm", f"{p}shared_head.norm", (p,), embed_tokens=embed)
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
GLM_5 = replace(LATENT, rope_base=20000.0)
_LING_LATENT = replace(LATENT, name="attention.", out="dense")
LING = {"ling 2.0": FusedQueries(4, 2, 12, 6), "ling 2.5": _LING_LATENT, "ling 3": _LING_LATENT}
_SITU = Situ(2.0, 3.0)
KIMI_K3 = Layer(replace(LATENT, turned=False), _SITU)
KIMI_K3_EXPERTS = Layer(KIMI_K3.attention, KimiExperts(2, 2.5, _SITU), mlp_name="block_sparse_moe.")
DEEPSEEK, DEEPSEEK_EXPERTS = Layer(LATENT), Layer(LATENT, SigmoidExperts(2))
_GLM = GroupedQueries(4, 2, 16, 8)
GLM, GLM_EXPERTS = Layer(_GLM), Layer(_GLM, SigmoidExperts(2))
ERNIE = Layer(GroupedQueries(4, 2, 16, 16, neighbours=True))

ERNIE_NAMES = Names(
    "model.mtp_linear_proj.0",
    "model.mtp_emb_norm.0",
    "model.mtp_hidden_norm.0",
    "model.norm",
    ("model.mtp_block.0.",),
)

FAMILIES: dict[str, Family] = {
    "deepseek-v3": Family(
        "deepseek-v3",
        [nextn(L)],
        [[DEEPSEEK_EXPERTS]],
        Rules(mask_first=True),
        [DEEPSEEK, *[DEEPSEEK_EXPERTS] * 3],
    ),
    "kimi-k2": Family(
        "kimi-k2",
        [nextn(L)],
        [[DEEPSEEK_EXPERTS]],
        Rules(mask_first=True),
        [DEEPSEEK, *[DEEPSEEK_EXPERTS] * 3],
    ),
    "kimi-k3": Family(
        "kimi-k3",
        [nextn(L)],
        [[KIMI_K3_EXPERTS]],
        Rules(first="pre-norm", recycled="raw", mask_first=True),
        [KIMI_K3, *[KIMI_K3_EXPERTS] * 3],
    ),
    "deepseek-v3 without low-rank queries": Family(
        "deepseek-v3 without low-rank queries",
        [nextn(L)],
        [[DEEPSEEK_EXPERTS]],
        Rules(mask_first=True),
        [DEEPSEEK, *[DEEPSEEK_EXPERTS] * 3],
    ),
    "glm-4.5": Family(
        "glm-4.5",
        [nextn(L)],
        [[GLM_EXPERTS]],
        Rules(mask_first=True),
        [GLM, *[GLM_EXPERTS] * 3],
    ),
    "glm-4.7-flash": Family(
        "glm-4.7-flash",
        [nextn(L)],
        [[DEEPSEEK_EXPERTS]],
        Rules(mask_first=True),
        [DEEPSEEK, *[DEEPSEEK_EXPERTS] * 3],
    ),
    "deepseek-v3.2": Family(
        "deepseek-v3.2",
        [nextn(L)],
        [[DEEPSEEK_EXPERTS]],
        Rules(mask_first=True),
        [DEEPSEEK, *[DEEPSEEK_EXPERTS] * 3],
    ),
    "glm-5": Family(
        "glm-5",
        [nextn(L)],
        [[Layer(GLM_5, SigmoidExperts(2))]],
        Rules(mask_first=True),
        [Layer(GLM_5), *[Layer(GLM_5, SigmoidExperts(2))] * 3],
    ),
    **{
        name: Family(
            name,
            [nextn(L, "model.word_embeddings", out="final_layernorm")],
            [[Layer(attention, SigmoidExperts(2, scaling=2.5))]],
            Rules(),
            [Layer(attention), *[Layer(attention, SigmoidExperts(2, scaling=2.5))] * 3],
            embed="word_embeddings",
        )
        for name, attention in LING.items()
    },
    "glm-4.5 dense": Family("glm-4.5 dense", [nextn(L)], [[GLM]], Rules(mask_first=True), [GLM] * L),
    "llama with own heads": Family(
        "llama with own heads",
        [nextn(L), nextn(L + 1)],
        [[LLAMA], [LLAMA]],
        Rules(mask_first=True),
        [LLAMA] * L,
    ),
    "mimo-7b": Family(
        "mimo-7b",
        [mimo_names(0, "model.mtp_layers.")],
        [[MIMO]],
        Rules(hidden_first=True, first="pre-norm", mask_first=True),
        [MIMO] * L,
    ),
    "fastmtp": Family(
        "fastmtp",
        [mimo_names(0, "model.mtp_layers.")],
        [[MIMO]],
        Rules(hidden_first=True),
        [MIMO] * L,
    ),
    "ernie-4.5": Family(
        "ernie-4.5",
        [ERNIE_NAMES],
        [[ERNIE]],
        Rules(),
        [ERNIE] * L,
        {"model_type": "ernie4_5"},
    ),
    "ernie-4.5 with experts in the trunk": Family(
        "ernie-4.5 without biases",
        [ERNIE_NAMES],
        [[ERNIE]],
        Rules(),
        [ERNIE, *[Layer(ERNIE.attention, SoftmaxExperts(2, normalised=True))] * 3],
        {
            "model_type": "ernie4_5_moe",
            "moe_intermediate_size": 24,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
}

# --- trunks with sliding windows, recurrent state or two caches a layer --------------------------------------

_QWEN = GroupedQueries(4, 2, 16, 4, gate="with queries")
QWEN_EXPERTS = Layer(_QWEN, SoftmaxExperts(2, normalised=False))
QWEN35, QWEN35_EXPERTS = (
    Layer(replace(_QWEN, rope_base=100000.0)),
    Layer(replace(_QWEN, rope_base=100000.0), SoftmaxExperts(2, normalised=True)),
)
_DELTA_FUSED, _DELTA = GatedDelta(2, 4, 8, 8, fused=True), GatedDelta(2, 4, 8, 8, fused=False)
MIMO_V2_SLIDING = GroupedQueries(6, 3, 10, 4, rope_base=5000.0, window=8)
MIMO_V2_FULL = GroupedQueries(4, 2, 16, 6)
EXAONE_SLIDING = GroupedQueries(4, 2, 16, 16, window=8)
EXAONE_FULL = GroupedQueries(4, 2, 16, 0)
_EXAONE_EXPERTS = SigmoidExperts(2, scaling=2.5)
LONGCAT = Layer(Latent(4, 12, 10, 8, 14, scaled=True), mlp_name="transformer_layer.mlp.")
NEMOTRON = [
    Single(GroupedQueries(4, 2, 16, 0, name="")),
    Single(SigmoidExperts(2, mlp=squared_mlp)),
]
_MAMBA = Single(Mamba2(4, 8, 2, 8))
STEP_FULL = GroupedQueries(4, 2, 16, 16, gate="per head")
STEP_SLIDING = GroupedQueries(6, 3, 16, 16, gate="per head", window=8)
_STEP_EXPERTS = StepExperts(2, 3.0)


def _mimo_v2_names(n: int) -> Names:
    p = f"model.mtp.layers.{n}."
    return Names(f"{p}eh_proj", f"{p}enorm", f"{p}hnorm", f"{p}final_layernorm", (p,))


def _step_names(n: int) -> Names:
    return nextn(n, out="transformer.shared_head.norm", lm_head="transformer.shared_head.output")


def _longcat_attention(name: str) -> Latent:
    # mlx-lm's trunk has 1e-5 here, the original 1e-6, which the head has too.
    return Latent(4, 12, 10, 8, 14, scaled=True, name=name, eps=1e-5)


_NEMOTRON_NAMES = Names(
    "mtp.layers.0.eh_proj",
    "mtp.layers.0.enorm",
    "mtp.layers.0.hnorm",
    "mtp.layers.1.final_layernorm",
    ("mtp.layers.0.", "mtp.layers.1."),
    embed_tokens="backbone.embeddings",
)

FAMILIES |= {
    "qwen3-next experts": Family(
        "qwen3-next experts",
        [fc_names()],
        [[QWEN_EXPERTS]],
        Rules(plus=1),
        [*[Layer(_DELTA_FUSED, SoftmaxExperts(2, normalised=False))] * 3, QWEN_EXPERTS],
        given=True,
    ),
    "qwen3.5 dense": Family(
        "qwen3.5 dense",
        [fc_names("model.language_model.embed_tokens")],
        [[QWEN35]],
        Rules(plus=1),
        [*[Layer(_DELTA)] * 3, QWEN35],
        root="model.language_model.",
    ),
    "qwen3.5 experts, fused": Family(
        "qwen3.5 experts, fused",
        [fc_names("model.language_model.embed_tokens")],
        [[QWEN35_EXPERTS]],
        Rules(plus=1),
        [*[Layer(_DELTA, SoftmaxExperts(2, normalised=True))] * 3, QWEN35_EXPERTS],
        root="model.language_model.",
    ),
    "mimo-v2": Family(
        "mimo-v2",
        [_mimo_v2_names(n) for n in range(3)],
        [[Layer(MIMO_V2_SLIDING, second_norm="pre_mlp_layernorm")]] * 3,
        Rules(recycled="trunk"),
        [Layer(MIMO_V2_FULL), *[Layer(MIMO_V2_SLIDING, SigmoidExperts(2))] * 3],
        {"n_shared_experts": None, "partial_rotary_factor": 0.4},
    ),
    "mimo-v2 without sinks": Family(
        "mimo-v2 without sinks",
        [_mimo_v2_names(n) for n in range(3)],
        [[Layer(MIMO_V2_SLIDING, second_norm="pre_mlp_layernorm")]] * 3,
        Rules(recycled="trunk"),
        [Layer(MIMO_V2_FULL), *[Layer(MIMO_V2_SLIDING, SigmoidExperts(2))] * 3],
        {"n_shared_experts": None, "partial_rotary_factor": 0.4},
    ),
    "exaone-moe": Family(
        "exaone-moe",
        [fc_names()],
        [[Layer(EXAONE_SLIDING)]],
        Rules(),
        [
            Layer(EXAONE_SLIDING),
            Layer(EXAONE_FULL, _EXAONE_EXPERTS),
            Layer(EXAONE_SLIDING, _EXAONE_EXPERTS),
            Layer(EXAONE_FULL, _EXAONE_EXPERTS),
        ],
    ),
    "exaone-moe experts": Family(
        "exaone-moe experts",
        [fc_names()],
        [[Layer(EXAONE_FULL, _EXAONE_EXPERTS)]],
        Rules(),
        [
            Layer(EXAONE_SLIDING, _EXAONE_EXPERTS),
            Layer(EXAONE_FULL, _EXAONE_EXPERTS),
            Layer(EXAONE_SLIDING, _EXAONE_EXPERTS),
            Layer(EXAONE_FULL, _EXAONE_EXPERTS),
        ],
    ),
    "longcat-flash": Family(
        "longcat-flash",
        [
            Names(
                "model.mtp.layers.0.eh_proj",
                "model.mtp.layers.0.enorm.m",
                "model.mtp.layers.0.hnorm.m",
                "model.mtp.norm",
                ("model.mtp.layers.0.",),
                embed_tokens="model.mtp.embed_tokens",
            )
        ],
        [[LONGCAT]],
        Rules(),
        [LongcatLayer(_longcat_attention, 3, 2, 1.5)] * L,
        {
            "attention_method": "MLA",
            "zero_expert_type": "identity",
            "zero_expert_num": 2,
            "moe_topk": 2,
            "routed_scaling_factor": 1.5,
        },
        given=True,  # its queries go through three numbers
    ),
    "nemotron-h": Family(
        "nemotron-h",
        [_NEMOTRON_NAMES],
        [NEMOTRON],
        Rules(),
        [_MAMBA, NEMOTRON[0], _MAMBA, NEMOTRON[1]],
        root="backbone.",
        norm="norm_f",
        embed="embeddings",
    ),
    "nemotron-h with a latent": Family(
        "nemotron-h with a latent",
        [_NEMOTRON_NAMES],
        [NEMOTRON],
        Rules(),
        [_MAMBA, NEMOTRON[0], _MAMBA, NEMOTRON[1]],
        root="backbone.",
        norm="norm_f",
        embed="embeddings",
    ),
    "step-3.5": Family(
        "step-3.5",
        [_step_names(L + i) for i in range(3)],
        [[Layer(STEP_FULL)], [Layer(STEP_SLIDING)], [Layer(STEP_FULL)]],
        Rules(plus=1, first="pre-norm", recycled="raw"),
        [
            Layer(STEP_FULL),
            *[Layer(kind, _STEP_EXPERTS, mlp_name="") for kind in (STEP_SLIDING, STEP_FULL, STEP_SLIDING)],
        ],
        {"sliding_window": 8},
    ),
    "speculators, qwen3-next": Family(
        "speculators, qwen3-next",
        [mimo_names(0, "mtp_layers.")],
        [[QWEN_EXPERTS]],
        Rules(plus=1),
        [*[Layer(_DELTA_FUSED, SoftmaxExperts(2, normalised=False))] * 3, QWEN_EXPERTS],
        given=True,
    ),
    "speculators, qwen3": Family(
        "speculators, qwen3", [mimo_names(0, "mtp_layers.")], [[LLAMA]], Rules(), [LLAMA] * L
    ),
}
