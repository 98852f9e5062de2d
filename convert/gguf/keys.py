"""The one list of metadata keys: which of them are carried over, which change nothing, and which are refused.

llama.cpp can write some hundred keys, and a key that is dropped in silence may mean a model with other numbers.
So of keys that begin with the architecture's name or with "tokenizer." only those listed here may be in a file, with
the values listed here; any other key is refused. Of "general." keys only the few listed say something about the
numbers; the rest are names, licences and sources. Facts are from llama.cpp (llama-arch.cpp, llama-model.cpp,
llama-context.cpp, convert_hf_to_gguf.py) and its package gguf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from mtp_mlx.convert.gguf.file import GGUFFile
from mtp_mlx.convert.gguf.vocabulary import ROLES
from mtp_mlx.errors import ConversionError

Config = dict[str, Any]
CARRIED: Final = "carried over"
NO_EFFECT: Final = "no effect"
# What may be: anything, because it is carried over or has no effect on a model that can be converted; one of a few
# values, with which nothing changes (of a list, each must be one); or what a function of value and config allows.
Rule = str | tuple[Any, ...] | Callable[[Any, Config], bool]

OFF, ONE = (0, False), (0, 1)  # llama.cpp reads a scale of 0 as "not set"


def _default_scale(value: Any, config: Config) -> bool:
    return value == 0 or math.isclose(value, config["head_dim"] ** -0.5, rel_tol=1e-5)


def _wide_window(value: Any, config: Config) -> bool:
    return value == 0 or value >= config["max_position_embeddings"]


def _as_wide(value: Any, config: Config) -> bool:
    return bool(value == config["hidden_size"])


def _yarn(config: Config) -> float:
    """The factor of yarn's rope scaling, 0 without."""
    scaling = config.get("rope_scaling") or {}
    return scaling["factor"] if scaling.get("rope_type") == "yarn" else 0.0


def _extrapolation(value: Any, config: Config) -> bool:
    return value < 0 or value == (1 if _yarn(config) else 0)  # negative: not set


def _yarn_attention(value: Any, config: Config) -> bool:
    """1, or yarn's own default, 0.1 ln(factor) + 1, which llama.cpp and mlx-lm multiply queries and keys by."""
    return value == 1 or (
        _yarn(config) > 1 and math.isclose(value, 0.1 * math.log(_yarn(config)) + 1, rel_tol=1e-4)
    )


# Keys without the architecture's name before them.
OF_ARCHITECTURE: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
            *(
                "attention.head_count",
                "attention.head_count_kv",
                "attention.key_length",
                "attention.value_length",
            ),
            *(
                "attention.layer_norm_rms_epsilon",
                "rope.dimension_count",
                "rope.freq_base",
                "rope.scale_linear",
            ),
            *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
            *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
        ),
        CARRIED,
    ),
    # Notes about the training, or how another program had laid out the rows.
    "rope.scaling.finetuned": NO_EFFECT,
    "tensor_data_layout": NO_EFFECT,
    # Settings of experts. Without any (expert_count) nothing reads them.
    "expert_count": OFF,
    **dict.fromkeys(
        (
            *("expert_used_count", "expert_shared_count", "expert_group_count", "expert_group_used_count"),
            *("expert_weights_scale", "expert_weights_norm", "expert_gating_func", "expert_group_scale"),
            *("expert_feed_forward_length", "expert_shared_feed_forward_length", "leading_dense_block_count"),
            *("expert_chunk_feed_forward_length", "experts_per_group", "interleave_moe_layer_step"),
        ),
        NO_EFFECT,
    ),
    "moe_every_n_layers": OFF,
    # Rope.
    "rope.freq_scale": ONE,
    "rope.scaling.attn_factor": (1,),  # multiplies queries and keys; mlx-lm has no such factor
    "rope.scaling.alpha": OFF,
    "rope.scaling.yarn_ext_factor": _extrapolation,
    "rope.scaling.yarn_attn_factor": _yarn_attention,
    "rope.scaling.yarn_log_multiplier": OFF,
    "rope.dimension_sections": OFF,
    # Attention.
    "attention.scale": _default_scale,
    "attention.output_scale": ONE,
    "attention.value_scale": ONE,
    "attention.causal": (True,),
    "attention.clamp_kqv": OFF,
    "attention.max_alibi_bias": OFF,
    "attention.sliding_window": _wide_window,
    "attention.sliding_window_pattern": (0, 1, False),
    "attention.shared_kv_layers": OFF,
    "attention.temperature_length": OFF,
    "attention.temperature_scale": OFF,
    # Scales and caps of logits and states.
    "logit_scale": ONE,
    "embedding_scale": ONE,
    "residual_scale": ONE,
    "attn_logit_softcapping": OFF,
    "final_logit_softcapping": OFF,
    "router_logit_softcapping": OFF,
    "swiglu_clamp_exp": OFF,
    "swiglu_clamp_shexp": OFF,
    "activation_sparsity_scale": OFF,
    # Other kinds of models under the same name: embedders, classifiers, heads for several tokens.
    "embedding_length_out": _as_wide,
    "hidden_activation": ("silu", "swish"),
    "pooling_type": (0, -1),
    "n_deepstack_layers": OFF,
    "nextn_predict_layers": OFF,
    "use_parallel_residual": OFF,
    "swin_norm": OFF,
    "rescale_every_n_layers": OFF,
    "token_shift_count": OFF,
}

ANY_ARCHITECTURE: dict[str, Rule] = {
    "general.architecture": CARRIED,
    "general.alignment": CARRIED,
    "general.type": ("model",),
    "general.quantization_version": (2,),  # of the block layouts that `blocks` knows
    **dict.fromkeys(
        (
            *(
                "tokenizer.ggml.model",
                "tokenizer.ggml.pre",
                "tokenizer.ggml.tokens",
                "tokenizer.ggml.token_type",
            ),
            *("tokenizer.ggml.scores", "tokenizer.ggml.merges", "tokenizer.ggml.add_bos_token"),
            *("tokenizer.ggml.add_space_prefix", "tokenizer.ggml.eos_token_ids", "tokenizer.chat_template"),
            *(f"tokenizer.ggml.{role}_token_id" for role in ROLES),
        ),
        CARRIED,
    ),
    # Templates beside the one that is used, the tokenizer once more in other forms, and a count of BERT's.
    **dict.fromkeys(
        (
            *("tokenizer.chat_templates", "tokenizer.chat_template.*", "tokenizer.huggingface.json"),
            *("tokenizer.ggml.token_type_count", "tokenizer.ggml.add_padding_token"),
            *("tokenizer.ggml.add_mask_token", "tokenizer.ggml.add_unknown_token"),
        ),
        NO_EFFECT,
    ),
    "tokenizer.ggml.add_eos_token": OFF,  # a prompt that ends there is answered by nothing
    "tokenizer.ggml.add_sep_token": OFF,
    "tokenizer.ggml.remove_extra_whitespaces": OFF,
    "tokenizer.ggml.precompiled_charsmap": (),  # a list, which must be empty
    "tokenizer.ggml.normalizer.lowercase": OFF,
    "tokenizer.ggml.normalizer.strip_accents": OFF,
    "tokenizer.ggml.suppress_tokens": (),
}
# Keys of other kinds of files, none of which may be there.
_FOREIGN = ("adapter.", "clip.", "xielu.", "diffusion.", "tokenizer.")


def check_keys(gguf: GGUFFile, arch: str, config: Config) -> None:
    """Raises one ConversionError that names every key which would change the numbers and cannot be carried over."""
    refused = [key for key in gguf.metadata if not _allowed(key, gguf.metadata[key], arch, config)]
    if refused:
        found = [f"{key} is {_short(gguf.metadata[key])}" for key in refused[:5]]
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise ConversionError(
            f"{gguf.path}: its metadata ask for what mlx-lm's {arch} does not have, or what is not known here: "
            f"{'; '.join(found)}{more}. Use the model's safetensors checkpoint instead."
        )


def _allowed(key: str, value: Any, arch: str, config: Config) -> bool:
    if key.startswith(f"{arch}."):
        rule = OF_ARCHITECTURE.get(key.removeprefix(f"{arch}."))
    elif key.startswith("tokenizer.chat_template."):
        rule = ANY_ARCHITECTURE["tokenizer.chat_template.*"]
    else:
        rule = ANY_ARCHITECTURE.get(key, None if key.startswith(_FOREIGN) else NO_EFFECT)
    if rule is None or isinstance(rule, str):
        return rule is not None
    values = value if isinstance(value, list) else [value]
    if callable(rule):
        return all(isinstance(v, int | float) and rule(v, config) for v in values)
    return all(v in rule for v in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
